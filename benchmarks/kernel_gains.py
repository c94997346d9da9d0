"""What each kernel gains on a whole step: PromptKD with all of them, and without each in turn.

8 requests x 128 new tokens, ``with_student``, written by the transformers engine; a process for
each side, which takes one kernel out before the models are prepared. Without ours, attention is
transformers' ``sdpa`` over padded rows. ``times_faster``: with
it. Writes results/kernel_gains.*.json.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType

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

from promptkd import kernels
from promptkd.kernels import matmul

Removal = tuple[ModuleType, str, Callable[..., object]]
NOTHING = "nothing"
REMOVED: dict[str, Removal | None] = {
    NOTHING: None,
    "attention": (kernels, "attend_grouped", lambda module: None),
    "norms and gates": (kernels, "save_only_inputs", lambda module: None),
    "generation's matmuls": (matmul, "_laid_out", lambda: ()),
}


def step(name: str) -> dict[str, Side]:
    removed = REMOVED[name]
    if removed:
        setattr(*removed)
    return {name: OurStep(setting(), "promptkd", "with_student")}


def main() -> None:
    setting()  # the models are written once, before anybody reads them
    sides: dict[str, Side] = {}
    for name in REMOVED:
        sides |= own_process(partial(step, name), name)
    timings = alternate(sides, repeats=6)
    for own in timings.values():  # the first turn warms up
        del own.seconds[0], own.tokens[0]
    record(
        "kernel_gains",
        {
            "seconds": {name: own.seconds for name, own in timings.items()},
            "matmul_peak": matmul_peak(),
            "times_faster": {
                name: round(1 / slower, 2)
                for name, slower in times_faster(timings, NOTHING).items()
                if name != NOTHING
            },
        },
    )


if __name__ == "__main__":
    main()
