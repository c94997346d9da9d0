"""Seconds to score 10,000 predictions against their references: ROUGE-L, exact match, intervals.

Predictions and references are sentences of the packaged starter data, shuffled with seed 0 and
joined to some 60 words each, so that lengths and vocabulary are real.
Writes results/scoring.*.json.
"""

import random
import time
from importlib import resources

from setting import record

from promptkd.data import read_examples
from promptkd.evaluation.metrics import exact_match, rouge_l
from promptkd.evaluation.statistics import bootstrap_interval

NUM, WORDS = 10_000, 60


def main() -> None:
    rows = read_examples([str(resources.files("promptkd") / "starter" / "train.jsonl")])
    words = [word for row in rows for response in row.responses for word in response.split()]
    rng = random.Random(0)

    def text() -> str:
        start = rng.randrange(len(words) - 2 * WORDS)
        return " ".join(words[start : start + rng.randrange(WORDS // 2, 2 * WORDS)])

    pairs = [(text(), [text()]) for _ in range(NUM)]
    started = time.perf_counter()
    scores = [rouge_l(*pair) for pair in pairs]
    matches = [exact_match(*pair) for pair in pairs]
    bootstrap_interval(scores)
    bootstrap_interval(matches)
    seconds = time.perf_counter() - started
    record("scoring", {"predictions": NUM, "mean_words": WORDS * 1.25, "seconds": seconds})


if __name__ == "__main__":
    main()
