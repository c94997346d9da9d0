"""Where a step's time goes, at which share of the matmul peak, and what PromptKD adds to gkd.

8 requests x 128 new tokens; the methods take turns; with promptkd[vllm], its rows too.
Floating-point operations are those of the products with weights (``step.Cost``). Writes
results/phases.json.
"""

import importlib.util
import statistics

from setting import OurStep, matmul_peak, record, setting

REPEATS = 4  # the first one warms up


def main() -> None:
    sides = {
        "gkd": OurStep(setting(), "gkd"),
        "with_student": OurStep(setting(), "promptkd", "with_student"),
        "before_student": OurStep(setting(), "promptkd"),
    }
    if importlib.util.find_spec("vllm"):
        sides["gkd, vllm"] = OurStep(setting(), "gkd", vllm=True)
        sides["with_student, vllm"] = OurStep(setting(), "promptkd", "with_student", vllm=True)
        sides["before_student, vllm"] = OurStep(setting(), "promptkd", vllm=True)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    flops: dict[str, dict[str, float]] = {}
    peaks = []
    for number in range(REPEATS):
        peaks.append(matmul_peak())
        for name, step in sides.items():
            seconds, cost = step.timed(number)
            taken[name].append(seconds)
            flops[name] = dict(cost.flops)
            print(name, {phase: round(s, 2) for phase, s in taken[name][-1].items()}, flush=True)
    peak = statistics.median(peaks)
    rows = {}
    for name, runs in taken.items():
        seconds = {p: round(statistics.median(r[p] for r in runs[1:]), 3) for p in runs[0]}
        rates = {p: round(flops[name][p] / seconds[p] / peak, 3) for p in flops[name]}
        passes = seconds["student"] + seconds["teacher"]
        both = (flops[name]["student"] + flops[name]["teacher"]) / passes / peak
        rates["student and teacher"] = round(both, 3)
        rows[name] = {"seconds": seconds, "flops": flops[name], "share_of_peak": rates}
    for name in rows:
        method, _, engine = name.partition(", ")
        if method == "gkd":
            continue
        own, base = rows[name]["seconds"], rows[f"gkd, {engine}" if engine else "gkd"]["seconds"]
        rows[name]["against_gkd"] = round(own["whole"] / base["whole"], 3)
        rows[name]["more_seconds_than_gkd"] = {p: round(own[p] - base[p], 3) for p in own}
    record("phases", {"matmul_peak": peak, "methods": rows})


if __name__ == "__main__":
    main()
