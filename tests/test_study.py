"""Methods x seeds: validated before anything runs, never done twice, summed up in one table."""

import contextlib
import gzip
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import runs
import tiny
from promptkd.cli import main
from promptkd.config import load_recipe
from promptkd.errors import UserError
from promptkd.evaluation.results import Evaluation, Prediction, Score
from promptkd.evaluation.statistics import mean_and_deviation
from promptkd.evaluation.two_levels import estimate, holm
from promptkd.study.file import ScoringSection, Study, load_study, planned_runs, study_from_dict
from promptkd.study.findings import Findings, Line
from promptkd.study.run import StudyScorer
from promptkd.study.table import Failure, study_table
from runs import Moment

EXPLODING = {"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": 1e30, "max_steps": 3}
SCORES = ("held out.json", "held out.predictions.jsonl")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl", 6)
    tiny.write_data(directory / "held_out.jsonl", 5)
    tiny.write_data(directory / "other.jsonl", 2)
    return directory


def raw_study(pair: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Two methods with two seeds, three steps each, scored on two data sets."""
    steps = {"max_steps": 3, "learning_rate": 5e-2}
    base = tiny.recipe(pair, data={"max_response_tokens": 12}, optimization=steps)
    del base["method"], base["output"]
    return {
        "base": base,
        "methods": {
            "kd": {"method": {"name": "kd"}},
            "gkd": {"method": {"name": "gkd"}, "optimization": {"learning_rate": 0.1}},
        },
        "seeds": [0, 1],
        "evaluation": {
            "suite": {"held out": f"{pair}/held_out.jsonl", "other": f"{pair}/other.jsonl"},
            "seeds": [10, 20],
            "num_examples": 4,
        },
        "baseline": "kd",
        "output": str(output),
        **changes,
    }


def write(place: Path, raw: dict[str, Any]) -> str:
    path = place / "study.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path)


def study(place: Path, raw: dict[str, Any]) -> runs.Outcome:
    """Run the command with a study file in ``place``."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as end,
    ):
        main(["study", write(place, raw)])
    assert isinstance(end.value.code, int)
    return runs.Outcome(end.value.code, stdout.getvalue(), stderr.getvalue())


def models_and_scores(output: Path) -> dict[str, tuple[str, int]]:
    """Every file of the runs, of the start and of the teacher."""
    everything = runs.everything(output).items()
    return {name: state for name, state in everything if re.search("seed-./|start/|teacher/", name)}


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

    (run / "summary.json").touch()
    scorer.score(str(run), run / "evaluation", teacher=True)
    after = runs.everything(run)
    for name in ("held out", "other"):
        made = f"evaluation/{name}.json"  # with the speed, which differs
        assert after[made][1] > before[made][1]
        key = f"evaluation/{name}.predictions.jsonl"
        assert after[key][0] == before[key][0]
        assert after[key][1] > before[key][1]


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


# -- what is refused before anything is written


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"methods": {"kd": {"method": {"name": "kd"}}, "p": {"method": {"lenght": 3}}}},
            "methods.p: unknown key 'method.lenght'; did you mean 'length'?",
        ),
        (
            {"methods": {"kd": {"method": {"name": "kdd"}}}, "baseline": "start"},
            "methods.kd: unknown method 'kdd'; did you mean 'kd'?",
        ),
        (
            {"evaluation": {"suite": {"a": "/nowhere/a.jsonl"}}},
            "/nowhere/a.jsonl",
        ),
    ],
)
def test_a_study_that_cannot_work_writes_nothing(pair, tmp_path, changes, complaint):
    outcome = study(tmp_path, raw_study(pair, tmp_path / "study", **changes))

    assert outcome.status == 1
    assert complaint in outcome.stderr
    assert not (tmp_path / "study").exists()


def test_several_processes_are_told_how_to_share_a_study(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = study(tmp_path, raw_study(pair, tmp_path / "study"))

    assert outcome.status == 1
    assert f"beside its directory ({tmp_path}/study/LABEL/seed-N.yaml)" in outcome.stderr
    assert not (tmp_path / "study").exists()


def test_what_a_run_would_find_before_its_first_step_is_found_before_the_first_run(pair, tmp_path):
    raw = raw_study(pair, tmp_path / "study")
    raw["base"]["data"]["train"] = str(tiny.write_data(tmp_path / "t.jsonl", 4, with_output=False))
    raw["methods"] = dict(reversed(raw["methods"].items()))
    outcome = study(tmp_path, raw)

    assert outcome.status == 1
    assert "methods.kd: The method 'kd' learns from reference responses" in outcome.stderr
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"baseline": "gdk"}, "baseline is 'gdk'; did you mean 'gkd'?"),
        ({"baselin": "kd"}, "unknown key 'baselin'; did you mean 'baseline'?"),
        ({"seed": 1}, "unknown key 'seed'; did you mean 'seeds'?"),
        ({"seeds": [1, 1]}, "'seeds' is [1, 1]: a seed stands there twice"),
        ({"seeds": []}, "'seeds' is []: "),
        (
            {"evaluation": {"suite": {"a": "a"}, "num_exampels": 3}},
            "unknown key 'evaluation.num_exampels'; did you mean 'num_examples'?",
        ),
        ({"evaluation": {"suite": {"a": 3}}}, "'evaluation.suite': 'a' is 3, which is no data"),
        ({"evaluation": {"suite": {"a/b": "a"}}}, "'a/b' names files of scores"),
        ({"evaluation": {}}, "'evaluation.suite' is missing from the study file"),
        ({"methods": {"kd": {}}}, "'methods.kd.method' is missing"),
        ({"methods": {"teacher": {"method": {"name": "kd"}}}}, "can't have this label"),
        ({"methods": {"a/b": {"method": {"name": "kd"}}}}, "can't have this label"),
        (
            {"methods": {"kd": {"method": {"name": "kd"}, "optimization": {"lr": 1}}}},
            "unknown key 'methods.kd.optimization.lr'; did you mean 'learning_rate'?",
        ),
        (
            {"methods": {"kd": {"method": {"name": "kd"}, "seed": 1}}},
            "'methods.kd.seed': the study decides it, by its 'seeds'",
        ),
        (
            {"methods": {"kd": {"method": {"name": "kd"}, "student": {"model": "other"}}}},
            "'methods.kd.student.model' is 'other', the base's is ",
        ),
        ({"base": {"student": {"model": "s"}}}, "'base.data' is missing from the recipe"),
        ({"base": {"seed": 1}}, "'base.seed': the study decides it, by its 'seeds'"),
        ({"base": "none.yaml"}, "Recipe none.yaml: No such file"),
    ],
)
def test_a_wrong_study_file_is_refused_when_read(pair, changes, complaint):
    with pytest.raises(UserError) as refusal:
        study_from_dict(raw_study(pair, Path("study"), **changes))
    assert complaint in str(refusal.value)


# -- the study file


def test_a_base_may_be_a_recipe_file_and_methods_change_parts_of_it(pair, tmp_path):
    recipe = tiny.recipe(pair, method={"name": "sft"}, output="runs/sft", seed=9)
    (tmp_path / "suite.yaml").write_text("a: a.jsonl\n")
    raw = raw_study(pair, Path("runs/study"), base=runs.write_recipe(tmp_path, recipe))
    raw["evaluation"] = {"suite": str(tmp_path / "suite.yaml")}
    loaded = load_study(write(tmp_path, raw))

    planned = planned_runs(loaded)
    assert [run.name for run in planned] == [
        "kd, seed 0",
        "gkd, seed 0",
        "kd, seed 1",
        "gkd, seed 1",
    ]
    kd, gkd = planned[0].recipe, planned[1].recipe
    assert (gkd.method.name, gkd.seed, gkd.output) == ("gkd", 0, "runs/study/gkd/seed-0")
    assert (kd.optimization.learning_rate, gkd.optimization.learning_rate) == (1e-2, 0.1)
    assert gkd.optimization.max_steps == recipe["optimization"]["max_steps"]
    assert loaded.evaluation.seeds == (10, 20, 30, 40, 50)
    assert loaded.evaluation.suite == {"a": ["a.jsonl"]}


def test_the_study_page_shows_every_key_with_its_default():
    page = (Path(__file__).parents[1] / "docs" / "study.md").read_text()
    (block,) = re.findall(r"(?ms)^```yaml study\n(.*?)^```$", page)
    written = yaml.safe_load(block)
    study_from_dict(written)
    assert written.keys() == Study.model_fields.keys()
    assert written["evaluation"].keys() == ScoringSection.model_fields.keys()
    free = {line.split(":")[0].strip() for line in block.splitlines() if "# example" in line}
    for section, model in ((written, Study), (written["evaluation"], ScoringSection)):
        for key, field in model.model_fields.items():
            if not field.is_required() and key not in free:
                value = section[key]
                assert (tuple(value) if isinstance(value, list) else value) == field.default, key


# -- the table


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
