"""Several models on one data set by one protocol, and what they weigh and how fast they are."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promptkd.data import Encoder, evaluation_set, read_examples
from promptkd.evaluation.evaluate import evaluate
from promptkd.files import read_json, write_json
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.models.loading import load_language_model, load_tokenizer, num_parameters

SHOWN = {
    "exact_match": "exact match, %",
    "rouge_l": "ROUGE-L",
    "reverse_kl_to_teacher": "KL to teacher",
    "cross_entropy": "cross-entropy",
    "response_length": "tokens",
    "ended": "ended, %",
}
TIMED_REQUESTS, TIMED_TOKENS = 16, 32
"""How many responses of how many tokens are generated to know a model's speed."""


def score_models(
    models: Mapping[str, str],
    data: str,
    output: str,
    *,
    teacher: str = "",
    **asked: Any,
) -> dict[str, dict[str, Any]]:
    """Each model's evaluation, with ``parameters`` and ``tokens_per_second``; by label.

    What is already there from an interrupted call isn't measured again.
    """
    found = {}
    for label, model in models.items():
        place = Path(output) / label
        sizes = read_json(place / "size_and_speed.json", [])
        if sizes is None:
            evaluate(model, data, teacher=teacher, output=place, **asked)
            sizes = size_and_speed(model, data, asked)
            write_json(place / "size_and_speed.json", sizes)
        record = read_json(place / f"{Path(data).stem}.json", [])
        assert record is not None, "written before the sizes"
        found[label] = record | sizes
    return found


def size_and_speed(model: str, data: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, tokens generated a second, and the references' lengths in the model's tokens."""
    tokenizer = load_tokenizer(model)
    loaded = load_language_model(model, asked.get("precision", "auto"))
    encoder = Encoder(
        tokenizer, asked.get("template", "auto"), asked.get("max_request_tokens", 256), 10**6
    )
    examples = evaluation_set(read_examples(data), encoder).examples
    requests = [example.request_ids for example in examples[:TIMED_REQUESTS]]
    seeds = [(0, place) for place in range(len(requests))]
    engine = TransformersEngine(loaded, ())  # nothing ends a response: all are equally long
    settings = GenerationSettings(TIMED_TOKENS, temperature=0.0)
    started = time.perf_counter()
    engine.generate(requests, seeds, settings)
    seconds = time.perf_counter() - started
    return {
        "parameters": num_parameters(loaded.module),
        "tokens_per_second": len(requests) * TIMED_TOKENS / seconds,
        "reference_tokens": [len(e.response_ids) for e in examples if e.response_ids is not None],
    }


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
    *_, student, teacher = found.values()
    smaller = teacher["parameters"] / student["parameters"]
    faster = student["tokens_per_second"] / teacher["tokens_per_second"]
    lines.append(
        f"the student has {student['parameters'] / 1e6:,.1f} million parameters, the teacher "
        f"{smaller:.2f} times as many; it generates {faster:.2f} times as fast"
    )
    return "\n".join(lines)
