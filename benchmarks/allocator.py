"""What it saves to keep freed memory: a PromptKD step's learning with glibc's defaults and without.

8 responses of 128 random tokens; a process for each side. Writes results/allocator.*.json.
"""

import random
import resource
from functools import partial

from setting import (
    OurStep,
    Side,
    alternate,
    matmul_peak,
    own_process,
    record,
    setting,
    times_faster,
)

from promptkd.rollouts import Rollout

SIDES = ("glibc's defaults", "memory kept")


def learning(name: str) -> dict[str, Side]:
    given = setting()
    step = OurStep(given, "promptkd", keep_memory=name == "memory kept")
    draw = random.Random(0).randrange
    rollouts = [
        Rollout(row, request, tuple(draw(49152) for _ in range(given.num_new)), "student")
        for row, request in enumerate(given.requests)
    ]

    def learn(number: int) -> int:
        step.learn(rollouts, number)
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(
            f"{name}: {used.ru_minflt} page faults, peak {used.ru_maxrss * 1024} bytes", flush=True
        )
        return sum(len(rollout.response_ids) for rollout in rollouts)

    return {name: learn}


def main() -> None:
    setting()  # the models are written once, before anybody reads them
    sides: dict[str, Side] = {}
    for name in SIDES:
        sides |= own_process(partial(learning, name), name)
    timings = alternate(sides, repeats=4)
    record(
        "allocator",
        {
            "seconds": {name: own.seconds for name, own in timings.items()},
            "matmul_peak": matmul_peak(),
            "times_faster": times_faster(timings, SIDES[0]),
        },
    )


if __name__ == "__main__":
    main()
