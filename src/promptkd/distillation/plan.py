"""From what a user asks for to stages, each a few lines of YAML that can be changed and rerun.

The numbers here, where each was measured, and what the paper has, are in docs/defaults.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from promptkd.errors import UserError
from promptkd.methods import build_method
from promptkd.pruning import check_layers

WIDTH = 576
"""The hidden width of the models that the rates were found with; they fall as width grows."""
RATES = {"teacher": 2e-4, "warm-up": 3e-4, "method": 1e-4}
PROMPT_RATE = 1e-3
STEPS = {"teacher": (20, 200), "warm-up": (30, 150), "method": (20, 60)}
"""Between these, one epoch."""
MIXED = {
    "promptkd": {"rollouts": "mixture", "student_share": 0.5},
    "gkd": {"student_share": 0.5},
}
"""Where there are references, half of the requests learn from their text: students that learnt from
their own alone became longer and worse (docs/evidence.md)."""
BATCH = 16
CALIBRATION_ROWS = 32


@dataclass(frozen=True)
class Order:
    """What the user asks for; see ``distill.Choices``."""

    teacher: str
    output: Path
    student: str | None = None
    layers: int | None = None
    tune_teacher: Literal["whole", "lora"] | None = None
    method: str = "promptkd"
    context: str | None = None
    budget_seconds: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "output": str(self.output), "settings": dict(self.settings)}


@dataclass(frozen=True)
class Facts:
    """What is known of the teacher and the data when stages are planned."""

    num_layers: int
    width: int
    num_rows: int
    has_references: bool
    lengths: Mapping[str, int]


Stages = dict[str, dict[str, Any]]
"""By name, in order: recipes, and for what isn't training a ``command`` with its arguments."""


def plan(order: Order, facts: Facts) -> Stages:
    """The stages of an order.

    Raises:
        UserError: for what can be known to fail before anything runs.
    """
    method = build_method(order.method)
    if not facts.has_references:
        if order.tune_teacher:
            raise UserError("--tune-teacher needs a reference response in every row of the data.")
        if method.needs_references:
            raise UserError(
                f"--method {order.method} needs a reference response in every row of the data. "
                "Take a method whose student generates: promptkd, gkd."
            )
    if order.student is None and order.layers is not None:
        check_layers(order.layers, facts.num_layers)
    name = order.method.replace(":", ".")
    builder = _Builder(order, facts)
    builder.check_teacher()
    if order.tune_teacher:
        builder.tune_teacher()
    if order.student is None:
        builder.prune()
    builder.warm_up()
    builder.distill(name, has_teacher=method.needs_teacher)
    builder.score(name)
    unknown = [
        key for key in order.settings if key not in builder.stages and key not in builder.common
    ]
    if unknown:
        known = ", ".join([*builder.common, *builder.stages])
        raise UserError(f"'{unknown[0]}' is no setting of these stages. Known: {known}.")
    return builder.stages


class _Builder:
    """Adds stage after stage; each finds the models of those before."""

    def __init__(self, order: Order, facts: Facts):
        self.order, self.facts = order, facts
        self.stages: Stages = {}
        self.teacher = order.teacher
        self.student = order.student or ""
        data = {
            name: str(order.output / "data" / f"{name}.jsonl") for name in ("train", "validation")
        }
        self.common: dict[str, Any] = {
            "data": {**data, "template": "auto", **facts.lengths},
            "sampling": {},
            "precision": "auto",
            "seed": 0,
            "tracking": [],
        }
        of_all = {key: value for key, value in order.settings.items() if key in self.common}
        self.common = merged(self.common, of_all)
        self.common["data"].pop("columns", None)  # the split has columns of its own

    def check_teacher(self) -> None:
        self._evaluate("teacher-check", {"teacher": self.teacher}, "validation", num_examples=32)

    def tune_teacher(self) -> None:
        lora = {"r": 16, "alpha": 32, "merge": True} if self.order.tune_teacher == "lora" else None
        self._train(
            "teacher",
            {"student": {"model": self.teacher, "lora": lora}, "method": {"name": "sft"}},
            self._optimization("teacher"),
        )
        self.teacher = self.place("teacher")

    def prune(self) -> None:
        layers = self.order.layers or max(1, 2 * self.facts.num_layers // 3)
        calibration = self.common["data"]["train"]
        if not self.facts.has_references:
            calibration = str(self.order.output / "data" / "calibration.jsonl")
            self._add(
                "calibration",
                {
                    "command": "respond",
                    "model": self.teacher,
                    "data": self.common["data"]["train"],
                    "num_examples": CALIBRATION_ROWS * 5 // 4,
                    **self._asking(),
                    "responses": calibration,
                    "output": self.place("calibration"),
                },
            )
        self._add(
            "student-init",
            {
                "command": "init-student",
                "teacher": self.teacher,
                "num_layers": layers,
                "calibration": calibration,
                "search": "greedy",
                **self._reading(),
                "num_calibration_rows": CALIBRATION_ROWS,
                "precision": self.common["precision"],
                "output": self.place("student-init"),
            },
        )
        self.student = self.place("student-init")

    def _reading(self) -> dict[str, Any]:
        """How references become text; their columns are the split's own."""
        data = self.common["data"]
        return {name: data[name] for name in ("template", "template_options") if name in data}

    def warm_up(self) -> None:
        method = {"name": "kd"} if self.facts.has_references else {"name": "seqkd", "kl_share": 0.5}
        self._train(
            "warm-up",
            {
                "student": {"model": self.student},
                "teacher": self._teacher_section(),
                "method": method,
            },
            self._optimization("warm-up"),
        )

    def distill(self, name: str, has_teacher: bool) -> None:
        recipe: dict[str, Any] = {"student": {"model": self.place("warm-up")}}
        if has_teacher:
            recipe["teacher"] = self._teacher_section()
        mixed = MIXED.get(self.order.method, {}) if self.facts.has_references else {}
        recipe["method"] = {"name": self.order.method, **mixed}
        rates = {"teacher_learning_rate": PROMPT_RATE, "teacher_step": "with_student"}
        self._train(name, recipe, self._optimization("method") | rates)

    def score(self, run: str) -> None:
        models = {
            "start": self.student,
            "warm-up": self.place("warm-up"),
            run: self.place(run),
            "teacher": self.teacher,
        }
        self._evaluate("scores", models, "held_out", num_examples=200, teacher=self.teacher)
        self._add(
            "report",
            {
                "command": "report",
                "runs": [str(self.order.output)],
                "output": str(self.order.output),
            },
        )

    def _teacher_section(self) -> dict[str, Any]:
        """The teacher as students learn from it."""
        return {"model": self.teacher, **self._briefing()}

    def _briefing(self) -> dict[str, Any]:
        """What only the teacher reads."""
        return {"system": self.order.context} if self.order.context else {}

    def place(self, stage: str) -> str:
        return str(self.order.output / stage)

    def _optimization(self, stage: str) -> dict[str, Any]:
        least, most = STEPS[stage]
        epoch = self.facts.num_rows // BATCH
        length = {"max_steps": min(most, max(least, epoch))}
        if self.order.budget_seconds is not None:
            length = {"epochs": 3}  # until the stage begins: then by the budget
        return {
            **length,
            "global_batch_size": min(BATCH, self.facts.num_rows),
            "learning_rate": round(RATES[stage] * min(1.0, WIDTH / self.facts.width), 7),
            "warmup_steps": 3,
            "schedule": "cosine",
        }

    def _asking(self) -> dict[str, Any]:
        names = ("template", "template_options", "max_request_tokens", "max_response_tokens")
        decoding = ("engine", "temperature", "top_p", "top_k")
        data, sampling = self.common["data"], self.common["sampling"]
        return {
            **{name: data[name] for name in names if name in data},
            **{name: sampling[name] for name in decoding if name in sampling},
            "precision": self.common["precision"],
        }

    def _evaluate(self, name: str, models: dict[str, str], rows: str, **more: Any) -> None:
        content = {
            "command": "evaluate",
            "models": models,
            "data": str(self.order.output / "data" / f"{rows}.jsonl"),
            "seeds": [10],
            **more,
            **self._briefing(),
            **self._asking(),
            "output": self.place(name),
        }
        self._add(name, content)

    def _train(self, name: str, recipe: dict[str, Any], optimization: dict[str, Any]) -> None:
        criterion = "reverse_kl_to_teacher" if "teacher" in recipe else "cross_entropy"
        content = {
            **recipe,
            **self.common,
            "optimization": optimization,
            "evaluation": {"every_steps": 20, "num_examples": 64, "metric": criterion},
            "checkpoints": {"every_steps": 20, "keep": 1},
            "output": self.place(name),
        }
        self._add(name, content)

    def _add(self, name: str, content: dict[str, Any]) -> None:
        self.stages[name] = merged(content, self.order.settings.get(name, {}))


def merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key, everything else is replaced."""
    found = dict(content)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found
