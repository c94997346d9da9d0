"""A study's table: what it says of methods, and what it calls a difference."""

from promptkd.evaluation.results import Evaluation, Prediction, Score
from promptkd.evaluation.two_levels import holm
from promptkd.study.findings import Findings, Line
from promptkd.study.table import Failure, study_table


def line(label: str, *shifts: float, role: str = "run") -> Line:
    """Twenty requests; every training seed answers as the one before, better by its shift."""
    base = [10.0 + (7 * i) % 20 for i in range(20)]
    evaluations = []
    for shift in shifts:
        values = [value + shift for value in base]
        rows = tuple(
            Prediction(
                index=i,
                seed=1,
                request="q",
                response="a",
                references=("r",),
                num_tokens=1,
                ended=True,
                scores={"rouge_l": value},
            )
            for i, value in enumerate(values)
        )
        evaluation = Evaluation(
            name="data",
            model=label,
            data=("data.jsonl",),
            num_examples=20,
            template="none",
            max_request_tokens=24,
            decoding={},
            seeds=(1,),
            scores={"rouge_l": Score(mean=sum(values) / 20)},
            predictions=rows,
        )
        evaluations.append({"data": evaluation})
    seeds = tuple(range(len(shifts))) if role == "run" else ()
    return Line(label, role, seeds, tuple(evaluations))


def rows_of(*lines: Line, baseline: str) -> dict[str, tuple[str, ...]]:
    found = Findings.of(lines, ["data"], baseline)
    table = study_table(found, 2, [Failure("c", 1, "it is broken.")])
    assert table.caption.endswith("Failed: c, seed 1: it is broken.")
    return {
        row[0].text: tuple(f"{cell.text} {cell.detail}".strip() for cell in row[1:])
        for row in table.rows
    }


def test_only_a_difference_clear_of_zero_over_training_seeds_too_is_called_one():
    """Every request gains the same, so that only the training seeds' spread is left."""
    start = line("start", 0, role="start")
    lines = line("a", 2.9, 3.1), line("b", 1, 3), line("c", 2), start
    rows = rows_of(*lines, baseline="start")

    assert rows["a"][:2] == ("2", rows["a"][1])
    assert rows["a"][1].startswith("22.5 ± 0.1 [")
    assert rows["a"][2] == "+3.0 [1.7, 4.3] p 0.042"
    assert rows["b"][2] == "+2.0 [−10.7, 14.7] not established"
    assert rows["c"][:2] == ("1 of 2", rows["c"][1])
    assert rows["c"][2] == "+2.0 [2.0, 2.0] p < 0.001"
    assert "±" not in rows["c"][1]
    assert rows["start"] == ("–", rows["start"][1], "–", "–")


def test_verdicts_are_corrected_over_the_methods_and_not_over_start_and_teacher():
    start, teacher = line("start", -9, role="start"), line("teacher", 9, role="teacher")
    lines = line("a", 2.9, 3.1), line("b", 0.1, 0.3, 0), line("c", 5, 5.1), line("base", 0, 0.1)
    found = Findings.of([*lines, start, teacher], ["data"], "base")
    gains = {label: own["rouge_l"] for label, own in found.gains.items()}

    assert gains["start"].p_corrected is gains["teacher"].p_corrected is None
    methods = [gains[label] for label in "abc"]
    assert [g.p_corrected for g in methods] == holm([g.estimate.p_value for g in methods])
    assert {g.num_comparisons for g in methods} == {3}
    assert gains["b"].estimate.num_seeds == 2, "those that both were trained with"
    for gain in methods:
        assert gain.detectable == gain.estimate.detectable(3)
    caption = study_table(found, 2, []).caption
    assert "at level 0.05 / 3: " in caption


def test_a_baseline_whose_runs_all_failed_leaves_nothing_to_compare():
    rows = rows_of(line("a", 1, 3), line("b"), baseline="b")

    assert rows["b"] == ("0 of 2", "–", "–", "–")
    assert rows["a"][2] == "not comparable"


def test_a_method_is_bold_only_if_it_is_clear_of_every_other():
    lines = line("a", 2, 2.1), line("b", 0, 0.1), line("teacher", 9, role="teacher")
    table = study_table(Findings.of(lines, ["data"], "b"), 2, [])
    assert [row[0].text for row in table.rows if any(cell.best for cell in row)] == ["a"]
    equal = study_table(Findings.of([*lines, line("c", 2, 2.2)], ["data"], "b"), 2, [])
    assert not any(cell.best for row in equal.rows for cell in row)


def test_the_interval_of_a_share_ends_where_shares_end():
    found = Findings.of([line("a", 70, 40), line("b", 0, 1)], ["data"], "b")
    scores = found.scores["a"]
    assert scores is not None
    assert scores["rouge_l"].interval_95 == (0.0, 100.0)
