"""Methods x seeds: validated before anything runs, never done twice, summed up in one table."""

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import runs
import tiny
from promptkd.config import load_recipe
from promptkd.evaluation.statistics import mean_and_deviation
from promptkd.evaluation.two_levels import estimate
from promptkd.study.file import study_from_dict
from promptkd.study.run import StudyScorer
from runs import Moment
from studies import raw_study, save_models_and_data, study, write

EXPLODING = {"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": 1e30, "max_steps": 3}
SCORES = ("held out.json", "held out.predictions.jsonl")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    return save_models_and_data(tmp_path_factory.mktemp("pair"))


def models_and_scores(output: Path) -> dict[str, tuple[str, int]]:
    """Every file of the runs, of the start and of the teacher."""
    everything = runs.everything(output).items()
    return {name: state for name, state in everything if re.search("seed-./|start/|teacher/", name)}


def scores_of(run: dict[str, Any]) -> dict[str, Any]:
    return {name: state for name, state in run.items() if name.startswith("evaluation/")}


def timeless(table: str) -> str:
    """Without the seconds that training took."""
    return re.sub(r"\d+\.\d s", "", table)


def stored(directory: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    record = json.loads((directory / f"{name}.json").read_text())
    return record["scores"], runs.json_lines(directory / f"{name}.predictions.jsonl")


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory) -> tuple[Path, runs.Outcome]:
    place = tmp_path_factory.mktemp("finished")
    outcome = study(place, raw_study(pair, place / "study"))
    assert outcome.status == 0, outcome.stderr
    return place / "study", outcome


def test_every_run_is_a_run_directory_and_all_are_scored_alike(finished):
    output, _ = finished
    directories = [output / "start", output / "teacher"]
    for label, rate in (("kd", 5e-2), ("gkd", 0.1)):
        for seed in (0, 1):
            run = output / label / f"seed-{seed}"
            recipe = load_recipe(run / "recipe.yaml")
            assert (recipe.method.name, recipe.seed) == (label, seed)
            assert recipe.optimization.learning_rate == rate
            assert load_recipe(f"{run}.yaml") == recipe
            assert (run / "summary.json").is_file()
            directories.append(run / "evaluation")
    for directory in directories:
        for name, size in (("held out", 4), ("other", 2)):
            record = json.loads((directory / f"{name}.json").read_text())
            assert (record["seeds"], record["num_examples"]) == ([10, 20], size)
            has_kl = "reverse_kl_to_teacher" in record["scores"]
            assert has_kl == (directory.name != "teacher")


@pytest.mark.parametrize("name", ["held out", "other"])
def test_the_numbers_are_those_of_the_stored_evaluations(finished, name):
    output, _ = finished
    found = json.loads((output / "study.json").read_text())["data"][name]
    lines = {line["label"]: line for line in found["models"]}
    assert list(lines) == ["kd", "gkd", "start", "teacher"]

    lengths: dict[str, np.ndarray] = {}
    for label, line in lines.items():
        seeds = line["training_seeds"]
        assert seeds == ([0, 1] if label in ("kd", "gkd") else [])
        places = [output / label / f"seed-{seed}" / "evaluation" for seed in seeds]
        each = [stored(place, name) for place in places or [output / label]]
        for score, values in line["scores"].items():
            means = [scores[score]["mean"] for scores, _ in each]
            mean, deviation = mean_and_deviation(means)
            assert values["by_seed"] == means
            assert values["mean"] == pytest.approx(mean)
            assert values.get("deviation_over_seeds") == (deviation if seeds else None)
        lengths[label] = np.array([totals_of(rows, "num_tokens") for _, rows in each])
        interval = line["scores"]["response_length"]["interval_95"]
        assert interval == pytest.approx(list(estimate([lengths[label]]).interval_95))

    assert lines["kd"]["scores"]["response_length"]["deviation_over_seeds"] > 0
    compared = {(row["first"], row["score"]): row for row in found["differences"]}
    assert ("kd", "response_length") not in compared
    for label in ("gkd", "start", "teacher"):
        row = compared[label, "response_length"]
        sign = 1 if label == "gkd" else -1
        expected = estimate(*([lengths[k]] for k in (label, "kd")[::sign]))
        ends = sorted(sign * end for end in expected.interval_95)
        numbers = [row["difference"], row["low"], row["high"], row["p"]]
        assert numbers == pytest.approx([sign * expected.value, *ends, expected.p_value])
        assert row["p_corrected"] == (row["p"] if label == "gkd" else None)


def totals_of(rows: list[dict[str, Any]], field: str) -> list[tuple[float, float]]:
    """Per request, the sum over decoding seeds and their number."""
    by_request: dict[int, list[float]] = {}
    for row in rows:
        by_request.setdefault(row["index"], []).append(row[field])
    return [(sum(own), len(own)) for _, own in sorted(by_request.items())]


def test_over_all_data_sets_a_method_has_the_mean_of_its_scores(finished):
    record = json.loads((finished[0] / "study.json").read_text())
    means = [
        line["scores"]["rouge_l"]["mean"]
        for found in (*record["data"].values(), record["over_all"])
        for line in found["models"]
        if line["label"] == "gkd"
    ]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2)
    (table, *_) = (finished[0] / "table.md").read_text().split("## ")[1:]
    assert table.startswith("mean of 2 data sets")


def test_the_table_is_printed_and_written_with_those_numbers(finished):
    output, outcome = finished
    found = json.loads((output / "study.json").read_text())["data"]["held out"]
    gkd = next(line["scores"] for line in found["models"] if line["label"] == "gkd")
    length = gkd["response_length"]
    low, high = length["interval_95"]
    value = f"{length['mean']:.1f} ± {length['deviation_over_seeds']:.1f}"
    cell = f"{value} [{low:.1f}, {high:.1f}]"

    printed = [line for line in outcome.stdout.splitlines() if line.startswith("gkd ")]
    assert cell in printed[1]
    markdown = (output / "table.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| gkd | 2 |")]
    assert len(rows) == 3
    assert cell in rows[1]
    assert rows[1].endswith(" tokens |")
    headings = (
        "| Model | Seeds | ROUGE-L | ROUGE-L − kd | KL to teacher, nats/token | KL to teacher"
    )
    assert markdown.count(headings) == 3
    assert "| Repeated 4-grams, % | Training |" in markdown
    assert "held out (4 requests, seeds 10 and 20); temperature 1" in markdown
    latex = (output / "table.tex").read_text()
    assert latex.count(r"\begin{tabular}{lrrrrrrrrr}") == 3
    assert value.replace("±", r"$\pm$") in latex


def test_the_terminal_says_which_run_of_how_many_is_going_on(finished):
    output, outcome = finished
    numbered = [line for line in outcome.stdout.splitlines() if " of 6: " in line]
    assert [line.partition(", ")[0] for line in numbered] == [
        "1 of 6: scores of the start",
        "2 of 6: scores of the teacher",
        "3 of 6: kd",
        "4 of 6: gkd",
        "5 of 6: kd",
        "6 of 6: gkd",
    ]
    assert numbered[4] == f"5 of 6: kd, seed 1, in {output}/kd/seed-1"
    last = outcome.stdout.splitlines()[-2:]
    assert last == [f"report: {output}/report.html", f"study: {output}"]
    assert "A study of 2 methods, 2 training seeds each" in (output / "report.html").read_text()


def test_the_same_command_again_makes_nothing_anew(finished, pair):
    output, _ = finished
    before, table = models_and_scores(output), (output / "table.md").read_text()
    assert len(before) > 40

    outcome = study(output.parent, raw_study(pair, output))

    assert outcome.status == 0, outcome.stderr
    assert models_and_scores(output) == before
    assert (output / "table.md").read_text() == table


def test_a_study_that_was_killed_goes_on_and_equals_the_uninterrupted_one(finished, pair, tmp_path):
    whole, _ = finished
    raw, output = raw_study(pair, tmp_path / "study"), tmp_path / "study"
    second = Moment("os.rename", str(output / "gkd" / "seed-0" / ".writing-student"))
    killed = runs.Command(["study", write(tmp_path, raw)], tmp_path / "out", dies_at=second)
    assert killed.wait(300).status == -9
    first = runs.everything(output / "kd" / "seed-0")
    assert "evaluation/other.json" in first
    assert not (output / "gkd" / "seed-0" / "student").exists()

    outcome = study(tmp_path, raw)

    assert outcome.status == 0, outcome.stderr
    assert runs.everything(output / "kd" / "seed-0") == first
    for name in ("table.md", "table.tex"):
        assert timeless((output / name).read_text()) == timeless((whole / name).read_text())
    for run in ("kd/seed-0", "kd/seed-1", "gkd/seed-0", "gkd/seed-1"):
        assert runs.result(output / run) == runs.result(whole / run)


# -- what is kept of it


@pytest.fixture(scope="module")
def kept(finished, pair, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The finished study, asked to keep its results elsewhere too."""
    place = tmp_path_factory.mktemp("kept") / "results"
    raw = raw_study(pair, finished[0], results=str(place))
    outcome = study(place.parent, raw)
    assert outcome.status == 0, outcome.stderr
    return raw, place


def tables_and_figures(place: Path) -> dict[str, bytes]:
    found = [*place.glob("table.*"), *place.glob("figures/*"), *place.glob("tables/*")]
    return {str(path.relative_to(place)): path.read_bytes() for path in found}


def test_tables_and_figures_are_made_again_of_what_is_kept_alone(kept, finished, tmp_path):
    raw, place = kept
    before = tables_and_figures(place)
    assert {"table.md", "table.tex", "figures/differences-other.svg"} < before.keys()
    assert any(name.startswith("figures/") and "loss" in name for name in before)
    shutil.copytree(place, tmp_path / "results")
    for path in (tmp_path / "results").glob("table*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    moved = raw | {"results": str(tmp_path / "results"), "output": str(tmp_path / "nothing")}
    file = write(tmp_path, moved)

    outcome = runs.run(["study", file, "--table-only"], tmp_path / "out")

    assert outcome.status == 0, outcome.stderr
    assert tables_and_figures(tmp_path / "results") == before
    assert not (tmp_path / "nothing").exists()
    own = (finished[0] / "table.md").read_text()
    assert (tmp_path / "results" / "table.md").read_text() == own


def test_no_request_no_reference_and_no_weights_are_kept(kept, pair):
    _, place = kept
    responses = gzip.decompress(
        (place / "gkd/seed-0/evaluation/held out.predictions.jsonl.gz").read_bytes()
    ).decode()
    rows = [json.loads(line) for line in responses.splitlines()]
    assert len(rows) == 8
    assert {"index", "seed", "response", "num_tokens", "ended", "rouge_l"} < rows[0].keys()
    assert {"request", "references"} & rows[0].keys() == set()
    files = {path.name for path in place.rglob("*") if path.is_file()}
    assert not any(name.endswith((".safetensors", ".pt", "predictions.jsonl")) for name in files)
    assert "it is 1!" not in (place / "report.html").read_text()


def test_kept_responses_are_scored_anew_by_the_data_of_the_study(kept, tmp_path):
    raw, place = kept
    shutil.copytree(place, tmp_path / "results")
    (scores,) = (tmp_path / "results" / "kd" / "seed-1" / "evaluation").glob("other.*.gz")
    rows = [json.loads(r) for r in gzip.decompress(scores.read_bytes()).decode().splitlines()]
    spoilt = "".join(json.dumps(row | {"rouge_l": 77.0}) + "\n" for row in rows)
    scores.write_bytes(gzip.compress(spoilt.encode()))
    file = write(tmp_path, raw | {"results": str(tmp_path / "results")})

    again = runs.run(["study", file, "--table-only", "--rescore"], tmp_path / "out")

    assert again.status == 0, again.stderr
    assert (tmp_path / "results/table.md").read_text() == (place / "table.md").read_text()


def test_other_data_are_refused_for_scoring_anew(kept, tmp_path):
    raw, _ = kept
    other = str(tiny.write_data(tmp_path / "more.jsonl", 3))
    Path(other).write_text(Path(other).read_text().replace("it is", "so is"))
    suite = {"held out": raw["evaluation"]["suite"]["held out"], "other": other}
    file = write(tmp_path, raw | {"evaluation": raw["evaluation"] | {"suite": suite}})

    outcome = runs.run(["study", file, "--table-only", "--rescore"], tmp_path / "out")

    assert outcome.status == 1
    assert "doesn't hold the references that 'other' was scored by" in outcome.stderr


def test_a_study_says_how_large_it_would_have_to_be(kept, tmp_path):
    file = write(tmp_path, kept[0])
    outcome = runs.run(["study", file, "--power", "--detect", "3"], tmp_path / "out")

    assert outcome.status == 0, outcome.stderr
    assert "standard deviations of rouge_l, over held out, other" in outcome.stdout
    assert "kd: between training seeds " in outcome.stdout
    assert "at level 0.05 / 1" in outcome.stdout
    assert "*: tells 3.00 apart" in outcome.stdout


def test_nothing_stored_makes_no_table(pair, tmp_path):
    file = write(tmp_path, raw_study(pair, tmp_path / "study"))
    for option in ("--table-only", "--power"):
        outcome = runs.run(["study", file, option], tmp_path / "out")
        assert outcome.status == 1
        assert "study holds no scores of all of the study's data sets" in outcome.stderr
    assert not (tmp_path / "study").exists()


def test_scores_older_than_the_end_of_training_are_made_again(finished, pair):
    run = finished[0] / "kd" / "seed-0"
    scorer = StudyScorer(study_from_dict(raw_study(pair, finished[0])))
    before = runs.everything(run)
    scorer.score(str(run), run / "evaluation", teacher=True)
    assert runs.everything(run) == before

    (run / "summary.json").touch()  # of the very weights: nothing to do
    scorer.score(str(run), run / "evaluation", teacher=True)
    assert scores_of(runs.everything(run)) == scores_of(before)

    weights = load_file(run / "student" / "model.safetensors")
    save_file({key: 1.5 * own for key, own in weights.items()}, run / "student/model.safetensors")
    (run / "summary.json").touch()
    scorer.score(str(run), run / "evaluation", teacher=True)
    after = runs.everything(run)
    for name in ("held out", "other"):
        for made in (f"evaluation/{name}.json", f"evaluation/{name}.predictions.jsonl"):
            assert after[made][0] != before[made][0]


def test_other_lengths_may_be_asked_of_the_same_runs(finished, pair, tmp_path):
    raw = raw_study(pair, finished[0])
    raw["evaluation"] |= {"max_request_tokens": 3, "max_response_tokens": 2}
    scorer = StudyScorer(study_from_dict(raw))
    scores = scorer.score(str(finished[0] / "kd" / "seed-0"), tmp_path, teacher=True)
    scorer.score(str(finished[0] / "kd" / "seed-0"), tmp_path, teacher=True)
    record, rows = stored(tmp_path, "other")

    assert scores["other"].max_request_tokens == 3
    assert scores["other"].num_cut_requests > 0
    assert record["response_length"]["mean"] <= 2
    assert len(rows) == 2 * 2  # once for each seed, not twice


def test_a_changed_recipe_is_refused_with_what_to_do(finished, pair):
    output, _ = finished
    raw, before = raw_study(pair, output), runs.everything(output)
    raw["methods"]["gkd"]["optimization"]["learning_rate"] = 0.5

    outcome = study(output.parent, raw)

    assert outcome.status == 1
    assert f"gkd, seed 0: {output}/gkd/seed-0 belongs to a run of a different" in outcome.stderr
    assert "optimization.learning_rate 0.1 -> 0.5" in outcome.stderr
    assert "give the method as it is now another label" in outcome.stderr
    assert runs.everything(output) == before


def test_a_run_that_fails_leaves_the_others_and_only_changed_rows_are_scored_again(pair, tmp_path):
    data = tiny.write_data(tmp_path / "held_out.jsonl", 2)
    output = tmp_path / "study"
    raw = raw_study(pair, output, seeds=[3])
    raw["methods"] = {
        "explodes": {"method": {"name": "kd"}, "optimization": EXPLODING},
        "gkd": {"method": {"name": "gkd"}},
    }
    raw["evaluation"] = {"suite": {"held out": str(data)}, "seeds": [1]}
    raw["baseline"] = "start"
    outcome = study(tmp_path, raw)

    assert outcome.status == 1
    assert "promptkd: 1 of 2 runs failed: explodes seed 3" in outcome.stderr
    record = json.loads((output / "study.json").read_text())
    (failure,) = record["failed"]
    assert (failure["label"], failure["seed"]) == ("explodes", 3)
    assert "not finite" in failure["reason"] or "gradient" in failure["reason"]
    table = (output / "table.md").read_text()
    assert f"Failed: explodes, seed 3: {failure['reason']}" in table.replace("\\", "")
    assert "| explodes | 0 of 1 | – | – | – | – | – |" in table
    assert "| gkd | 1 |" in table
    assert "± " not in table.partition("held out (")[0].replace("±0.0 [", "")
    assert (output / "report.html").is_file()

    before = models_and_scores(output)
    data.write_text(data.read_text().replace("it is", "so is"))
    raw["methods"].pop("explodes")
    assert study(tmp_path, raw).status == 0
    after = models_and_scores(output)
    anew = {name for name in before if after[name] != before[name]}
    places = ("gkd/seed-3/evaluation", "start", "teacher")
    assert anew == {f"{place}/{name}" for place in places for name in SCORES}
