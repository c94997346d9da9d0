"""Exposure bias in a study: measured once a run, kept, summed up over training seeds."""

import json
import math
import shutil
from pathlib import Path

import pytest

import runs
from promptkd.errors import UserError
from promptkd.study.file import study_from_dict
from studies import raw_study, save_models_and_data, study

ASKED = {"data": "held out", "num_examples": 4, "seeds": [10]}


def asking(pair: Path, output: Path, **changes) -> dict:
    raw = raw_study(pair, output, results=str(output.with_name("results")))
    raw["evaluation"]["exposure_bias"] = ASKED | changes
    return raw


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    pair = save_models_and_data(tmp_path_factory.mktemp("pair"))
    place = tmp_path_factory.mktemp("exposure")
    outcome = study(place, asking(pair, place / "study"))
    assert outcome.status == 0, outcome.stderr
    return pair, place


def test_every_run_is_measured_and_summed_up_by_hand(finished):
    _, place = finished
    found = {
        (method, seed): json.loads(
            (place / f"results/{method}/seed-{seed}/exposure_bias.json").read_text()
        )
        for method in ("kd", "gkd")
        for seed in (0, 1)
    }
    record = json.loads((place / "results/study.json").read_text())["exposure_bias"]
    last = record["lengths"]["excess_per_token"]
    assert last == min(len(own["per_token"]["steps"]) for own in found.values())
    for model in record["models"]:
        own = [found[model["label"], seed]["per_token"]["excess"][last - 1] for seed in (0, 1)]
        score = model["scores"]["excess_per_token"]
        assert score["by_seed"] == own
        assert score["mean"] == pytest.approx(sum(own) / 2)
        assert score["deviation_over_seeds"] == pytest.approx(abs(own[0] - own[1]) / math.sqrt(2))
        half = 12.7062 * abs(own[0] - own[1]) / 2  # Student's t of one degree of freedom
        assert score["interval_95"] == pytest.approx([score["mean"] - half, score["mean"] + half])
    whole = [own["excess"][-1] for own in found.values()]
    first, second = sum(whole[2:]) / 2, sum(whole[:2]) / 2  # gkd, kd: the baseline
    (row,) = (row for row in record["differences"] if row["score"] == "excess")
    assert (row["first"], row["second"]) == ("gkd", "kd")
    assert row["difference"] == pytest.approx(first - second)
    table = (place / "results/table.md").read_text().partition("## Exposure bias")[2]
    assert "| kd | 2 |" in table
    assert "Student's 95% interval over training seeds" in table
    figures = sorted(path.stem for path in (place / "results/figures").glob("*.svg"))
    assert {"exposure-bias-per-token", "exposure-bias-paper"} <= {*figures}
    assert not any(name.startswith(("survival", "kl-by")) for name in figures)  # four runs' each


def test_a_study_measures_it_once_and_again_where_it_asks_for_more(finished, tmp_path):
    pair, place = finished
    before = runs.everything(place / "study")
    assert study(tmp_path, asking(pair, place / "study")).status == 0
    biases = [name for name in before if name.endswith("exposure_bias.json")]
    assert len(biases) == 4
    after = runs.everything(place / "study")
    assert all(after[name] == before[name] for name in biases)
    shutil.copytree(place / "study", tmp_path / "study")
    assert study(tmp_path, asking(pair, tmp_path / "study", seeds=[10, 20])).status == 0
    again = json.loads((tmp_path / "study/kd/seed-0/exposure_bias.json").read_text())
    assert again["seeds"] == [10, 20]


def test_its_data_are_of_the_suite(tmp_path):
    with pytest.raises(UserError, match=r"exposure_bias.data is 'nothing'"):
        study_from_dict(asking(tmp_path, tmp_path / "study", data="nothing"))
