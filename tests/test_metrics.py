"""Scores equal the reference implementation; intervals cover as often as they say."""

import itertools
import json
import random
from importlib import resources

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from promptkd.criteria import CRITERIA
from promptkd.errors import UserError
from promptkd.evaluation.metrics import (
    METRICS,
    check_criterion,
    check_metrics,
    distinct_n,
    exact_match,
    extract_answer,
    final_answer,
    metrics_of,
    pass_at_k,
    repeated_4_grams,
    rouge_l,
    rouge_l_unicode,
    score_text,
    unicode_words,
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


PERFECT = [
    "你好世界",
    "مرحبا بالعالم",
    "สวัสดีชาวโลก",
    "こんにちは、世界",
    "안녕하세요 세계",
    "नमस्ते दुनिया",
    "Привет, мир",
    "👍",
]


@pytest.mark.parametrize("text", PERFECT)
def test_a_perfect_answer_in_any_script_scores_100_under_rouge_l_unicode(text):
    assert rouge_l_unicode(text, [text]) == 100
    found = score_text(metrics_of([[text]]), text, [text], {"index": 0})
    assert found == {"rouge_l_unicode": 100, "exact_match": 100}


def test_ascii_references_are_scored_by_googles_rouge_l_alone():
    assert metrics_of([["a cat"], ["4"]]) == ("rouge_l", "exact_match")
    assert "rouge_l" in score_text(metrics_of([["Café au lait"]]), "x", ["Café au lait"], {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't STOP, 5 times!", ["don", "t", "stop", "5", "times"]),
        ("東京タワー 333m", ["東", "京", "タ", "ワ", "ー", "333m"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("e\u0301te\u0301 É", ["été", "é"]),
        ("한국어 말", ["한국어", "말"]),
        ("می\u200cروم", ["میروم"]),
    ],
)
def test_words_in_any_script(text, words):
    assert unicode_words(text) == words


@pytest.mark.parametrize("others", [11, 12, 20])
def test_rouge_l_chooses_no_student_where_its_tokeniser_drops_references(others):
    references = [["yes"]] * 10 + [["你好"]] * others + [[]]
    with pytest.raises(UserError, match=rf"{others} of {10 + others} ref.* row 10\)"):
        check_criterion("rouge_l", references)
    check_criterion("rouge_l_unicode", references)
    assert check_criterion("rouge_l", [["yes"]] * 3) is None


def test_rouge_l_chooses_by_the_references_that_it_can_read_and_says_how_many_it_cannot():
    left_out = check_criterion("rouge_l", [["yes"], ["你好"], ["no"], ["👍"]])
    assert left_out is not None
    assert "can't read 2 of 4 references" in left_out
    assert "the first is row 1" in left_out


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"We get \boxed{4} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("3 + 4 = 7\n#### 1,234", "1,234"),
        ("The answer is: 12 apples, not 13.", "12"),
        ("The final answer is blue", "blue"),
        ("It costs 3 dollars and 50.5", "50.5"),
        (r"cut off in \boxed{12", "12"),
        ("Paris", "Paris"),
    ],
)
def test_the_answer_is_found_where_texts_put_it(text, answer):
    assert extract_answer(text) == answer


def test_final_answers_are_compared_as_numbers_where_they_are_some():
    assert final_answer("So it is 1,200.", ["Work...\n#### 1200"]) == 100
    assert final_answer("I count 1201", ["#### 1200"]) == 0
    assert final_answer("The answer is Blue.", ["blue"]) == 100
    assert final_answer("0.5", ["1/2"]) == 100
    assert final_answer("", ["5"]) == 0


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for num_right in range(6):
        answers = [i < num_right for i in range(5)]
        for k in range(1, 6):
            subsets = list(itertools.combinations(answers, k))
            share = 100 * sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(5, num_right, k) == pytest.approx(share)


def test_repetition_and_diversity_by_hand():
    assert repeated_4_grams("a b c d e") == 0
    assert repeated_4_grams("no " * 13) == 90  # ten 4-grams, one of them new
    assert repeated_4_grams("short") == 0
    assert distinct_n(["a b", "a b", "c"], 2) == 50
    assert distinct_n([""], 2) == 0


def test_a_users_function_scores_responses_and_is_blamed_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text(
        "def share(response, references, example):\n"
        "    return 10 * example['num_tokens'] if references else None\n"
        "def broken(response, references, example):\n"
        "    return {}['nothing']\n"
        "def endless(response, references, example):\n"
        "    return float('inf')\n"
    )
    monkeypatch.chdir(tmp_path)
    names = metrics_of([["a"]], ["my_metric:share"])
    example = {"index": 3, "num_tokens": 4}
    assert score_text(names, "b", ["a"], example)["my_metric:share"] == 40
    assert "my_metric:share" not in score_text(names, "b", [], example)
    with pytest.raises(UserError, match="my_metric:broken on the response to row 3 raised KeyErr"):
        score_text(("my_metric:broken",), "b", ["a"], example)
    with pytest.raises(UserError, match="returned inf"):
        score_text(("my_metric:endless",), "b", ["a"], example)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("rouge", "unknown metric 'rouge'; did you mean 'rouge_l'"),
        ("exact_match@6", "5 seeds give 5"),
        ("exact_match@x", "5 seeds give 5"),
        ("nowhere:function", "metric 'nowhere:function' cannot be imported"),
        ("json:decoder", "is a module, not a function"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused_before_any_work(name, complaint):
    with pytest.raises(UserError, match=complaint):
        check_metrics((name,), num_seeds=5)
    check_metrics(("exact_match@5", "distinct_2", *METRICS), num_seeds=5)


def test_every_metric_of_a_response_may_choose_the_student():
    assert set(METRICS) == set(CRITERIA) - {"reverse_kl_to_teacher", "cross_entropy"}


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

    pairs = [[(value, 1) for value in values] for values in (first, second)]
    mean, low, high = paired_difference(*pairs)
    assert mean == pytest.approx(np.mean(first) - np.mean(second))
    assert 0 < low < mean < high < 2
    assert bootstrap_interval(first)[0] < bootstrap_interval(second)[1]


def test_paired_scores_of_different_examples_are_refused():
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([(1.0, 1)] * 3, [(1.0, 1)] * 2)


def test_mean_and_deviation_are_the_samples():
    assert mean_and_deviation([2.0, 4.0, 9.0]) == pytest.approx((5.0, np.std([2, 4, 9], ddof=1)))
    assert mean_and_deviation([3.0]) == (3.0, 0.0)
