"""Where a step's time goes, at which share of the matmul peak, and what PromptKD adds to gkd.

8 requests x 128 new tokens; the methods take turns; each engine has a process of its own (vLLM if
it is installed). Floating-point operations are those of the products with weights
(``step.Cost``). Writes results/phases.*.json.
"""

import importlib.util
import statistics
from functools import partial

from setting import OurStep, Side, matmul_peak, own_process, record, setting

REPEATS = 4  # the first one warms up
METHODS = ("gkd", "promptkd", "promptkd")
MODES = ("before_student", "with_student", "before_student")


def timed_steps(vllm: bool) -> dict[str, Side]:
    """Each returns the seconds of a step's phases, and their floating-point operations."""

    def timed(step: OurStep, number: int) -> tuple[dict[str, float], dict[str, float]]:
        seconds, cost = step.timed(number)
        return seconds, dict(cost.flops)

    loaded = setting()
    steps = {
        name: OurStep(loaded, method, mode, vllm=vllm)
        for name, method, mode in zip(names_of(vllm), METHODS, MODES, strict=True)
    }
    return {name: partial(timed, step) for name, step in steps.items()}


def names_of(vllm: bool) -> list[str]:
    return [f"{name}{', vllm' if vllm else ''}" for name in ("gkd", *MODES[1:])]


def main() -> None:
    setting()  # the models are written once, before anybody reads them
    sides: dict[str, Side] = {}
    for vllm in [False, True] if importlib.util.find_spec("vllm") else [False]:
        sides |= own_process(partial(timed_steps, vllm), *names_of(vllm))
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    flops: dict[str, dict[str, float]] = {}
    peaks = []
    for number in range(REPEATS):
        peaks.append(matmul_peak())
        for name, step in sides.items():
            seconds, flops[name] = step(number)
            taken[name].append(seconds)
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
