import json
import math
import random
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
from promptkd.evaluation.results import Evaluation, Prediction, Score
from promptkd.numbers import digits
from promptkd.report.cells import Cell, Table
from promptkd.report.comparisons import best_model, between, headline, in_words
from promptkd.report.cost import cost_of_steps
from promptkd.report.data import DataSet, Model, Named, Run, data_sets, read_run
from promptkd.report.findings import answer, distance, warnings
from promptkd.report.places import read_subject
from promptkd.report.report import report
from promptkd.report.responses import embedded, response_sets
from promptkd.report.tables import score_table
from report_browser import CHROMIUM, HOW_TO_INSTALL, opened

HOSTILE = "</script><img src=x onerror=alert(1)> <!-- {{ 7*7 }} & \"'\u2028 $\\x_1$ ]]>"


def predictions(scores: list[float], seeds: tuple[int, ...] = (1,)) -> tuple[Prediction, ...]:
    return tuple(
        Prediction(
            index=i,
            seed=seed,
            request=f"request {i}",
            response=f"response {i} of seed {seed}",
            references=(f"reference {i}",),
            num_tokens=5 + i % 3,
            ended=i % 4 > 0,
            scores={"rouge_l": score, "exact_match": 0.0},
        )
        for seed in seeds
        for i, score in enumerate(scores)
    )


def evaluation(
    scores: list[float], model: str = "m", name: str = "held_out", kl: float | None = None
) -> Evaluation:
    mean = sum(scores) / len(scores)
    values = {"rouge_l": Score(mean=mean, interval_95=(mean - 1, mean + 1))}
    if kl is not None:
        values["reverse_kl_to_teacher"] = Score(mean=kl)
    return Evaluation(
        name=name,
        model=model,
        data=("held_out.jsonl",),
        num_examples=len(scores),
        template="none",
        max_request_tokens=24,
        decoding={"temperature": 1.0, "max_new_tokens": 16},
        seeds=(1,),
        scores=values,
        predictions=predictions(scores),
    )


def student(label: str, scores: list[float], **options: Any) -> Model:
    return Model(label, "run", evaluation(scores, label, **options))


def run(label: str = "promptkd", **options: Any) -> Run:
    recipe = {"student": {"model": "start"}, "teacher": {"model": "teacher"}, "method": {}}
    return Run(Path(label), label, recipe, **options)


def noisy(mean: float, seed: int = 0, spread: float = 5.0, size: int = 60) -> list[float]:
    """Half above the mean, half as far below it, in an order that the seed decides."""
    values = [mean + spread * (i + 1) / size * sign for i in range(size // 2) for sign in (1, -1)]
    random.Random(seed).shuffle(values)
    return values


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


def test_the_generation_of_runs_of_earlier_versions_is_part_of_their_cost():
    times = {"seconds_learning": 2.0, "seconds_writing": 6.0}
    took = cost_of_steps([{"step": 1, **times}, {"step": 2, **times}])
    assert took is not None
    assert (took.seconds_generation, took.seconds_learning) == (12.0, 4.0)


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
