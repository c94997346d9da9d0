"""The whole path: stages are planned once, written down, and run in order. Resumable."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import yaml

from promptkd.config import ColumnsSection, read_keys, validate
from promptkd.data import given_rows
from promptkd.distillation.data import read_rows
from promptkd.distillation.plan import Facts, Order, Stages, plan
from promptkd.distillation.scores import table
from promptkd.distillation.stages import measure_step, purpose, run_stage
from promptkd.errors import UserError
from promptkd.evaluation.named_models import run_of
from promptkd.evaluation.records import Scores, ScoresByData, ScoresByModel
from promptkd.files import check_place, read_json, whole_directory, write_json, write_text
from promptkd.generation.response_cache import fingerprint
from promptkd.generation.vllm_engine import expect_several
from promptkd.given import GivenModel
from promptkd.models.loading import load_model, load_tokenizer, save_model, text_config
from promptkd.models.objects import given_model
from promptkd.run import TrainedRun
from promptkd.training.identity import differences
from promptkd.training.requests import Say

SHARE_OF_BUDGET = {"teacher": 0.3, "warm-up": 0.35}
"""Of the time that is left when the stage begins; the method takes ``LAST_SHARE``."""
LAST_SHARE = 0.8


class Choices(TypedDict, total=False):
    """What else may be chosen for ``distill``.

    Attributes:
        student: its start, as the teacher is given; without it the teacher is pruned.
        layers: how many of the teacher's layers a pruned student keeps; two thirds if not given.
        tune_teacher: ``whole`` or ``lora``: the teacher learns the task from the references first.
        method: a name of ``METHODS``, or ``module:function``.
        context: a file (or a text) that only the teacher reads, as its system message.
        budget_seconds: of the whole path; it chooses the numbers of steps.
        settings: keys of recipes, for all stages, or below a stage's name for that one.
    """

    student: Any
    layers: int | None
    tune_teacher: Literal["whole", "lora"] | None
    method: str
    context: str | None
    budget_seconds: float | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Distillation:
    """A whole path that was gone: what ``distill`` returns.

    Attributes:
        path: the directory of everything.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    @property
    def run(self) -> TrainedRun:
        """The last training: its student is the result."""
        return run_of(self.path)

    @property
    def scores(self) -> ScoresByModel:
        """Of start, warm-up, student and teacher, on the held-out requests."""
        (stage,) = (self.path / "stages").glob("*-scores.yaml")
        found = ScoresByModel()
        for label in read_keys(stage, "Stage")["models"]:
            record = read_json(self.path / "scores" / label / "held_out.json", [])
            found[label] = ScoresByData(held_out=Scores(record or {}))
        return found

    def __repr__(self) -> str:
        shown = table({label: own["held_out"] for label, own in self.scores.items()})
        return f"{shown}\nreport: {self.report}"


def distill(
    teacher: Any,
    data: Any,
    output: str | Path,
    *,
    held_out: Any = None,
    tokenizer: Any = None,
    say: Say = print,
    **choices: Unpack[Choices],
) -> Distillation:
    """Distil a teacher into a student, from the data to the report, in stages.

    The stages are planned once and written to ``output/stages``, where each can be read and
    changed before it runs. The same call goes on where an earlier one stopped.

    Args:
        teacher: hub id, directory, .gguf file or finished run; or a loaded model, which isn't
            changed, and is written to ``output/given``, so that the stages can name it.
        data: requests, with or without reference responses: what a recipe's ``data.train`` takes,
            or rows of Python.
        output: the directory of everything.
        held_out: data that is never trained on; a tenth of the data if not given.
        tokenizer: of the models that are objects; else the one that lies where they came from.
        say: is told what happens.
        choices: see ``Choices``.

    Raises:
        UserError: for bad input, in one sentence.
    """
    expect_several()
    models = {"teacher": teacher, "student": choices.get("student")}
    named = {who: given_model(m, tokenizer, who) for who, m in models.items() if m is not None}
    given = {who: name for who, name in named.items() if isinstance(name, GivenModel)}
    named |= {who: str(Path(output) / "given" / who) for who in given}
    order = Order(**{**choices, **named, "output": Path(output)})
    test = None if held_out is None else list(given_rows(held_out, "held_out"))
    _begin(order, given, (list(given_rows(data, "data")), test), say)
    files = sorted(
        (order.output / "stages").glob("*-*.yaml"), key=lambda f: int(f.name.partition("-")[0])
    )
    before = ""
    for number, file in enumerate(files, 1):
        name = file.stem.partition("-")[2]
        say(f"{number}/{len(files)} {name}: {purpose(read_keys(file, 'Stage'))}")
        before = _run(file, before, order, say)
    return Distillation(order.output)


def _begin(
    order: Order,
    given: Mapping[str, GivenModel],
    data: tuple[list[str], list[str] | None],
    say: Say,
) -> None:
    """Plan and write the stages, and models that came as objects, unless that was done before.

    Raises:
        UserError: if the directory belongs to something else, or to other data.
    """
    settings = order.settings.get("data", {})
    mapped = settings.get("columns", {})
    rows = read_rows(*data, validate(ColumnsSection, mapped, prefix="data.columns."))
    place = order.output / "order.json"
    check_place(order.output)
    record = order.to_dict() | {"digest of the data": rows.digest()}
    record |= {f"digest of the {who}": fingerprint(name.thing) for who, name in given.items()}
    known = read_json(place, [])
    if known is None and _others(order.output):
        raise UserError(f"{order.output} exists and holds something else. Choose another output.")
    changed = differences((known or {}).get("asked", record), record)
    if changed:
        raise UserError(
            f"{order.output} was begun otherwise ({', '.join(map(str, changed))}). Choose "
            "another output, or change the files in its stages/."
        )
    if known is not None and known["planned"]:
        return
    teacher = given.get("teacher", order.teacher)
    config = text_config(teacher)
    facts = Facts(
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        num_rows=len(rows.train),
        has_references=rows.has_references,
        lengths=rows.lengths(load_tokenizer(teacher), settings.get("template", "auto")),
    )
    stages = plan(order, facts)
    for note in (*rows.notes, f"{rows.summary()}: {order.output / 'data'}"):
        say(note)
    write_json(place, {"asked": record, "planned": False})
    rows.write(order.output / "data")
    for who, name in given.items():
        _save(name, order.output / "given" / who)
    _write(order.output / "stages", stages)
    write_json(place, {"asked": record, "planned": True})


def _save(name: GivenModel, place: Path) -> None:
    with whole_directory(place, "model") as directory:
        save_model(load_model(name, name.thing.dtype), directory)
        load_tokenizer(name).save_pretrained(directory)


def _others(directory: Path) -> list[Path]:
    """What is in a directory, an interrupted first file of ours aside."""
    found = directory.iterdir() if directory.is_dir() else ()
    return [path for path in found if path.name != ".writing-order.json"]


def _write(directory: Path, stages: Stages) -> None:
    for number, (name, content) in enumerate(stages.items(), 1):
        write_text(directory / f"{number}-{name}.yaml", _yaml(content))


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _run(file: Path, before: str, order: Order, say: Say) -> str:
    """Run a stage that hasn't been; its digest, in which are all before it.

    Raises:
        UserError: if the stage, or one before it, was changed after it had run.
    """
    mark = file.with_suffix(".done.json")
    content = read_keys(file, "Stage")
    done, output = read_json(mark, []), Path(content["output"])
    if done is None or not output.exists():
        if order.budget_seconds is not None and not output.exists():
            content = _within_budget(file, content, order, say)
        started = time.monotonic()
        outcome = run_stage(content)
        seconds = time.monotonic() - started
        done = {"digest": _digest(content, before), "seconds": seconds, "outcome": outcome}
        write_json(mark, done)
        forecast = read_json(output / "summary.json", []) or {}
        expected = forecast.get("seconds_forecast")
        took = f"{seconds:.0f} s" + (f", forecast {expected:.0f}" if expected else "")
        say(f"    {outcome} ({took})".replace("\n", "\n    "))
    elif done["digest"] != _digest(content, before):
        raise UserError(
            f"{file}, or a stage before it, was changed after it had run. Remove {output} to run "
            "it again (and those of the stages that follow), or undo the change."
        )
    else:
        say(f"    done: {done['outcome']}".replace("\n", "\n    "))
    return done["digest"]


def _digest(content: dict[str, Any], before: str) -> str:
    return hashlib.sha256(f"{before}{_yaml(content)}".encode()).hexdigest()


def _within_budget(file: Path, content: dict[str, Any], order: Order, say: Say) -> dict[str, Any]:
    """The recipe with as many steps as its share of the time that is left allows."""
    if "epochs" not in content.get("optimization", {}):
        return content
    assert order.budget_seconds is not None
    marks = [read_json(mark, []) or {} for mark in file.parent.glob("*.done.json")]
    left = order.budget_seconds - sum(mark.get("seconds", 0.0) for mark in marks)
    share = SHARE_OF_BUDGET.get(file.stem.partition("-")[2], LAST_SHARE)
    seconds, at_most = measure_step(content)
    steps = min(at_most, max(1, int(share * left / seconds)))
    say(
        f"    {steps} steps: {share:.0%} of the {left / 60:.1f} min that are left, at "
        f"{seconds:.2f} s a step, and no more than {content['optimization']['epochs']} epochs"
    )
    optimization = {**content["optimization"], "max_steps": steps}
    del optimization["epochs"]
    content = content | {"optimization": optimization}
    write_text(file, _yaml(content))
    return content
