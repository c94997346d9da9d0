"""What a report says of the models: in sentences, with intervals, and no more than is shown."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from promptkd.evaluation.results import Score
from promptkd.numbers import digits
from promptkd.report.cells import Cell
from promptkd.report.comparisons import best_model, between, headline, in_words
from promptkd.report.data import DataSet, Model
from promptkd.report.findings import answer, distance, warnings
from promptkd.report.tables import score_table
from scored import evaluation, noisy, run, student


def test_a_difference_is_shown_exactly_when_its_interval_excludes_zero():
    base = noisy(30)
    clearly = between(student("a", [s + 2 for s in base]), student("b", base), "rouge_l")
    assert clearly is not None
    assert clearly.difference == pytest.approx(2)
    assert clearly.shown
    hardly = between(student("a", noisy(30, 1)), student("b", noisy(30, 2)), "rouge_l")
    assert hardly is not None
    assert hardly.low < 0 < hardly.high
    assert not hardly.shown


def test_scores_of_different_requests_are_not_compared():
    assert (
        between(student("a", noisy(30, size=5)), student("b", noisy(30, size=6)), "rouge_l") is None
    )


def test_a_run_is_marked_best_only_if_it_is_clear_of_every_other():
    base = noisy(30)
    best, worse = student("best", [s + 3 for s in base]), student("worse", base)
    rival = student("rival", [s + 3 + g for s, g in zip(base, noisy(0, 3), strict=True)])
    assert best_model([worse, best], "rouge_l") == "best"
    assert best_model([worse, best, rival], "rouge_l") is None
    assert best_model([best], "rouge_l") is None


def test_a_single_run_answers_with_distance_size_and_paired_differences():
    base = noisy(30)
    own = [s + 2 for s in base]
    data = DataSet(
        "held_out",
        (
            student("promptkd", own, kl=0.5),
            Model("start", "start", evaluation(base, "start", kl=2.0)),
            Model("teacher", "teacher", evaluation(noisy(32, 4), "teacher")),
        ),
    )
    summary = {"student_parameters": 50, "teacher_parameters": 100, "best": {"step": 2}}
    first, second, third, fourth = answer([run(summary=summary)], [data])
    mean, starts = sum(own) / 60, sum(base) / 60
    assert first == (
        f"On held_out (60 requests, seed 1), the student's ROUGE-L is {mean:.1f} (95% interval "
        f"{mean - 1:.1f} to {mean + 1:.1f}); its start's {starts:.1f}, its teacher's 32.0."
    )
    assert second.startswith(
        "Against its start: 2.0 points more, 95% interval 2.0 to 2.0. Against its "
    )
    assert "teacher: no difference shown (" in second
    assert "; with 60 requests, a true difference of " in second
    assert third == (
        "On held_out (60 requests, seed 1), the student came 75% closer to its teacher (KL from "
        "2.00 to 0.500 nats per token)."
    )
    assert fourth == "It has 50% of its teacher's parameters."


def test_what_requests_detect_is_what_their_interval_shows_four_times_in_five():
    gaps = random.Random(5)
    spread, size, shown = 8.0, 50, 0
    noise = [gaps.gauss(0, spread) for _ in range(size)]
    base = [50.0] * size
    first = between(
        student("a", [b + n for b, n in zip(base, noise, strict=True)]),
        student("b", base),
        "rouge_l",
    )
    assert first is not None
    exact = 2.8 * spread / math.sqrt(size)
    assert first.detectable == pytest.approx(exact, rel=0.2)
    for _ in range(200):  # a z-test on fresh requests, with a true difference of that size
        mean = sum(gaps.gauss(exact, spread) for _ in range(size)) / size
        shown += mean > 1.96 * spread / math.sqrt(size)
    assert 0.7 < shown / 200 < 0.9


def measured(
    parameters: int, speed: float, device: str = "cpu", vllm: float | None = None
) -> dict[str, Any]:
    return {
        **({"vllm_tokens_per_second": vllm} if vllm else {}),
        "parameters": parameters,
        "bytes_memory": 2 * parameters,
        "bytes_disk": 4 * parameters,
        "tokens_per_second": speed,
        **{"timed_requests": 16, "timed_tokens": 32, "engine": "transformers", "device": device},
    }


def test_a_student_is_said_to_be_faster_only_than_a_teacher_timed_alike():
    base = noisy(30)

    def said(device: str, own: float | None = None, teachers: float | None = None) -> str:
        models = (
            ("promptkd", "run", measured(50, 30.0, vllm=own)),
            ("t", "teacher", measured(100, 20.0, device, teachers)),
        )
        data = DataSet(
            "d",
            tuple(
                Model(n, r, replace(evaluation(base, n), size_and_speed=m)) for n, r, m in models
            ),
        )
        return answer([run()], [data])[-1]

    assert said("cpu") == (
        "It has 50% of its teacher's parameters, generates 1.50 times as fast with transformers "
        "(not measured with vLLM), and its weights take 50% of the memory and 50% of the disk."
    )
    assert "1.50 times as fast with transformers (with vLLM 1.75 times, 70 tokens per second)" in (
        said("cpu", 70.0, 40.0)
    )
    assert "(with vLLM 70 tokens per second)" in said("cpu", 70.0)
    assert "times as fast" not in said("another")


def test_speeds_are_not_compared_where_equally_large_models_were_timed_far_apart():
    def said(other: float) -> str:
        speeds = (("promptkd", "run", 50, 30.0), ("start", "start", 50, other))
        models = tuple(
            Model(n, r, replace(evaluation(noisy(30), n), size_and_speed=measured(size, speed)))
            for n, r, size, speed in (*speeds, ("t", "teacher", 100, 20.0))
        )
        return answer([run()], [DataSet("d", models)])[-1]

    assert "generates 1.50 times as fast" in said(44.0)
    assert said(60.0) == (
        "It has 50% of its teacher's parameters, and its weights take 50% of the memory and 50% of "
        "the disk. Its speed is not comparable: 30 to 60 tokens per second were timed of equally "
        "large models."
    )


def test_exact_match_leads_only_where_some_model_answers_exactly():
    def data(right: float) -> DataSet:
        scores = {"rouge_l": Score(mean=70.0, num_requests=60), "exact_match": Score(mean=right)}
        return DataSet("d", (Model("a", "run", replace(evaluation(noisy(30)), scores=scores)),))

    assert headline(data(5.0)) == "rouge_l"
    assert headline(data(58.3)) == "exact_match"
    assert in_words("exact_match", 58.33) == "exact match is 58.3%"


def test_a_student_that_moved_away_is_said_to_have_moved_away():
    rows = tuple(
        {"step": step, "evaluation": {"reverse_kl_to_teacher": kl}}
        for step, kl in ((0, 1.0), (2, 1.5), (4, 9.0))
    )
    one = run(validations=rows, summary={"best": {"step": 2}})
    found = distance(one, [])
    assert found is not None
    assert (found.start, found.end) == (1.0, 1.5)
    assert answer([one], [])[-1].startswith(
        "On the validation data (one response per request, no interval), the student moved away"
    )


def test_a_student_that_no_longer_ends_is_not_praised_alone():
    rows = tuple(
        {"step": s, "evaluation": {"reverse_kl_to_teacher": kl, "ended": e, "rouge_l": r}}
        for s, kl, e, r in ((0, 0.9, 52.5, 9.64), (40, 0.52, 0.0, 8.34))
    )
    said = answer([run(validations=rows, summary={"best": {"step": 40}})], [])
    where = "the validation data (one response per request, no interval)"
    assert said == [
        f"On {where} its ROUGE-L went from 9.6 to 8.3.",
        f"On {where}, the student came 42% closer to its teacher (KL from 0.900 to 0.520 nats per "
        "token).",
        f"But on {where}, fewer of its responses end by themselves (52% before, 0% now; its "
        "teacher's: not measured there).",
    ]


def ending(label: str, role: str, ended: float, length: float) -> Model:
    scores = {
        "reverse_kl_to_teacher": Score(mean=0.5, interval_95=(0.4, 0.6)),
        "ended": Score(mean=ended),
        "response_length": Score(mean=length),
    }
    return Model(label, role, replace(evaluation(noisy(30), label), scores=scores))


def test_a_student_is_not_blamed_for_what_its_teacher_does_too():
    rows = tuple({"step": s, "evaluation": {"ended": e}} for s, e in ((0, 90.0), (40, 0.0)))
    one = run(validations=rows, summary={"best": {"step": 40}})
    start = ending("start", "start", 90, 20)

    def said(teacher: Model) -> list[str]:
        data = DataSet("held_out", (ending("promptkd", "run", 15, 60), start, teacher))
        return warnings(one, [data])

    assert said(ending("teacher", "teacher", 12.5, 64)) == []
    where = "on held_out (60 requests, seed 1)"
    assert said(ending("teacher", "teacher", 80, 25)) == [
        f"{where}, fewer of its responses end by themselves (90% before, 15% now; its teacher's: "
        "80%)",
        f"{where}, its responses went from 20 to 60 tokens (its teacher's: 25)",
    ]


def test_every_sentence_of_the_answer_names_one_data_set_and_its_interval():
    sets = [
        DataSet(name, (ending("promptkd", "run", 90, 20), ending("start", "start", 90, 20)))
        for name in ("first", "second")
    ]
    (closeness,) = answer([run()], sets)
    assert closeness == (
        "On first (60 requests, seed 1), the student is as far from its teacher as it was (KL "
        "from 0.500 to 0.500 nats per token, 95% interval 0.400 to 0.600)."
    )


def test_text_that_rouge_l_cannot_read_is_compared_by_its_unicode_form():
    base = evaluation(noisy(30), "a")
    scores = {
        "rouge_l": Score(mean=90.0, num_requests=20),
        "rouge_l_unicode": Score(mean=30.0, num_requests=60, interval_95=(29.0, 31.0)),
        "mine:length": Score(mean=3.0),
    }
    data = DataSet("d", (Model("a", "run", replace(base, scores=scores)),))
    assert headline(data) == "rouge_l_unicode"
    assert score_table(data, 1).headings[1:] == (
        "ROUGE-L",
        "ROUGE-L (Unicode words)",
        "mine:length",
    )
    assert "ROUGE-L (Unicode words) is 30.0 (95% interval" in answer([run("a")], [data])[0]
    assert score_table(data, 1).rows[0][1] == Cell("90.0", "20 requests")


def test_runs_that_cannot_be_told_apart_open_with_no_difference_shown():
    data = DataSet("held_out", (student("kd", noisy(30, 1)), student("gkd", noisy(30, 2))))
    said = answer([run("kd"), run("gkd")], [data])
    assert said[0].startswith("No difference shown between ")
    assert "no difference shown (" in said[1]


def test_a_run_clear_of_all_others_scores_best_and_a_tied_one_only_highest():
    base = noisy(30)
    models = [student("kd", base), student("gkd", [s + 3 for s in base])]
    runs = [run(model.label) for model in models]
    said = answer(runs, [DataSet("d", tuple(models))])[0]
    assert said == "gkd scores best of 2 runs on d (60 requests, seed 1)."
    models.append(student("akl", [s + 2.9 + g for s, g in zip(base, noisy(0, 7), strict=True)]))
    said = answer([*runs, run("akl")], [DataSet("d", tuple(models))])[0]
    assert "scores highest of 3 runs, with no difference shown to " in said


def test_digits_keep_three_of_them():
    assert [digits(v) for v in (0.0123456, 1.2, 26.0, 134.4)] == ["0.0123", "1.20", "26.0", "134"]
    assert digits(math.nan) == "not finite"
