"""What `kernels: compiled` gains on a processor: PromptKD's step, plain and compiled in turns.

8 requests x 128 new tokens; who writes them isn't timed, and both sides learn from the same. A
process for each side; the first step, which compiles, is kept apart (``compiling``, in seconds
beyond a later step). ``times_faster``: of the later steps, against plain. Writes
results/compiled_step.*.json.
"""

from functools import partial

import torch
from setting import OurStep, Side, alternate, own_process, record, setting, times_faster

from promptkd.rollouts import Rollout


def step(compiled: bool) -> dict[str, Side]:
    given = setting()
    ours = OurStep(given, "promptkd", compiled=compiled)
    generator = torch.Generator().manual_seed(0)
    rollouts = [
        Rollout(row, request, tuple(ids.tolist()), "student")
        for row, request in enumerate(given.requests)
        for ids in [torch.randint(5, 40_000, (given.num_new,), generator=generator)]
    ]

    def learn(number: int) -> int:
        ours.learn(rollouts, number)
        return len(rollouts) * given.num_new

    return {_name(compiled): learn}


def _name(compiled: bool) -> str:
    return "compiled" if compiled else "plain"


def main() -> None:
    setting()  # the models are written once, before anybody reads them
    sides: dict[str, Side] = {}
    for compiled in (False, True):
        sides |= own_process(partial(step, compiled), _name(compiled))
    timings = alternate(sides, repeats=6)
    first = {name: own.seconds.pop(0) for name, own in timings.items()}
    for own in timings.values():
        del own.tokens[0]
    later = min(timings["compiled"].seconds)
    record(
        "compiled_step",
        {
            "seconds": {name: own.seconds for name, own in timings.items()},
            "compiling": round(first["compiled"] - later, 1),
            "times_faster": times_faster(timings, "plain"),
        },
    )


if __name__ == "__main__":
    main()
