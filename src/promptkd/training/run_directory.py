"""The directory of a run: whose it is, what is written there, and when."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from promptkd.adapters import merged, save_lora
from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.data import Encoder, Example
from promptkd.errors import NotFinite, UserError
from promptkd.files import (
    check_place,
    read_json,
    recover_replaced,
    whole_directory,
    write_bytes,
    write_json,
    write_text,
)
from promptkd.given import of_object
from promptkd.models.loading import adapter_base, save_model
from promptkd.training import checkpoints, lock
from promptkd.training.divergence import is_sane
from promptkd.training.engine import with_engine
from promptkd.training.identity import (
    AS_IT_WAS,
    Change,
    Contents,
    Resuming,
    changes,
    check,
    identity,
    other_contents,
)
from promptkd.training.model_card import Frame, Validated, model_card
from promptkd.training.setup import Setup
from promptkd.training.tracking import JsonLines, environment

HIGHEST_RATE_ADVISED = 1e-3
"""Half of a rate beyond all reason is beyond it, too."""


class RunDirectory:
    """Where one recipe and method live.

    Attributes:
        asked: the recipe, as recipe.yaml keeps it: another machine may choose otherwise.
        recipe: with the engine that writes here in place of ``auto``, as the record keeps it.
        changes: what differs from the settings that are recorded there, and is allowed.
        notes: sentences on files that were found damaged.

    Raises:
        UserError: if the directory belongs to something else, or somebody trains there.
    """

    def __init__(self, recipe: Recipe, method: Method, resuming: Resuming = AS_IT_WAS):
        self.path = Path(recipe.output)
        self.asked = recipe
        self.method = method
        self.resuming = resuming
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.samples = JsonLines(self.path / "samples.jsonl")
        self._record = self.path / "environment.json"
        self._checkpoints = self.path / "checkpoints"
        known = self._read_record()
        self.recipe = with_engine(recipe, method, known["identity"] if known else None)
        self.changes = self._check_owner(known)
        lock.refuse_if_held(self.path)
        self.notes: list[str] = []
        whole = read_json(self.path / "summary.json", self.notes) is not None
        self.restarts = resuming.restart_from is not None
        self.finished = whole and not self.changes and not self.restarts

    def _check_owner(self, known: dict[str, Any] | None) -> list[Change]:
        if known:
            found = changes(known["identity"], self.recipe, self.method)
            check(found, self.resuming, str(self.path))
            return found
        check_place(self.path)
        own = {".writing-environment.json", lock.NAME}
        if self.path.exists() and any(entry.name not in own for entry in self.path.iterdir()):
            raise UserError(
                f"{self.path} exists and is not a run of promptkd. Choose another output."
            )
        if self.resuming.restart_from:
            raise UserError(f"{self.path} has no run that could be restarted from a step.")
        return []

    def _read_record(self) -> dict[str, Any] | None:
        """What environment.json says; None if nothing was begun here.

        Raises:
            UserError: if it is damaged.
        """
        if not self._record.exists():
            return None
        record = read_json(self._record, [])
        known = (record or {}).get("identity")
        if not isinstance(known, dict) or not isinstance(known.get("recipe"), dict):
            raise UserError(
                f"{self._record} is damaged, so nobody can say which run this is. Put a copy of it "
                "back, or choose another output; student/ can still be used as it is."
            )
        return record

    def claim(self, contents: Contents, about: dict[str, Any], step: int) -> None:
        """Write down what runs here; the last thing before the first step.

        Args:
            contents: what data and models say.
            about: what else is worth a record: the day that chat templates are told, the device.
            step: after which the run goes on.

        Raises:
            UserError: if a run that goes on finds other contents than it began with.
        """
        own = {"identity": identity(self.recipe, self.method), "contents": contents}
        known = self._read_record()
        if known is None:
            write_json(self._record, own | about | {"environment": environment()})
        else:
            changed = [*map(str, self.changes), *self._changed_contents(known, contents)]
            if changed or self.restarts:
                went_on = {"after_step": step, "changed": changed}
                (self.path / "summary.json").unlink(missing_ok=True)
                own["changes"] = [*known.get("changes", []), went_on]
            if known | own != known:
                write_json(self._record, known | own)
        recipe = self.path / "recipe.yaml"
        whole = self.asked.to_yaml().encode()
        if not recipe.is_file() or recipe.read_bytes() != whole:  # new, changed, or damaged
            write_bytes(recipe, whole)

    def refuse_others(self, contents: Contents) -> None:
        """Refuse to return a finished run as that of models or rows which it didn't learn from.

        Raises:
            UserError: naming what differs.
        """
        changed = other_contents((self._read_record() or {}).get("contents", {}), contents)
        if changed:
            raise UserError(
                f"{self.path} is finished, and it learnt from other {' and other '.join(changed)} "
                "than are given now. Choose another output for these; "
                f"pk.TrainedRun.of('{self.path}') opens the run that is there."
            )

    def _changed_contents(self, known: dict[str, Any], contents: Contents) -> list[str]:
        changed = other_contents(known.get("contents", {}), contents)
        if changed and not self.resuming.allow_changes:
            raise UserError(
                f"{self.path} began with other {' and other '.join(changed)} than there are "
                "now: a file of the data or of a model has changed. Bring them back, choose "
                "another output, or go on with them: --allow-changes."
            )
        return [f"other {name}" for name in changed]

    def rewind(self, step: int) -> list[str]:
        """Forget what came after ``step``, and finish an interrupted replacement.

        Returns:
            A sentence for each file that isn't what the run wrote.
        """
        checkpoints.remove_after(self._checkpoints, step)
        for name in ("student", "teacher", "teacher_adapter"):
            recover_replaced(self.path / name)
        notes = [note for file in (self.metrics, self.samples) for note in file.rewind(step)]
        logged = {row["step"] for row in self.metrics.read() if "loss" in row}
        if missing := [own for own in range(1, step + 1) if own not in logged]:
            notes.append(
                f"{self.metrics.path} lacks {len(missing)} of the {step} steps that were taken "
                f"(the first is {missing[0]}): it was changed by somebody else."
            )
        evaluated = {row["step"] for row in self.metrics.read() if "evaluation" in row}
        kept = Counter(row["step"] for row in self.samples.read())
        most = max(kept.values(), default=1)
        if lost := sorted(own for own in evaluated if kept[own] < most):
            notes.append(
                f"{self.samples.path} lacks responses of the steps {lost}: it was damaged."
            )
        return notes

    @contextmanager
    def way_back(self, step: int) -> Iterator[None]:
        """Whatever isn't finite after ``step`` steps is said with what to type.

        Raises:
            NotFinite: in place of one that is raised within.
        """
        try:
            yield
        except NotFinite as error:
            raise NotFinite(f"{error} {self._way_back(step)}") from None

    def _way_back(self, step: int) -> str:
        adapts = self.method.adaptation is not None
        names = ["learning_rate", *["teacher_learning_rate"] * adapts]
        rates = {name: getattr(self.recipe.optimization, name) for name in names}
        if step == 0 and not adapts:
            return (
                "No step was taken yet, so no rate is at fault: the models give this on the "
                "recipe's data. Look at these rows, try precision=fp32, or name other models."
            )
        why = "The run diverged: its steps were too long" if step else "The teacher moved too far"
        sane = self.last_sane_checkpoint(step)
        place = f"the checkpoint of step {sane}" if sane else "the start"
        with_ = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        lower = (
            f"optimization.{name}={min(rate / 2, HIGHEST_RATE_ADVISED):g}"
            for name, rate in rates.items()
        )
        return (
            f"{why} ({with_}). The latest weights with a loss like those before are those of "
            f"{place}. Go back to them with lower rates: promptkd train "
            f"{self.path / 'recipe.yaml'} --restart-from {sane} {' '.join(lower)}"
        )

    def losses(self) -> dict[int, float]:
        """What was logged, by step."""
        return {row["step"]: row["loss"] for row in self.metrics.read() if "loss" in row}

    def load_checkpoint(self) -> tuple[checkpoints.Checkpoint | None, list[str]]:
        """Where the run goes on, and a sentence for each damaged file.

        Raises:
            UserError: if the checkpoint that was asked for isn't there.
        """
        step = self.resuming.restart_from
        if step is not None:
            return checkpoints.load_step(self._checkpoints, step), self.notes
        found, complaints = checkpoints.load_latest(self._checkpoints)
        if complaints and found is None:
            complaints.append("No checkpoint is left; starting from the beginning.")
        return found, [*self.notes, *complaints]

    def save_checkpoint(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Keep the newest ones; while a run diverges, also the last one from before."""
        step = checkpoint.step
        spared = None if is_sane(self.losses(), step) else self.last_sane_checkpoint(step)
        keep = self.recipe.checkpoints.keep
        checkpoints.save_checkpoint(self._checkpoints, checkpoint, keep, spared)

    def last_sane_checkpoint(self, before: int) -> int:
        """The newest checkpoint of an earlier step whose loss was like those before it, or 0."""
        losses = self.losses()
        steps = map(checkpoints.step_of, checkpoints.saved_checkpoints(self._checkpoints))
        return max((step for step in steps if step < before and is_sane(losses, step)), default=0)

    def save_student(
        self, setup: Setup, module: PreTrainedModel, step: int, scores: dict[str, float]
    ) -> None:
        """Write student/ and, if the teacher adapts, teacher_adapter/, replacing earlier ones.

        A teacher that is the student's moving average is written to teacher/.

        The student is saved in the precision it came in, and ends its responses as in the run.
        Its weights are those of ``module``.
        """
        teacher = setup.models.teacher
        with whole_directory(self.path / "student", "student") as directory:
            lora = self.recipe.student.lora
            if lora and not lora.merge:
                save_lora(module, directory, adapter_base(self.recipe.student.model))
            else:
                self._save_whole(module, setup, directory)
            setup.requests.tokenizer.save_pretrained(directory)
            measured = Validated(step, scores, start=self._start_scores())
            card = model_card(
                self.recipe, repr(self.method), _frame(setup.requests.encoder), measured
            )
            write_text(directory / "README.md", card)
        if average := setup.models.average:
            with whole_directory(self.path / "teacher", "teacher") as directory:
                self._save_whole(average.module, setup, directory)
        if teacher and self.recipe.teacher and teacher.has_adapter:
            with whole_directory(self.path / "teacher_adapter", "adapter") as directory:
                name = self.recipe.teacher_model(self.path)
                _, came_from = of_object(name)
                teacher.save(directory, adapter_base(came_from or name))

    def _save_whole(self, module: PreTrainedModel, setup: Setup, directory: Path) -> None:
        """A model with its tokenizer, in the precision that the student came in."""
        whole = copy.deepcopy(merged(module) if self.recipe.student.lora else module)
        whole.to(setup.models.saved_dtype)  # pyright: ignore
        whole.generation_config.eos_token_id = list(setup.stop)  # pyright: ignore
        save_model(whole, directory)
        setup.requests.tokenizer.save_pretrained(directory)

    def _start_scores(self) -> dict[str, float]:
        rows = (row for row in self.metrics.read() if row["step"] == 0 and "evaluation" in row)
        return next((row["evaluation"] for row in rows), {})

    def finish(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)


def _frame(encoder: Encoder) -> Frame:
    """What the student's requests look like, the request itself left open."""
    text = encoder.render(Example(Frame.REQUEST))
    return Frame(text, special_tokens=encoder.template != "chat")
