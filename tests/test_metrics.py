"""Scores equal the reference implementation; intervals cover as often as they say."""

import json
import random
from importlib import resources

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from promptkd.evaluation.metrics import (
    exact_match,
    rouge_l,
)
from promptkd.evaluation.statistics import bootstrap_interval, mean_and_deviation, paired_difference


def starter_responses() -> list[list[str]]:
    directory = resources.files("promptkd") / "starter"
    responses = []
    for name in ("train", "validation", "test"):
        for line in (directory / f"{name}.jsonl").read_text().splitlines():
            output = json.loads(line)["output"]
            responses.append([output] if isinstance(output, str) else output)
    return responses


def test_rouge_l_is_googles_best_over_the_references():
    responses = starter_responses()
    choose, scorer = random.Random(0), RougeScorer(["rougeL"], use_stemmer=True)
    num_partial = 0
    for references in responses:
        other = choose.choice(responses)[0].split()
        own = references[-1].split()
        words = own[choose.randrange(len(own)) :] + other[: choose.randrange(len(other))]
        choose.shuffle(words) if choose.random() < 0.2 else None
        prediction = " ".join(words)
        asked = [*references, *choose.choice(responses)]
        expected = max(scorer.score(r, prediction)["rougeL"].fmeasure for r in asked)

        assert rouge_l(prediction, asked) == pytest.approx(100 * expected, abs=1e-9)
        num_partial += 0 < expected < 1
    assert len(responses) > 400
    assert num_partial > 0.9 * len(responses)


def test_rouge_l_by_hand():
    # precision 2/3, recall 2/4: F1 = 2 * (2/3) * (1/2) / (2/3 + 1/2) = 4/7
    assert rouge_l("police killed gunman", ["the gunman police killed"]) == pytest.approx(400 / 7)
    assert rouge_l("Running, dogs!", ["run dog"]) == pytest.approx(100)
    assert rouge_l("a b", ["c d", "b a", "a b"]) == pytest.approx(100)


@pytest.mark.parametrize("empty", ["", " \n", "?!"])
def test_rouge_l_of_an_empty_response_or_reference_is_zero(empty):
    assert rouge_l(empty, ["a cat"]) == 0
    assert rouge_l("a cat", [empty]) == 0
    assert rouge_l(empty, [empty]) == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Paris.", "paris", 100),
        ("  New   York\n", "new york", 100),
        ("Paris, France", "Paris", 0),
        ("the cat", "cat", 0),
        ("", "A", 0),
        ("The", "A", 0),
    ],
)
def test_exact_match_ignores_case_punctuation_and_spaces_alone(prediction, reference, expected):
    assert exact_match(prediction, [reference]) == expected
    assert exact_match(prediction, ["something else", reference]) == expected


def test_the_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    random_numbers = np.random.default_rng(0)
    num_covered, num_trials = 0, 300
    for _ in range(num_trials):
        values = (random_numbers.random(60) < 0.3) * 100.0
        low, high = bootstrap_interval(values.tolist())
        num_covered += low <= 30 <= high
    assert 0.89 <= num_covered / num_trials <= 0.98


def test_the_bootstrap_interval_shrinks_with_the_root_of_the_number_of_values():
    values = np.random.default_rng(0).normal(size=1600).tolist()
    low, high = bootstrap_interval(values[:100])
    low_of_all, high_of_all = bootstrap_interval(values)

    assert 3 < (high - low) / (high_of_all - low_of_all) < 5.3


def test_the_bootstrap_interval_is_the_same_every_time():
    values = [float(v) for v in np.random.default_rng(1).normal(size=50)]

    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_the_interval_of_a_mean_over_tokens_resamples_requests():
    random = np.random.default_rng(2)
    counts = random.integers(1, 9, size=40).tolist()
    sums = [float(count * random.normal(3)) for count in counts]
    low, high = bootstrap_interval(sums, counts)
    assert low < sum(sums) / sum(counts) < high
    alike = bootstrap_interval([2 * s for s in sums], [2 * count for count in counts])
    assert alike == pytest.approx((low, high))


def test_the_interval_of_one_value_is_that_value_and_of_none_is_refused():
    assert bootstrap_interval([3.0]) == (3.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])


def test_paired_scores_see_a_small_difference_that_unpaired_intervals_hide():
    noise = np.random.default_rng(0)
    difficulty = noise.normal(50, 20, size=200)
    first = (difficulty + 1 + noise.normal(0, 1, size=200)).tolist()
    second = (difficulty + noise.normal(0, 1, size=200)).tolist()

    mean, low, high = paired_difference(first, second)
    assert mean == pytest.approx(np.mean(first) - np.mean(second))
    assert 0 < low < mean < high < 2
    assert bootstrap_interval(first)[0] < bootstrap_interval(second)[1]


def test_paired_scores_of_different_examples_are_refused():
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])


def test_mean_and_deviation_are_the_samples():
    assert mean_and_deviation([2.0, 4.0, 9.0]) == pytest.approx((5.0, np.std([2, 4, 9], ddof=1)))
    assert mean_and_deviation([3.0]) == (3.0, 0.0)
