"""The data behind the page's browser of responses."""

import json
from collections.abc import Sequence
from typing import Any

from promptkd.evaluation.results import Prediction
from promptkd.report.comparisons import RANKED, describe, headline, score_name
from promptkd.report.data import DataSet, Row, Run

MAX_BYTES = 1_800_000
SHORTEST_AFFIX = 24


def response_sets(
    runs: Sequence[Run], sets: Sequence[DataSet], max_bytes: int = MAX_BYTES
) -> list[Row]:
    """One entry per data set, and one per run for what was sampled during training.

    Every data set gets an equal share of ``max_bytes``; one that exceeds it keeps its first seed,
    then evenly spaced requests, and says so in its note.
    """
    found = [
        _evaluated(data) for data in sets if any(m.evaluation.predictions for m in data.models)
    ]
    found += [_sampled(run) for run in runs if run.samples]
    return [_fitted(entry, max_bytes // len(found)) for entry in found]


def embedded(value: Any) -> str:
    r"""JSON that may stand in a script element: no < starts a tag, no line separator ends a line.

    >>> embedded("</script>")
    '"\\u003c/script>"'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for special in "<\u2028\u2029":
        text = text.replace(special, f"\\u{ord(special):04x}")
    return text


def _evaluated(data: DataSet) -> Row:
    items: dict[int, Row] = {}
    compared = headline(data)
    for place, model in enumerate(data.models):
        first = model.training_seeds[0] if model.training_seeds else model.evaluation
        for p in first.predictions:
            item = items.setdefault(
                p.index,
                {
                    "row": p.index,
                    "request": p.request,
                    "told": p.teacher_request,
                    "references": list(p.references),
                    "responses": [[] for _ in data.models],
                },
            )
            item["responses"][place].append(_response(p, compared))
    ordered = [items[index] for index in sorted(items)]
    template = data.evaluation.template
    about = describe(data)
    if any(len(model.training_seeds) > 1 for model in data.models):
        about += ", the first training seed of each method"
    if not any(item["request"] for item in ordered):
        about += "; requests and references aren't kept here"
    return {
        "name": data.name,
        "score": compared,
        "score_name": score_name(compared or "").removesuffix(", %"),
        "about": about,
        "models": [{"label": m.label, "role": m.role} for m in data.models],
        "seeds": list(data.evaluation.seeds),
        "items": ordered,
        "note": _strip_template(ordered, template),
    }


def _sampled(run: Run) -> Row:
    """The same requests at every evaluation: each step stands where a model stands."""
    steps = sorted({sample["step"] for sample in run.samples})
    compared = next((n for n in RANKED if any(s.get(n) is not None for s in run.samples)), None)
    items: dict[int, Row] = {}
    for sample in run.samples:
        item = items.setdefault(
            sample["index"],
            {
                "row": sample["index"],
                "request": sample["request"],
                "told": sample.get("teacher_request"),
                "references": sample["references"],
                "responses": [[] for _ in steps],
            },
        )
        response = _response(_prediction(sample), compared)
        item["responses"][steps.index(sample["step"])].append(response)
    ordered = [items[index] for index in sorted(items)]
    template = (run.recipe.get("data") or {}).get("template")
    return {
        "name": f"{run.label}, during training",
        "score": compared,
        "score_name": score_name(compared or "").removesuffix(", %"),
        "about": "a few validation requests at every evaluation",
        "models": [{"label": f"step {step}", "role": "step"} for step in steps],
        "seeds": sorted({sample["seed"] for sample in run.samples}),
        "items": ordered,
        "note": _strip_template(ordered, template),
    }


def _prediction(sample: Row) -> Prediction:
    return Prediction.of_row({key: value for key, value in sample.items() if key != "step"})


def _response(prediction: Prediction, compared: str | None) -> Row:
    score = prediction.scores.get(compared or "")
    return {
        "seed": prediction.seed,
        "text": prediction.response,
        "tokens": prediction.num_tokens,
        "ended": prediction.ended,
        "score": None if score is None else round(score, 1),
    }


def _strip_template(items: Sequence[Row], template: Any) -> str:
    """Take what every request has in common off its ends; the note says what was taken."""
    if template == "alpaca":
        for item in items:
            own = item["request"].partition("### Instruction:\n")[2] or item["request"]
            own = own.removesuffix("### Response:\n").removesuffix("### Response:")
            item["request"] = own.strip("\n")
        return "Requests are shown without the alpaca template around them."
    if len(items) < 2:
        return ""
    requests = [item["request"] for item in items]
    head = _common_start(requests)
    head = head[: head.rfind("\n") + 1]
    tail = _common_start([request[len(head) :][::-1] for request in requests])[::-1]
    tail = tail[tail.find("\n") :] if "\n" in tail else ""
    head = head if len(head) >= SHORTEST_AFFIX or tail else ""
    if not head and not tail:
        return ""
    for item in items:
        item["request"] = item["request"][len(head) : len(item["request"]) - len(tail)].strip("\n")
    return f"Every request begins with {head.strip()!r} and ends with {tail.strip()!r}."


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    same = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(same, min(len(first), len(last)))]


def _fitted(entry: Row, max_bytes: int) -> Row:
    def size(value: Any) -> int:
        return len(embedded(value).encode("utf-8", "replace"))

    notes = [entry["note"]] if entry["note"] else []
    items = entry["items"]
    if size(items) > max_bytes and len(entry["seeds"]) > 1:
        items = [{**i, "responses": [of_model[:1] for of_model in i["responses"]]} for i in items]
        notes.append(f"Only seed {entry['seeds'][0]} is shown.")
    if (whole := size(items)) > max_bytes:
        wanted = max(1, len(items) * max_bytes // whole)
        kept = [items[place * len(items) // wanted] for place in range(wanted)]
        notes.append(
            f"{wanted} of {len(items)} requests are shown, evenly spaced; all are in the run's "
            "evaluation directory."
        )
        items = kept
    return {**entry, "items": items, "note": " ".join(notes)}
