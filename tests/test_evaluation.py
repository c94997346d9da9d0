"""A score carries its data, decoding, seeds and counts; validation and test decode alike."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from promptkd.data import read_examples
from promptkd.errors import UserError
from promptkd.evaluation.comparison import compare
from promptkd.evaluation.evaluate import evaluate
from promptkd.evaluation.metrics import exact_match, rouge_l
from promptkd.evaluation.rescoring import rescore
from promptkd.evaluation.results import read_evaluations
from promptkd.evaluation.statistics import bootstrap_interval, paired_difference
from promptkd.evaluation.suites import read_suite, suite_of_files
from promptkd.generation.sampling import GenerationSettings
from promptkd.training.validation import SEED as VALIDATION_SEED


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("finished")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl")
    tiny.write_data(directory / "valid.jsonl", 7)
    raw = tiny.recipe(
        directory,
        data={
            "validation": str(directory / "valid.jsonl"),
            "max_request_tokens": 7,
            "max_response_tokens": 10,
        },
        sampling={"temperature": 0.7, "top_k": 40},
        optimization={"max_steps": 2},
        evaluation={"every_steps": 1, "num_examples": 5, "metric": "reverse_kl_to_teacher"},
    )
    return runs.train(raw), raw


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    run, raw = finished
    output = tmp_path_factory.mktemp("scores")
    return evaluate(run, raw["data"]["validation"], seeds=(3, 4), output=output), output


def predictions(output: Path, name: str = "valid") -> list[dict[str, Any]]:
    return runs.json_lines(output / f"{name}.predictions.jsonl")


def without_kl(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What doesn't depend on rounding."""
    return [{k: v for k, v in row.items() if k != "reverse_kl_to_teacher"} for row in rows]


def test_scores_carry_all_that_is_needed_to_rerun_them(finished, evaluated):
    run, raw = finished
    result, output = evaluated

    assert json.loads((output / "valid.json").read_text()) == result
    assert result["model"] == str(run)
    assert result["teacher"] == raw["teacher"]["model"]
    assert result["data"] == [raw["data"]["validation"]]
    assert (result["num_examples"], result["num_cut_requests"]) == (7, 2)
    assert (result["template"], result["max_request_tokens"]) == ("none", 7)
    assert (
        result["decoding"] == GenerationSettings(10, temperature=0.7, top_p=1.0, top_k=40).to_dict()
    )
    assert result["seeds"] == [3, 4]
    for name in ("rouge_l", "exact_match", "response_length", "ended", "reverse_kl_to_teacher"):
        assert len(result["scores"][name]["by_seed"]) == 2
    low, high = result["scores"]["rouge_l"]["interval_95"]
    assert low <= result["scores"]["rouge_l"]["mean"] <= high


def test_saved_predictions_scored_again_give_the_saved_scores(evaluated):
    result, output = evaluated
    rows = predictions(output)
    assert [(row["seed"], row["index"]) for row in rows] == [
        (seed, index) for seed in (3, 4) for index in range(7)
    ]

    for name, metric in (("rouge_l", rouge_l), ("exact_match", exact_match)):
        again = [metric(row["response"], row["references"]) for row in rows]
        assert again == [row[name] for row in rows]
        by_seed = [sum(again[:7]) / 7, sum(again[7:]) / 7]
        assert result["scores"][name]["by_seed"] == pytest.approx(by_seed)
        assert result["scores"][name]["mean"] == pytest.approx(sum(by_seed) / 2)
        by_example = [(a + b) / 2 for a, b in zip(again[:7], again[7:], strict=True)]
        interval = bootstrap_interval(by_example)
        assert result["scores"][name]["interval_95"] == pytest.approx(list(interval))
    mean_length = sum(row["num_tokens"] for row in rows) / 14
    assert result["scores"]["response_length"]["mean"] == pytest.approx(mean_length)


def test_the_same_seed_gives_the_same_predictions_in_any_company(finished, evaluated, tmp_path):
    run, raw = finished
    _, output = evaluated
    data = raw["data"]["validation"]
    evaluate(run, data, seeds=(4,), output=tmp_path / "alone", teacher="")
    evaluate(run, data, seeds=(4,), num_examples=2, output=tmp_path / "few", teacher="")

    of_seed_4 = without_kl([row for row in predictions(output) if row["seed"] == 4])
    assert predictions(tmp_path / "alone") == of_seed_4
    assert predictions(tmp_path / "few") == of_seed_4[:2]
    of_seed_3 = [row["response"] for row in predictions(output) if row["seed"] == 3]
    assert of_seed_3 != [row["response"] for row in of_seed_4]


def test_validation_in_training_is_evaluation_of_the_same_student(finished, tmp_path):
    run, raw = finished
    best = json.loads((run / "summary.json").read_text())["best"]
    result = evaluate(
        run,
        raw["data"]["validation"],
        seeds=(VALIDATION_SEED,),
        num_examples=raw["evaluation"]["num_examples"],
        output=tmp_path,
    )

    found = {name: value["mean"] for name, value in result["scores"].items()}
    assert found == pytest.approx(best["scores"], rel=1e-6)
    samples = [s for s in runs.json_lines(run / "samples.jsonl") if s["step"] == best["step"]]
    rows = predictions(tmp_path)[: len(samples)]
    assert without_kl([{**row, "step": best["step"]} for row in rows]) == without_kl(samples)
    kls = [[row["reverse_kl_to_teacher"] for row in of] for of in (rows, samples)]
    assert kls[0] == pytest.approx(kls[1], rel=1e-5)


def test_a_bare_model_is_asked_with_the_defaults_and_needs_a_place(finished, tmp_path):
    _, raw = finished
    model, data = raw["student"]["model"], raw["data"]["validation"]
    result = evaluate(
        model, data, seeds=(1,), num_examples=1, max_response_tokens=4, output=tmp_path
    )

    assert result["decoding"] == GenerationSettings(4).to_dict()
    assert (result["template"], result["max_request_tokens"]) == ("alpaca", 256)
    assert result["teacher"] is None
    assert "reverse_kl_to_teacher" not in result["scores"]
    with pytest.raises(UserError, match="say where its scores go: --output DIR"):
        evaluate(model, data, seeds=(1,), num_examples=1, max_response_tokens=4)


def test_a_run_whose_teacher_has_another_tokenizer_is_scored_without_it(tmp_path):
    tiny.save_pair(tmp_path)
    teacher = tiny.tokenizer()
    teacher.add_tokens(["say"])
    teacher.save_pretrained(tmp_path / "teacher")
    data = str(tiny.write_data(tmp_path / "train.jsonl", 4))
    raw = tiny.recipe(tmp_path, method={"name": "seqkd"}, optimization={"max_steps": 1})
    result = evaluate(runs.train(raw), data, seeds=(1,), num_examples=2)

    assert result["teacher"] is None
    assert {"rouge_l", "cross_entropy"} <= result["scores"].keys()


def test_requests_alone_are_answered_but_not_compared(finished, tmp_path):
    run, _ = finished
    data = tiny.write_data(tmp_path / "d.jsonl", 3, with_output=False)
    result = evaluate(run, str(data), seeds=(1,), output=tmp_path)

    assert result["scores"].keys() == {"response_length", "ended", "reverse_kl_to_teacher"}
    assert "rouge_l" not in predictions(tmp_path, "d")[0]


def test_a_run_without_a_student_is_refused(finished, tmp_path):
    run, raw = finished
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="has no student/ yet"):
        evaluate(tmp_path, raw["data"]["validation"])


def test_a_smaller_evaluation_never_replaces_a_larger_one(finished, tmp_path):
    run, raw = finished
    data = raw["data"]["validation"]
    whole = evaluate(run, data, seeds=(1,), output=tmp_path)
    with pytest.raises(UserError, match="would replace a larger one"):
        evaluate(run, data, seeds=(1,), num_examples=2, output=tmp_path)
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text()) == whole
    evaluate(run, data, seeds=(1, 2), output=tmp_path)
    assert json.loads(kept.read_text())["seeds"] == [1, 2]


def test_the_deviation_is_over_seeds_and_the_interval_over_examples(evaluated):
    result, output = evaluated
    first, second = result["scores"]["response_length"]["by_seed"]
    deviation = result["scores"]["response_length"]["deviation_over_seeds"]

    assert deviation == pytest.approx(abs(first - second) / math.sqrt(2))
    assert len(read_examples(result["data"])) == len({r["index"] for r in predictions(output)})


def test_a_suite_scores_each_data_set_as_if_alone(finished, evaluated, tmp_path):
    run, raw = finished
    data = raw["data"]["validation"]
    (tmp_path / "suite.yaml").write_text(f"held out: {data}\nall: [{data}, {data}]\n")
    suite = read_suite(tmp_path / "suite.yaml")
    assert suite == {"held out": [data], "all": [data, data]}

    results = evaluate(run, suite, seeds=(3, 4), output=tmp_path)

    alone, output = evaluated
    differ = {"data": None, "size_and_speed": None}
    assert results["held out"] | differ == alone | differ
    assert predictions(tmp_path, "held out") == predictions(output)
    assert results["all"]["num_examples"] == 2 * alone["num_examples"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no keys"),
        ("a: 3", "'a' is 3, which is no data"),
        ("a: []", r"'a' is \[\], which is no data"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_suite_that_is_none_is_refused(tmp_path, text, complaint):
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_suite(tmp_path / "suite.yaml")


def test_files_of_one_name_are_refused_before_one_replaces_the_other():
    assert suite_of_files(["a/x.jsonl", "y.jsonl"]) == {"x": ["a/x.jsonl"], "y": ["y.jsonl"]}
    with pytest.raises(UserError, match=r"a/x.jsonl and b/x.jsonl would both be scored as 'x'"):
        suite_of_files(["a/x.jsonl", "b/x.jsonl"])


def test_rescoring_mends_scores_and_keeps_what_needs_models(evaluated, tmp_path):
    result, output = evaluated
    rows = predictions(output)
    for row in rows:
        row["rouge_l"] = -1.0
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "valid.predictions.jsonl").write_text(lines)
    (tmp_path / "valid.json").write_text((output / "valid.json").read_text())

    assert rescore(tmp_path) == {"valid": result}

    assert predictions(tmp_path) == predictions(output)
    with pytest.raises(UserError, match="holds no predictions"):
        rescore(tmp_path / "nowhere")


def test_a_comparison_pairs_requests_and_refuses_unlike_evaluations(finished, evaluated, tmp_path):
    run, raw = finished
    _, output = evaluated
    assert all((row.difference, row.low, row.high) == (0, 0, 0) for row in compare(output, output))
    hotter = tmp_path / "hotter"
    for place in ("one", "other"):
        temperature = 0.7 if place == "one" else 0.0
        evaluate(
            run,
            raw["data"]["validation"],
            seeds=(3, 4),
            temperature=temperature,
            output=tmp_path / place,
        )
    with pytest.raises(UserError, match="Nothing to compare"):
        compare(tmp_path / "one", tmp_path / "other")
    with pytest.raises(UserError, match="is no directory"):
        compare(output, hotter)
    rows = {row.score: row for row in compare(output, tmp_path / "one")}
    assert rows["rouge_l"].num_requests == 7


def test_a_comparison_is_the_paired_bootstrap_of_means_over_seeds(evaluated, tmp_path):
    result, output = evaluated
    rows = predictions(output)
    for row in rows:
        row["rouge_l"] += 2.0 + row["index"]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "valid.predictions.jsonl").write_text(lines)
    (tmp_path / "valid.json").write_text(json.dumps(result))
    row = next(row for row in compare(tmp_path, output) if row.score == "rouge_l")
    assert row.difference == pytest.approx(2 + 3)  # the mean of 0 .. 6
    gap = paired_difference([(2.0 + i, 1) for i in range(7)], [(0, 1)] * 7)
    assert row.low == pytest.approx(gap[1])
    assert 2 < row.low < 5 < row.high < 8


def test_metrics_asked_for_are_computed_kept_and_computed_again(finished, tmp_path):
    run, raw = finished
    data = raw["data"]["validation"]
    asked = ("final_answer", "repeated_4_grams", "distinct_1", "exact_match@2")
    result = evaluate(run, data, seeds=(3, 4), output=tmp_path, teacher="", metrics=asked)
    scores = result["scores"]
    assert set(asked) <= scores.keys()
    assert scores["exact_match@2"]["num_requests"] == 7
    assert len(scores["distinct_1"]["by_seed"]) == 2
    assert "final_answer" in predictions(tmp_path)[0]
    assert rescore(tmp_path)["valid"]["scores"] == scores
    with pytest.raises(UserError, match="2 seeds give 2"):
        evaluate(run, data, seeds=(3, 4), output=tmp_path, metrics=["exact_match@3"])


def test_several_files_from_python_are_scored_each_alone(finished, tmp_path):
    run, _ = finished
    files = [str(tiny.write_data(tmp_path / name, 2)) for name in ("a.jsonl", "b.jsonl")]
    results = evaluate(run, files, seeds=(1,), output=tmp_path / "out", teacher="")
    assert {name: result["data"] for name, result in results.items()} == {
        "a": files[:1],
        "b": files[1:],
    }


def test_rescoring_leaves_out_damaged_lines_and_says_so(evaluated, tmp_path):
    result, output = evaluated
    kept = (output / "valid.predictions.jsonl").read_text().replace("say 0", "say\u2028 0")
    (tmp_path / "valid.predictions.jsonl").write_text(kept + '{"index": 9')
    (tmp_path / "valid.json").write_text(json.dumps(result))
    notes: list[str] = []
    assert rescore(tmp_path, notes)["valid"]["scores"]["rouge_l"] == result["scores"]["rouge_l"]
    assert "damaged lines are left out (line 15)" in notes[0]


def test_scores_of_files_from_before_are_read(evaluated, tmp_path):
    result, output = evaluated
    rows = [{**row, "rouge_l": None} for row in predictions(output)]
    (tmp_path / "valid.predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "valid.json").write_text(json.dumps(result))
    (found,) = read_evaluations(tmp_path)
    assert "rouge_l" not in found.predictions[0].scores
    assert found.by_example("exact_match").keys() == set(range(7))


def test_the_distance_to_the_teacher_is_a_mean_over_tokens_with_an_interval(evaluated):
    result, output = evaluated
    rows = predictions(output)
    score = result["scores"]["reverse_kl_to_teacher"]
    for seed, mean in zip((3, 4), score["by_seed"], strict=True):
        own = [row for row in rows if row["seed"] == seed]
        total = sum(row["num_tokens"] * row["reverse_kl_to_teacher"] for row in own)
        assert mean == pytest.approx(total / sum(row["num_tokens"] for row in own))
    low, high = score["interval_95"]
    assert low < score["mean"] < high
