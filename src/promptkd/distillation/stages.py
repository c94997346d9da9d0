"""Running one stage, as its file describes it, and saying what came of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promptkd.api import check, train
from promptkd.data import read_examples
from promptkd.distillation.data import to_row
from promptkd.distillation.scores import reference_tokens, score_models, table
from promptkd.distillation.teacher_check import verdict
from promptkd.errors import UserError
from promptkd.evaluation.evaluate import evaluate
from promptkd.files import read_json, read_json_lines, write_json_lines
from promptkd.pruning import init_student
from promptkd.report.report import report

PURPOSES = {
    "evaluate": "asks {models} for responses to {data} and scores them",
    "respond": "lets {model} respond to {num_examples} requests, to measure layers on",
    "init-student": "keeps {num_layers} of the teacher's layers, those that the loss needs most",
    "report": "writes the report",
}


def purpose(content: Mapping[str, Any]) -> str:
    """What a stage will do, in a sentence without its subject."""
    if "command" in content:
        shown = {**content, "models": ", ".join(content.get("models", []))}
        return PURPOSES[_known(content["command"])].format_map(shown)
    optimization, method = content["optimization"], content["method"]["name"]
    length = f"{optimization.get('max_steps') or optimization['epochs']} "
    length += "steps" if "max_steps" in optimization else "epochs"
    return (
        f"trains {content['student']['model']} with {method} for {length} of "
        f"{optimization['global_batch_size']} requests"
    )


def run_stage(content: Mapping[str, Any]) -> str:
    """Do what a stage's file says; what came of it."""
    if "command" not in content:
        return train(content).outcome
    given = {key: value for key, value in content.items() if key != "command"}
    return COMMANDS[_known(content["command"])](**given)


def measure_step(content: Mapping[str, Any]) -> tuple[float, int]:
    """Seconds of the first step of a recipe that hasn't begun, and how many steps it would take."""
    found = check(content)
    first = found["first"]
    return first["seconds_generation"] + first["seconds_learning"], found["steps"]


def _known(command: str) -> str:
    if command not in PURPOSES:
        raise UserError(
            f"'{command}' is no command of a stage. Known: {', '.join(PURPOSES)}; a stage without "
            "one is a recipe."
        )
    return command


def _evaluate(models: dict[str, str], **given: Any) -> str:
    found = score_models(models, **given)
    if "teacher" not in given:  # the teacher by itself, before anything is trained
        lengths = reference_tokens(models["teacher"], given["data"], given)
        return verdict(found["teacher"], lengths)
    return table(found)


def _respond(model: str, data: str, responses: str, output: str, **given: Any) -> str:
    evaluate(model, data, seeds=(10,), teacher="", output=output, **given)
    found, _ = read_json_lines(Path(output) / f"{Path(data).stem}.predictions.jsonl")
    examples = read_examples(data)
    rows = [
        to_row(examples[row["index"]]) | {_column(examples[row["index"]]): [row["response"]]}
        for row in found.values()
        if row["response"]
    ]
    write_json_lines(Path(responses), rows)
    return f"{len(rows)} responses: {responses}"


def _column(example: Any) -> str:
    return "response" if example.messages else "output"


def _init_student(teacher: str, num_layers: int, output: str, **given: Any) -> str:
    record = read_json(Path(output) / "pruning.json", [])
    record = record or init_student(teacher, num_layers, output, **given)
    return (
        f"dropped layers {', '.join(map(str, record['dropped']))}; cross-entropy "
        f"{record['loss_whole']:.2f} -> {record['loss_pruned']:.2f} nats per token"
    )


def _report(runs: list[str], output: str) -> str:
    return str(report([Path(run) for run in runs], Path(output)))


COMMANDS = {
    "evaluate": _evaluate,
    "respond": _respond,
    "init-student": _init_student,
    "report": _report,
}
