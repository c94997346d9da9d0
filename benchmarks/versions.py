"""A whole step of this tree against the same step of another commit, in turns.

    python benchmarks/versions.py [COMMIT]      without a commit: HEAD, which shows the noise

Our side of authors_order, phases and trl_step: gkd and PromptKD in both teacher steps, 8 requests x
128 new tokens, written by the transformers engine. The other commit is checked out beside this
tree; each has a process of its own, and its own benchmarks/setting.py builds the step. Writes
results/versions.*.json.
"""

import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from setting import alternate, matmul_peak, record, setting

REPEATS = 8  # the first one warms up
STEPS = {
    "gkd": ("gkd", "before_student"),
    "before_student": ("promptkd", "before_student"),
    "with_student": ("promptkd", "with_student"),
}
WORKER = """
import sys
tree, method, teacher_step = sys.argv[1:]
sys.path[:0] = [f"{tree}/src", f"{tree}/benchmarks"]
from setting import OurStep, setting
step = OurStep(setting(), method, teacher_step)
for number in sys.stdin:
    print(step(int(number)), flush=True)
"""


def worker(tree: Path, method: str, teacher_step: str) -> subprocess.Popen[str]:
    """A process that makes a step of the code in ``tree`` for each number it reads."""
    command = [sys.executable, "-c", WORKER, str(tree), method, teacher_step]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)


def asked(process: subprocess.Popen[str], number: int) -> int:
    """One step; its response tokens."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{number}\n")
    return int(process.stdout.readline())


def main() -> None:
    commit = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    here = Path(__file__).parent.parent
    setting()  # the models are written once, before anybody reads them
    row = {}
    with tempfile.TemporaryDirectory() as other:
        subprocess.run(["git", "worktree", "add", "--detach", other, commit], check=True)
        try:
            for name, step in STEPS.items():
                with worker(here, *step) as ours, worker(Path(other), *step) as theirs:
                    sides = {"here": partial(asked, ours), "there": partial(asked, theirs)}
                    timings = alternate(sides, REPEATS)
                seconds = {of: timing.seconds[1:] for of, timing in timings.items()}
                medians = {of: statistics.median(each) for of, each in seconds.items()}
                ratio = round(medians["there"] / medians["here"], 3)
                row[name] = {"seconds": seconds, "times_faster": {"there": 1.0, "here": ratio}}
                print(name, ratio, flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], check=True)
    record("versions", {"against": commit, "matmul_peak": matmul_peak(), **row})


if __name__ == "__main__":
    main()
