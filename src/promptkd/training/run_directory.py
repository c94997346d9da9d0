"""The directory of a run: whose it is, what is written there, and when."""

import copy
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promptkd.adapters import merged, save_lora
from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.errors import UserError
from promptkd.files import recover_replaced, whole_directory, write_json, write_text
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import dtype_of, model_directory
from promptkd.teachers import Teacher
from promptkd.training import checkpoints
from promptkd.training.model_card import model_card
from promptkd.training.tracking import JsonLines, environment


class RunDirectory:
    """Where one recipe and method live.

    Raises:
        UserError: if the directory belongs to something else.
    """

    def __init__(self, recipe: Recipe, method: Method):
        self.path = Path(recipe.output)
        self.recipe = recipe
        self.method = method
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.samples = JsonLines(self.path / "samples.jsonl")
        self._record = self.path / "environment.json"
        self._check_owner()

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on: everything but where it goes and who watches."""
        recipe = self.recipe.to_dict()
        for key in ("output", "tracking"):
            recipe.pop(key, None)
        return {"recipe": recipe, "method": repr(self.method)}

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    def _check_owner(self) -> None:
        if self._record.exists():
            recorded = json.loads(self._record.read_text())["identity"]
            different = differences(recorded, self.identity)
            if different:
                raise UserError(
                    f"{self.path} belongs to a run of a different recipe "
                    f"({', '.join(different)}). Choose another output, or remove that directory."
                )
        elif self.path.exists() and any(
            entry.name != ".writing-environment.json" for entry in self.path.iterdir()
        ):
            raise UserError(
                f"{self.path} exists and is not a run of promptkd. Choose another output."
            )

    def claim(self, contents: dict[str, str], date: datetime.date) -> None:
        """Write down what runs here; the last thing before the first step.

        Args:
            contents: digests of data and weights.
            date: what the chat template is told is today, whenever the run goes on.

        Raises:
            UserError: if a run that goes on finds other contents than it began with.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._record.exists():
            known = json.loads(self._record.read_text()).get("contents", contents)
            changed = [
                name
                for name in sorted({*known, *contents})
                if known.get(name) != contents.get(name)
            ]
            if changed:
                raise UserError(
                    f"{self.path} began with other {' and other '.join(changed)} than there are "
                    "now: a file, the tokenizer or the template has changed. Bring them back, or "
                    "choose another output."
                )
        else:
            record = {"identity": self.identity, "contents": contents, "date": date.isoformat()}
            write_json(self._record, record | {"environment": environment()})
        if not (self.path / "recipe.yaml").exists():
            write_text(self.path / "recipe.yaml", self.recipe.to_yaml())

    def rewind(self, step: int) -> None:
        """Forget what was logged after ``step``, and finish an interrupted replacement."""
        for name in ("student", "teacher_adapter"):
            recover_replaced(self.path / name)
        for file in (self.metrics, self.samples):
            file.rewind(step)

    def load_checkpoint(self) -> tuple[checkpoints.Checkpoint | None, list[str]]:
        return checkpoints.load_latest(self.path / "checkpoints")

    def save_checkpoint(self, checkpoint: checkpoints.Checkpoint) -> None:
        checkpoints.save_checkpoint(
            self.path / "checkpoints", checkpoint, self.recipe.checkpoints.keep
        )

    def save_student(
        self,
        student: LanguageModel,
        tokenizer: Any,
        teacher: Teacher | None,
        step: int,
        scores: dict[str, float],
        stop: Sequence[int],
    ) -> None:
        """Write student/ and, if the teacher adapts, teacher_adapter/, replacing earlier ones.

        The student is saved in the precision it came in, and ends its responses with ``stop``.
        """
        with whole_directory(self.path / "student", "student") as directory:
            lora = self.recipe.student.lora
            if lora and not lora.merge:
                save_lora(student.module, directory, model_directory(self.recipe.student.model))
            else:
                whole = copy.deepcopy(merged(student.module) if lora else student.module)
                whole.to(dtype_of(self.recipe.student.model))  # pyright: ignore
                whole.generation_config.eos_token_id = list(stop)
                whole.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            card = model_card(self.recipe, repr(self.method), step, scores)
            write_text(directory / "README.md", card)
        if teacher and self.recipe.teacher and teacher.has_adapter:
            with whole_directory(self.path / "teacher_adapter", "adapter") as directory:
                teacher.save(directory, self.recipe.teacher.model)

    def finish(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)


def differences(recorded: dict[str, Any], own: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values.

    >>> differences({"recipe": {"seed": 0}}, {"recipe": {"seed": 1}})
    ['seed 0 -> 1']
    """
    found: list[str] = []
    for key in sorted(recorded.keys() | own.keys()):
        first, second = recorded.get(key), own.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            found += differences(first, second, f"{prefix}{key}.")
        elif first != second:
            found.append(f"{prefix}{key} {first!r} -> {second!r}")
    return [name.removeprefix("recipe.") for name in found]
