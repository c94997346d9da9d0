"""A run's student in EleutherAI's lm-evaluation-harness, its results kept in the run's directory.

The harness is optional (``pip install 'promptkd[lm-eval]'``) and imported only when asked for.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.evaluation.named_models import named_models, run_of
from promptkd.files import write_json, write_text
from promptkd.models.loading import compute_dtype, default_device, load_model, load_tokenizer
from promptkd.records import Record
from promptkd.run import Place, TrainedRun

KEPT = ("results", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
KEPT_VERSIONS = ("lm_eval_version", "transformers_version")


class TaskResults(Record):
    """The harness's results by model."""

    def lines(self) -> Iterator[str]:
        """The table of tasks and models."""
        yield table(self)


def lm_eval(
    run: Place,
    tasks: Sequence[str],
    *,
    others: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    chat: bool = False,
) -> TaskResults:
    """Run tasks of the harness on a student, and on models that belong to its run.

    Args:
        run: itself, its directory, or that of ``distill``.
        tasks: names that the harness knows, or YAML files of tasks.
        others: ``start``, ``teacher``, ...: see ``evaluate_with``.
        limit: only the first examples of each task.
        num_fewshot: examples in front of each request; the task's own if not given.
        chat: render requests by the tokenizer's chat template.

    Returns:
        The harness's results by model, as ``RUN/lm_eval/NAME.json`` and ``table.md`` hold them.

    Raises:
        UserError: if the harness isn't installed, or knows no such task.
    """
    harness = _harness()
    made = _finished(run)
    models = {"student": str(made.path), **named_models(made, others)}
    manager = harness.tasks.TaskManager()
    _refuse_unknown(tasks, manager.all_tasks, manager.match_tasks)
    found = TaskResults()
    for label, model in models.items():
        speaker = _speaker(harness, model, precision, batch_size)
        results = harness.simple_evaluate(
            model=speaker,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat,
            log_samples=False,
        )
        asked = {"model": model, "limit": limit, "chat": chat, "dtype": str(speaker.model.dtype)}
        found[label] = asked | {key: results[key] for key in (*KEPT, *KEPT_VERSIONS)}
        write_json(made.path / "lm_eval" / f"{label}.json", _plain(found[label]))
    write_text(made.path / "lm_eval" / "table.md", table(found))
    return found


def _finished(place: Place) -> TrainedRun:
    return TrainedRun.finished(run_of(place))


def _speaker(harness: Any, model: str, precision: str, batch_size: int) -> Any:
    """A model as the harness asks it."""
    device = default_device()
    module = load_model(model, compute_dtype(precision, device), device)
    return harness.models.huggingface.HFLM(
        pretrained=module, tokenizer=load_tokenizer(model), batch_size=batch_size
    )


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: one row per task and metric, one column per model, standard errors beside."""
    first = next(iter(found.values()))
    lines = [f"| task | metric | {' | '.join(found)} |", "|---|---|" + "---:|" * len(found)]
    for task, own in first["results"].items():
        for key in own:
            metric, comma, _ = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                cells = [_cell(model["results"][task], key) for model in found.values()]
                lines.append(f"| {task} | {metric} | {' | '.join(cells)} |")
    limited = f"the first {first['limit']} examples of each; " if first["limit"] else ""
    lines += ["", f"lm-evaluation-harness {first['lm_eval_version']}; {limited}±: standard error."]
    return "\n".join(lines) + "\n"


def _cell(results: Mapping[str, Any], key: str) -> str:
    metric, _, kind = key.partition(",")
    value, error = results[key], results.get(f"{metric}_stderr,{kind}")
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def _harness() -> Any:
    try:
        for name in ("lm_eval.tasks", "lm_eval.models.huggingface"):
            importlib.import_module(name)
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise UserError(
            f"lm-eval needs lm-evaluation-harness, which can't be imported ({error}). "
            "Run: pip install 'promptkd[lm-eval]'"
        ) from None


def _refuse_unknown(tasks: Sequence[str], known: Sequence[str], match: Any) -> None:
    for task in tasks:
        is_file = task.endswith((".yaml", ".yml"))
        if is_file and not Path(task).is_file():
            raise UserError(f"The task file {task} doesn't exist.")
        if not is_file and not match([task]):
            near = get_close_matches(task, known, n=1)  # it knows thousands
            raise UserError(
                f"lm-evaluation-harness has no task '{task}'"
                f"{f'; did you mean {near[0]!r}?' if near else '.'} Or name a YAML file of a task."
            )


def _plain(content: Any) -> Any:
    """As JSON has it: functions of task configurations by name, numpy's numbers as Python's."""
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, str | int | float | bool) or content is None:
        return content
    return getattr(content, "__name__", str(content))
