"""The report: reading runs, its tables and files, and its page in a browser."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from promptkd.api import train
from promptkd.config import recipe_from_dict
from promptkd.errors import UserError
from promptkd.evaluation.evaluate import evaluate
from promptkd.report.cells import Cell, Table
from promptkd.report.cost import cost_of_steps
from promptkd.report.data import DataSet, Model, Named, Run, data_sets, read_run
from promptkd.report.places import read_subject
from promptkd.report.report import report
from promptkd.report.responses import embedded, response_sets
from promptkd.report.tables import score_table
from report_browser import CHROMIUM, HOW_TO_INSTALL, opened
from scored import evaluation, noisy, predictions, run, student

HOSTILE = "</script><img src=x onerror=alert(1)> <!-- {{ 7*7 }} & \"'\u2028 $\\x_1$ ]]>"


def test_the_table_prints_only_the_marked_run_bold_and_never_the_teacher():
    base = noisy(30)
    models = (
        student("kd", base),
        student("promptkd", [s + 3 for s in base]),
        Model("teacher", "teacher", evaluation([s + 9 for s in base], "teacher")),
    )
    table = score_table(DataSet("held_out", models), 1)
    assert [row[0].text for row in table.rows if any(cell.best for cell in row)] == ["promptkd"]
    assert "ROUGE-L − promptkd" in table.headings
    assert "**33" in table.to_markdown().replace(str(round(3 + sum(base) / 60)), "33")


def test_the_generation_of_runs_of_earlier_versions_is_part_of_their_cost():
    times = {"seconds_learning": 2.0, "seconds_writing": 6.0}
    took = cost_of_steps([{"step": 1, **times}, {"step": 2, **times}])
    assert took is not None
    assert (took.seconds_generation, took.seconds_learning) == (12.0, 4.0)


def test_embedded_text_cannot_leave_its_script_element():
    text = embedded([HOSTILE])
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == [HOSTILE]


def test_table_files_escape_what_markdown_and_latex_would_interpret():
    table = Table(
        "t", "t", "50% of a_b", ("a|b", "c&d"), ((Cell("x_1"), Cell("5", "[1, 2]", True)),)
    )
    assert r"a\|b" in table.to_markdown()
    assert "**5** [1, 2]" in table.to_markdown()
    latex = table.to_latex()
    assert r"x\_1 & \textbf{5} {\scriptsize [1, 2]} \\" in latex
    assert r"\caption{50\% of a\_b}" in latex


def test_models_are_recognised_by_what_was_evaluated():
    recipe = {"student": {"model": "runs/start"}, "teacher": {"model": "org/teacher"}}
    one = Run(
        Path("runs/one"),
        "one",
        recipe,
        evaluations=tuple(evaluation([1.0, 2.0], m) for m in ("runs/one", "org/teacher")),
    )
    others = [("start", "runs/start"), ("scores", "runs/x"), ("warm-up", "runs/y")]
    [data] = data_sets([one], [Named(d, evaluation([1.0, 2.0], m)) for d, m in others])
    assert [(m.label, m.role) for m in data.models] == [
        ("one", "run"),
        ("start", "start"),
        ("x", "other"),
        ("warm-up", "other"),
        ("teacher", "teacher"),
    ]


def test_evaluations_under_other_settings_share_no_table():
    other = evaluation([1.0, 2.0], "b")
    other.decoding["temperature"] = 0.0
    sets = data_sets([run("a", evaluations=(evaluation([1.0, 2.0], "a"), other))])
    assert [len(data.models) for data in sets] == [1, 1]


def test_a_browser_that_would_be_too_large_says_what_it_leaves_out():
    long = [replace(p, response="x" * 4000) for p in predictions([1.0] * 50, seeds=(1, 2))]
    whole = replace(evaluation([1.0], name="d"), seeds=(1, 2), predictions=tuple(long))
    data = DataSet("d", (Model("a", "run", whole),))
    [entry] = response_sets([], [data], max_bytes=100_000)
    assert len(embedded(entry["items"])) <= 110_000
    assert "Only seed 1 is shown." in entry["note"]
    assert f"{len(entry['items'])} of 50 requests are shown" in entry["note"]


def test_the_common_part_of_requests_is_taken_off_and_named():
    frame = "system\nYou are a helpful assistant.\nuser\nsay {}\nassistant\n"
    long = [replace(p, request=frame.format(p.index)) for p in predictions([1.0, 2.0])]
    data = DataSet("d", (Model("a", "run", replace(evaluation([1.0]), predictions=tuple(long))),))
    [entry] = response_sets([], [data])
    assert [item["request"] for item in entry["items"]] == ["say 0", "say 1"]
    assert "You are a helpful assistant." in entry["note"]


def write_run(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True)
    recipe = tiny.recipe(directory)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (directory / "environment.json").write_text("{}")  # it has begun
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_metrics_are_read_around_a_damaged_line_and_the_page_says_so(tmp_path):
    good = "".join(json.dumps({"step": s, "loss": 1.0 / s}) + "\n" for s in (1, 2))
    path = write_run(tmp_path / "r", metrics__jsonl=f"{{broken\n{good}{{")
    read = read_run(path, "r")
    assert [row["step"] for row in read.steps] == [1, 2]
    assert any("2 damaged lines are left out (line 1, 4)" in note for note in read.notes)
    assert any("not finished: it stands at step 2 of 3" in note for note in read.notes)
    assert "2 damaged lines are left out" in report(path).read_text()


def test_a_run_with_nothing_but_its_recipe_has_a_report(tmp_path):
    page = report(write_run(tmp_path / "bare"))
    text = page.read_text()
    assert "its distance to a teacher is unknown" in text
    assert "was not evaluated on held-out data" in text
    assert 'id="exposure"' not in text


def test_a_directory_that_is_no_run_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match=r"neither a run .* promptkd train"):
        read_subject([tmp_path])


def test_several_runs_without_an_output_are_refused(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(UserError, match="--output DIR"):
        report(runs)


def test_importing_and_making_a_report_imports_no_torch(tmp_path):
    path = write_run(tmp_path / "r")
    code = (
        "import sys; from promptkd.report.report import report; "
        f"report({str(path)!r}); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """The page of two tiny runs, with their start and teacher, and hostile text in a response."""
    directory = tmp_path_factory.mktemp("report")
    start, teacher = tiny.save_pair(directory)
    data = tiny.write_data(directory / "train.jsonl")
    runs = []
    for name in ("promptkd", "kd"):
        recipe = tiny.recipe(
            directory,
            method={"name": name},
            data={"validation": str(data)},
            evaluation={"every_steps": 1},
            output=str(directory / name),
        )
        runs.append(train(recipe_from_dict(recipe)).path)
    places = [(str(r), r / "evaluation") for r in runs]
    places += [(str(m), directory / "scores" / m.name) for m in (start, teacher)]
    for model, place in places:
        evaluate(
            model,
            str(data),
            seeds=(10, 20),
            template="none",
            max_request_tokens=24,
            max_response_tokens=24,
            teacher="" if model == str(teacher) else str(teacher),
            output=place,
        )
    written = runs[0] / "evaluation" / "train.predictions.jsonl"
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    for row, score in zip(rows, [3.0, 9.0, 1.0] * len(rows), strict=False):
        row["rouge_l"] = score
    rows[4]["response"] = HOSTILE
    written.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return report([*runs, directory / "scores"], directory / "out")


def test_the_report_of_a_run_writes_figures_and_tables_beside_the_page(compared):
    names = {path.name for path in (compared.parent / "figures").iterdir()}
    assert {"training-loss-1.svg", "training-loss-2.png", "validation-rouge-l.svg"} <= names
    tables = {path.name for path in (compared.parent / "tables").iterdir()}
    assert {"scores-1-train.md", "scores-1-train.tex", "cost.md", "overview.tex"} <= tables
    assert compared.stat().st_size < 3_000_000


def test_the_report_names_no_address_outside_itself(compared):
    text = compared.read_text()
    assert "https://" not in text
    assert "src=" not in text.replace(embedded(HOSTILE)[1:-1], "")


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=HOW_TO_INSTALL)


@needs_chromium
def test_the_page_draws_its_plots_without_complaint(compared):
    with opened(compared) as (page, complaints):
        sizes = page.eval_on_selector_all(
            ".plot svg",
            """plots => plots.map(plot => {
                const box = plot.getBoundingClientRect();
                const drawn = [...plot.querySelectorAll('path')].map(p => p.getBBox());
                return [box.width, box.height, drawn.filter(b => b.width && b.height).length,
                        plot.getAttribute('aria-label').length];
            })""",
        )
        assert len(sizes) >= 8
        for width, height, paths, label in sizes:
            assert min(width, height) > 100
            assert paths > 0
            assert label > 20
        ids = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
        assert len(ids) == len(set(ids))
        assert complaints == []


@needs_chromium
def test_search_filters_the_responses_and_shows_hostile_text_as_text(compared):
    with opened(compared) as (page, complaints):
        assert page.locator("#browser-items > li").count() == 10
        assert page.locator("#browser-page").inner_text() == "Page 1 of 2"
        page.fill("#browser-search", "</script><img")
        assert page.locator("#browser-items > li").count() == 1
        assert page.locator("#browser-items > li").get_attribute("data-row") == "4"
        shown = page.locator("#browser-items .response.run .text").first.inner_text()
        assert shown == HOSTILE
        assert page.locator("#browser-items img").count() == 0
        page.fill("#browser-search", "no response says this")
        assert page.locator("#browser-items > li").count() == 0
        assert "0 of 12 requests" in page.locator("#browser-status").inner_text()
        assert complaints == []


def rows_of(page: Any) -> list[int]:
    return page.eval_on_selector_all("#browser-items > li", "all => all.map(e => +e.dataset.row)")


@needs_chromium
def test_sorting_by_gain_and_loss_reorders_the_responses(compared):
    with opened(compared) as (page, complaints):
        assert rows_of(page) == list(range(10))
        page.select_option("#browser-model", label="promptkd")
        page.select_option("#browser-other", label="nothing")
        page.select_option("#browser-sort", "gain")
        assert rows_of(page) == [1, 4, 7, 10, 0, 3, 6, 9, 2, 5]
        page.select_option("#browser-sort", "loss")
        assert rows_of(page)[:4] == [2, 5, 8, 11]
        page.click("#browser-next")
        assert rows_of(page) == [7, 10]
        assert complaints == []


@needs_chromium
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_its_text_stands_out_from_its_ground(compared, color_scheme):
    with opened(compared, width=360, height=740, color_scheme=color_scheme) as (page, complaints):
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        contrast = page.evaluate(
            """() => {
                const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
                const light = c => c.map(v => v / 255).map(
                    v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
                ).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
                const ground = light(rgb(getComputedStyle(document.body).backgroundColor));
                const of = selector => [...document.querySelectorAll(selector)].map(e => {
                    const style = getComputedStyle(e);
                    const own = light(rgb(selector.includes('path') ? style.stroke : style.color));
                    return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
                });
                return {
                    text: Math.min(...of('h1, figcaption, .detail, .lead, th, td small, .row')),
                    lines: Math.min(...of('.plot path[style*="stroke: var(--series"]')),
                };
            }"""
        )
        assert contrast["text"] >= 4.5
        assert contrast["lines"] >= 3
        assert complaints == []


@needs_chromium
def test_print_is_light_even_where_the_screen_is_dark(compared):
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(compared, color_scheme="dark") as (page, _):
        assert page.evaluate(ground) == "rgb(21, 24, 27)"
        page.click("#theme")
        assert page.evaluate(ground) == "rgb(252, 251, 248)"
        page.click("#theme")
        assert page.evaluate(ground) == "rgb(21, 24, 27)"
        page.emulate_media(media="print")
        assert page.evaluate(ground) == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
