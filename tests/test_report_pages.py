"""The pages people look at: one run, runs compared, a study; on a screen, a phone and paper."""

import html
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from promptkd.errors import UserError
from promptkd.evaluation.kept import save_evaluation
from promptkd.evaluation.results import Evaluation, Prediction, summarise
from promptkd.numbers import plain
from promptkd.report.places import read_subject
from promptkd.report.report import report
from promptkd.study.file import study_from_dict
from promptkd.study.stored import conclude
from report_browser import CHROMIUM, HOW_TO_INSTALL, PRINTED_WIDTH, opened, take_pictures

REQUESTS = 60
SIZE = 99_000_000
MEASURED = {
    **{"bytes_memory": 198_000_000, "bytes_disk": 396_000_000, "tokens_per_second": 278.0},
    **{"timed_requests": 16, "timed_tokens": 32, "engine": "transformers", "device": "cpu"},
}


def evaluation(mean: float, model: str, parameters: int, seed: int = 0) -> Evaluation:
    """Scores around a mean, in an order that the seed decides."""
    noise = random.Random(seed)
    predictions = tuple(
        Prediction(
            index=i,
            seed=10,
            request=f"Remind me to call number {i} on Friday at 5 pm, please.",
            response=f'{{"task": "call number {i}", "day": "Friday"}}',
            references=(f'{{"task": "call number {i}", "day": "Friday", "time": "5 pm"}}',),
            num_tokens=20 + i % 9,
            ended=i % 11 > 0,
            scores={"rouge_l": mean + noise.uniform(-4, 4), "reverse_kl_to_teacher": 10 / mean},
        )
        for i in range(REQUESTS)
    )
    return Evaluation(
        name="reminders",
        model=model,
        data=("reminders.jsonl",),
        num_examples=REQUESTS,
        template="none",
        max_request_tokens=32,
        decoding={"temperature": 1.0, "max_new_tokens": 32},
        seeds=(10,),
        size_and_speed=MEASURED | {"parameters": parameters},
        scores=summarise(predictions),
        predictions=predictions,
    )


def write_run(directory: Path, method: str, score: float, seed: int = 0) -> Path:
    """What a finished run leaves, without its models."""
    recipe = tiny.recipe(directory, method={"name": method}, output=str(directory))
    recipe |= {"student": {"model": "start"}, "teacher": {"model": "teacher"}, "seed": seed}
    rows: list[dict[str, Any]] = []
    for step in range(21):
        if step:
            row = {"loss": (1 + seed) / step, "response_length": 20.0, "share_ended": 0.9}
            times = dict.fromkeys(("generation", "learning", "teacher", "student", "losses"), 0.5)
            row |= {f"seconds_{part}": seconds for part, seconds in times.items()}
            rows.append({"step": step, "num_tokens": 300, "kl_teacher_student": 1 / step, **row})
        if step % 5 == 0:
            scores = {"reverse_kl_to_teacher": 1 / (1 + step), "rouge_l": 0.0, "ended": 90.0}
            rows.append({"step": step, "evaluation": scores})
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"steps": 20, "student_parameters": 99_000_000, "teacher_parameters": 134_000_000}
    (directory / "summary.json").write_text(json.dumps(summary | {"best": {"step": 20}}))
    save_evaluation(
        directory / "evaluation", evaluation(score, str(directory), 99_000_000, seed + 1)
    )
    return directory


def write_others(directory: Path) -> list[Path]:
    for name, score in (("start", 20.0), ("teacher", 40.0)):
        save_evaluation(directory / name, evaluation(score, name, 134_000_000))
    return [directory / "start", directory / "teacher"]


def write_study(directory: Path, scores: dict[str, Sequence[float]], baseline: str) -> Path:
    """The scores are those of the training seeds, by method."""
    for method, own in scores.items():
        for seed, score in enumerate(own):
            write_run(directory / method / f"seed-{seed}", method, score, seed)
    write_others(directory)
    base = tiny.recipe(directory)
    del base["method"], base["output"]
    asked = {
        "base": base,
        "methods": {name: {"method": {"name": name}} for name in scores},
        "seeds": list(range(len(next(iter(scores.values()))))),
        "baseline": baseline,
        "evaluation": {"suite": {"reminders": "reminders.jsonl"}},
        "output": str(directory),
    }
    conclude(study_from_dict(asked))
    return directory


def first_heading(page: Path) -> str:
    found = re.search("<h1>(.*?)</h1>", page.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


LUCKY = {"promptkd": (27.0, 26.8, 60.0), "gkd": (28.0, 28.2, 28.1), "kd": (24.0, 24.1, 23.9)}


def test_a_lucky_seed_is_not_believed(tmp_path):
    """The mean of promptkd is highest, for one seed's sake; the page never calls it better."""
    study = write_study(tmp_path / "study", LUCKY, "kd")
    [data] = read_subject([study]).data_sets()
    models = data.of_role("run")
    assert max(models, key=lambda m: m.evaluation.mean("rouge_l") or 0).label == "promptkd"
    page = study / "report.html"
    assert first_heading(page) == (
        "No method is established as the best of 3 on reminders (60 requests, seed 10)."
    )
    text = html.unescape(page.read_text()).replace("\u00a0", " ")
    assert "seed-2 in numbers" not in text
    [own] = re.findall(r'<th scope="row">promptkd</th>(.*?)</tr>', text, re.DOTALL)[:1]
    assert "not established" in own
    assert 'class="best"' not in text
    gkd = re.findall(r'<th scope="row">gkd</th>(.*?)</tr>', text, re.DOTALL)[0]
    assert re.search(r"\+4\.\d<small>\[\d\.\d, \d\.\d\] p ", gkd)


def test_a_method_ahead_in_every_seed_is_said_to_be_best(tmp_path):
    study = write_study(tmp_path / "study", {**LUCKY, "promptkd": (33, 34, 33.5)}, "gkd")
    assert first_heading(study / "report.html").startswith("promptkd is best of 3 methods on ")


def test_the_page_says_what_the_studys_table_says(tmp_path):
    study = write_study(tmp_path / "study", LUCKY, "gkd")
    record = json.loads((study / "study.json").read_text())
    text = html.unescape((study / "report.html").read_text())
    markdown = (study / "table.md").read_text()
    [said] = record["statements"]
    sentences = re.split(r"(?<=\.) (?=[a-zA-Z])", said)
    assert len(sentences) == 3
    assert all(sentence in text and sentence in markdown for sentence in sentences)
    for table in [record["methods_table"], *record["tables"]]:
        on_page = text[text.index(f'id="table-{table["name"]}"') :]
        on_page = on_page[: on_page.index("</figure>")].replace("\u00a0", " ")
        for row in table["rows"]:
            for cell in row:
                assert cell["text"] in on_page
                assert cell["detail"] in on_page
    promptkd = next(m for m in record["data"]["reminders"]["models"] if m["label"] == "promptkd")
    low, high = promptkd["scores"]["rouge_l"]["interval_95"]
    assert f"[{plain(low)}, {plain(high)}]" in markdown
    [data] = read_subject([study]).data_sets()
    [model] = [m for m in data.models if m.label == "promptkd"]
    assert model.evaluation.scores["rouge_l"].interval_95 == (low, high)


def test_a_study_of_an_earlier_version_is_refused_with_what_makes_it_anew(tmp_path):
    study = write_study(tmp_path / "study", {"gkd": (28.0,)}, "start")
    record = json.loads((study / "study.json").read_text())
    del record["tables"]
    (study / "study.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"earlier version.*--table-only"):
        report(study)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    others = write_others(place / "scores")
    one = write_run(place / "promptkd", "promptkd", 33.0)
    compared = [
        write_run(place / f"{name}-with-a-long-name", name, 25.0 + n, n)
        for n, name in enumerate(("promptkd", "gkd", "kd", "sft"))
    ]
    return {
        "single": report([one, *others], place / "single"),
        "comparison": report([*compared, *others], place / "comparison"),
        "study": write_study(place / "study", LUCKY, "gkd") / "report.html",
    }


KINDS = ("single", "comparison", "study")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=HOW_TO_INSTALL)
OVERLAPS = """() => [...document.querySelectorAll('.plot, .numbers, .top')].flatMap(plot => {
    const found = plot.querySelectorAll('svg text, dt, dd:not(.scale), nav a, .name, button');
    const texts = [...found].filter(t => t.textContent.trim());
    const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
    return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2
    ).map(([other]) => plot.id + ': ' + name + ' | ' + other));
})"""
BREAKABLE = """() => ['p', 'li', 'dd', 'figcaption', '.plot', '.number', '.item', 'tr']
    .filter(name => [...document.querySelectorAll(name)]
        .some(e => getComputedStyle(e).breakInside !== 'avoid'))"""
TOO_WIDE = """() => [...document.querySelectorAll('.scroll')]
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.getAttribute('aria-label'))"""
CLIPPED = """() => {
    const width = document.documentElement.clientWidth;
    return [...document.querySelectorAll('h1, p, figcaption, .number, .plot svg text, .example')]
        .filter(e => !e.closest('.scroll') && e.getBoundingClientRect().width)
        .filter(e => e.getBoundingClientRect().right > width + 1 ||
                     e.getBoundingClientRect().left < -1)
        .filter(e => !e.closest('.skip'))
        .map(e => e.textContent.trim().slice(0, 60));
}"""


@needs_chromium
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_no_labels_overlap_and_nothing_is_clipped(pages, kind, width, scheme):
    with opened(pages[kind], width=width, color_scheme=scheme) as (page, complaints):
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate(CLIPPED) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert complaints == []


@needs_chromium
@pytest.mark.parametrize("kind", KINDS)
def test_print_takes_fewer_than_eight_pages_and_breaks_no_sentence_and_no_figure(pages, kind):
    with opened(pages[kind], width=PRINTED_WIDTH) as (page, complaints):
        printed = page.pdf(format="A4", print_background=False)
        assert len(re.findall(rb"/Type /Page\b", printed)) < 8
        page.emulate_media(media="print")
        assert page.evaluate(BREAKABLE) == []
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate(CLIPPED) == []
        assert complaints == []


@needs_chromium
def test_pictures_of_the_page_are_small_files(pages, tmp_path):
    made = take_pictures(pages["study"], "study", tmp_path)
    assert [path.name for path in made] == [
        f"study-{kind}.png" for kind in ("light", "dark", "phone", "print")
    ]
    assert all(5_000 < path.stat().st_size < 250_000 for path in made)


@needs_chromium
@pytest.mark.parametrize("kind", KINDS)
def test_every_link_leads_to_a_file_or_to_a_place_on_the_page(pages, kind):
    with opened(pages[kind]) as (page, _):
        links = page.eval_on_selector_all("a", "all => all.map(a => a.getAttribute('href'))")
        ids = set(page.eval_on_selector_all("[id]", "all => all.map(e => e.id)"))
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    files = [link for link in links if not link.startswith("#")]
    assert len(files) >= 10
    assert all((pages[kind].parent / file).is_file() for file in files)


def test_a_curve_that_is_zero_throughout_is_not_drawn(pages):
    names = {path.name for path in (pages["single"].parent / "figures").iterdir()}
    assert "validation-reverse-kl-to-teacher.svg" in names
    assert "validation-rouge-l.svg" not in names


def test_the_first_screen_says_how_good_how_large_how_fast_and_what_it_cost(pages):
    text = pages["single"].read_text()
    opening = text[text.index('id="answer"') : text.index('id="scores"')]
    assert "percent on reminders" in opening
    labels = ("ROUGE-L", "Size", "Speed of generation", "Memory of the weights")
    assert all(f"<dt>{label}</dt>" in opening for label in (*labels, "What training cost"))
    assert "the middle of 60 requests" in opening
    assert opening.count('class="response ') == 3
