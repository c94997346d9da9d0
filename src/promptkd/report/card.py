"""Held-out scores on the student's model card, with intervals, beside start and teacher."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from promptkd.errors import UserError
from promptkd.evaluation.results import Score
from promptkd.files import write_text
from promptkd.numbers import like
from promptkd.report.comparisons import (
    decoding_words,
    describe,
    number_of,
    score_name,
    shown_scores,
)
from promptkd.report.data import DataSet, Model, Run
from promptkd.report.findings import answer

BEGIN, END = "<!-- held-out scores, by promptkd report -->", "<!-- end of held-out scores -->"
SPLIT = "test"


def add_held_out_scores(run: Run, sets: Sequence[DataSet]) -> None:
    """Write them into ``student/README.md`` of the run, in place of those of an earlier report.

    Raises:
        UserError: if the card is damaged.
    """
    place = run.path / "student" / "README.md"
    measured = [(own, data) for data in sets if (own := data.of_run(run))]
    if not measured or not place.is_file():
        return
    card = _read(place)
    metadata = cast("ModelCardData", card.data)
    known = [r for r in metadata.eval_results or [] if r.dataset_split != SPLIT]
    metadata.eval_results = known + [
        _result(name, own, data) for own, data in measured for name in own.evaluation.scores
    ]
    metadata.model_name = metadata.model_name or run.label
    card.text = _with_section(card.text, _section(run, [data for _, data in measured]))
    write_text(place, str(card))


def _read(place: Path) -> ModelCard:
    try:
        if place.read_text(encoding="utf-8").strip():
            return ModelCard.load(place)
        reason = "it is empty"
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
    raise UserError(
        f"The page is written, but not the scores on the card: {place} is damaged ({reason}). Put "
        "a copy of it back, or remove it."
    )


def _result(name: str, own: Model, data: DataSet) -> EvalResult:
    """One score for the metadata: what a hub shows is its name and value, so the name says all."""
    score = own.evaluation.scores[name]
    beside = {
        model.label: model.evaluation.scores[name]
        for model in data.beside
        if name in model.evaluation.scores
    }
    parts = [f"{label} {number_of(name)(other.mean)}" for label, other in beside.items()]
    if score.interval_95:
        shown = number_of(name)(score.mean)
        low, high = (like(shown, end) for end in score.interval_95)
        parts.insert(0, f"95% interval {low} to {high}")
    return EvalResult(
        task_type="text-generation",
        dataset_type=data.name,
        dataset_name=data.name,
        dataset_split=SPLIT,
        metric_type=name,
        metric_name=f"{score_name(name)} ({'; '.join(parts)})" if parts else score_name(name),
        metric_value=round(score.mean, 4),
        dataset_args={
            "num_requests": data.evaluation.num_examples,
            "decoding": data.evaluation.decoding,
            "decoding_seeds": list(data.evaluation.seeds),
        },
        metric_args={
            **_record(score),
            **{label: {"value": round(s.mean, 4), **_record(s)} for label, s in beside.items()},
        },
    )


def _record(score: Score) -> dict[str, Any]:
    interval = score.interval_95
    return {"interval_95": [round(end, 4) for end in interval]} if interval else {}


def _section(run: Run, sets: Sequence[DataSet]) -> str:
    lines = [BEGIN, "", "## Scores on held-out data", "", " ".join(answer([run], sets)), ""]
    for data in sets:
        own = data.of_run(run)
        assert own is not None
        models = [own, *data.beside]
        heads = ["this student" if model is own else model.label for model in models]
        lines += [
            f"{describe(data)}; {decoding_words(data.evaluation)}. Square brackets: 95% bootstrap "
            "interval over requests.",
            "",
            f"| score | {' | '.join(heads)} |",
            "|---|" + "---|" * len(models),
            *(
                f"| {score_name(name)} | {' | '.join(_cell(name, m) for m in models)} |"
                for name in shown_scores(data)
                if name in own.evaluation.scores
            ),
            "",
        ]
    return "\n".join([*lines, END, ""])


def _cell(name: str, model: Model) -> str:
    score = model.evaluation.scores.get(name)
    if score is None:
        return "–"
    shown, ends = number_of(name)(score.mean), score.interval_95
    interval = f" [{like(shown, ends[0])}, {like(shown, ends[1])}]" if ends else ""
    return f"{shown}{interval}"


def _with_section(text: str, section: str) -> str:
    """In place of an earlier one, else before the validation's scores or the recipe."""
    if BEGIN in text:
        before, _, rest = text.partition(BEGIN)
        return f"{before}{section.rstrip()}{rest.partition(END)[2]}"
    heading = next(h for h in ("## Scores on the validation data", "## Recipe", "") if h in text)
    place = text.index(heading) if heading else len(text)
    return f"{text[:place]}{section}\n{text[place:]}"
