"""How a PromptKD step grows with response length, batch, vocabulary and layers, one at a time.

Median seconds of three steps after one that warms up, by phase. Writes results/growth.*.json.
"""

import statistics
from typing import Any

from setting import OurStep, record, setting

BASE = {"num_requests": 8, "num_new": 64, "num_layers": 10, "vocabulary": 49152}
VARIED = {
    "num_new": (32, 128, 256),
    "num_requests": (4, 16),
    "num_layers": (5, 20),
    "vocabulary": (12288, 24576),
}
REPEATS = 4


def seconds_of(point: dict[str, int]) -> dict[str, float]:
    vocabulary = point["vocabulary"]
    given = setting(**{name: value for name, value in point.items() if name != "vocabulary"})
    step = OurStep(given, "promptkd", vocabulary=vocabulary)
    taken = [step.timed(number)[0] for number in range(REPEATS)]
    return {p: round(statistics.median(t[p] for t in taken[1:]), 3) for p in taken[0]}


def main() -> None:
    points = [BASE, *(BASE | {name: v} for name, values in VARIED.items() for v in values)]
    rows: list[dict[str, Any]] = []
    for point in points:
        rows.append({**point, "seconds": seconds_of(point)})
        print(rows[-1], flush=True)
    record("growth", {"teacher_step": "before_student", "points": rows})


if __name__ == "__main__":
    main()
