"""Several models on one data set by one protocol, as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from promptkd.config import TeacherSection
from promptkd.data import Encoder, evaluation_set, read_examples
from promptkd.evaluation.evaluate import answer
from promptkd.evaluation.protocol import Protocol, Questions
from promptkd.files import read_json
from promptkd.models.loading import load_tokenizer
from promptkd.report.savings import Savings

SHOWN = {
    "exact_match": "exact match, %",
    "rouge_l": "ROUGE-L",
    "reverse_kl_to_teacher": "KL to teacher",
    "cross_entropy": "cross-entropy",
    "response_length": "tokens",
    "ended": "ended, %",
}


def score_models(
    models: Mapping[str, str],
    data: str,
    output: str,
    *,
    system: str | None = None,
    seeds: Sequence[int],
    num_examples: int,
    teacher: str = "",
    **asked: Any,
) -> dict[str, dict[str, Any]]:
    """Each model's evaluation, as its NAME.json has it; by label.

    What is already there from an interrupted call isn't measured again. ``system``: a message that
    only "teacher" reads, when it answers and when the others are compared with it.
    """
    protocol = Protocol.of(None, asked)
    if system is not None:
        name = models["teacher"]
        briefed = TeacherSection(model=name, system=system)
        protocol = replace(protocol, teacher=briefed, teacher_model=name)
    questions = Questions.of(
        data, protocol, seeds=seeds, num_examples=num_examples, teacher=teacher
    )
    found = {}
    for label, model in models.items():
        place = Path(output) / label
        record = read_json(place / f"{Path(data).stem}.json", [])
        if record is None:
            is_teacher = label == "teacher"
            (record,) = answer(model, questions, place, by_teacher=is_teacher).values()
        found[label] = record
    return found


def reference_tokens(model: str, data: str, asked: Mapping[str, Any]) -> list[int]:
    """The references' lengths in the model's tokens."""
    encoder = Encoder(
        load_tokenizer(model),
        asked.get("template", "auto"),
        max_request_tokens=asked["max_request_tokens"],
        max_response_tokens=10**6,
    )
    examples = evaluation_set(read_examples(data), encoder).examples
    return [len(e.response_ids) for e in examples if e.response_ids is not None]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores as text, one line per model, and what the student saves."""
    shown = [name for name in SHOWN if any(name in own["scores"] for own in found.values())]
    lines = [" " * 12 + "".join(f"{SHOWN[name]:>16}" for name in shown)]
    for label, own in found.items():
        scores = own["scores"]
        values = [
            f"{scores[name]['mean']:16.3f}" if name in scores else f"{'–':>16}" for name in shown
        ]
        lines.append(f"{label:12}" + "".join(values))
    *_, student, teacher = (own["size_and_speed"] for own in found.values())
    smaller = teacher["parameters"] / student["parameters"]
    faster = student["tokens_per_second"] / teacher["tokens_per_second"]
    lines.append(
        f"the student has {student['parameters'] / 1e6:,.1f} million parameters, the teacher "
        f"{smaller:.2f} times as many; it generates {faster:.2f} times as fast with "
        f"{student['engine']}, {Savings(student, teacher).with_vllm}"
    )
    return "\n".join(lines)
