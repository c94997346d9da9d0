"""What a run says while it learns, and writes of each step: metrics, samples, trackers."""

from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from promptkd.training.run_directory import RunDirectory
from promptkd.training.validation import Validation
from promptkd.training.warnings import Watch

NUM_SAMPLES = 4
"""Responses of each evaluation that are kept in samples.jsonl."""


class Journal:
    """Rank 0 writes and speaks; the others only take part in the trackers.

    Args:
        directory: the run's, with metrics.jsonl and samples.jsonl.
        accelerator: has the recipe's trackers.
    """

    def __init__(self, directory: RunDirectory, accelerator: Accelerator):
        self._directory, self._accelerator = directory, accelerator
        self._tracked = bool(directory.recipe.tracking)
        self._speaks = accelerator.is_main_process
        self._watch = Watch()

    def say(self, sentence: str) -> None:
        if self._speaks:
            tqdm.write(sentence)

    def open(self) -> None:
        """Before the first step of this process."""
        if self._tracked:
            self._accelerator.init_trackers("promptkd")

    def close(self) -> None:
        if self._tracked:
            self._accelerator.end_training()

    def go_on(self, after: int | None) -> None:
        """Forget what was written after step ``after``; None: everything."""
        if not self._speaks:
            return
        for note in self._directory.rewind(-1 if after is None else after):
            self.say(f"warning: {note}")
        self._watch = Watch(() if after is None else self._directory.metrics.read())

    def add(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and what it warns of."""
        if self._speaks:
            self._directory.metrics.append([row])
            for finding in self._watch.add(row):
                self.say(str(finding))
        if self._tracked:
            scores = {f"eval_{name}": value for name, value in row.get("evaluation", {}).items()}
            own = row.keys() - {"evaluation", "exposure_bias"}
            numbers = {name: row[name] for name in row if name in own}
            self._accelerator.log(numbers | scores, step=row["step"])

    def add_scores(self, found: Validation) -> None:
        """An evaluation of the student, with some of its responses."""
        self.add({"step": found.step, "evaluation": found.scores})
        said = ", ".join(f"{name} {value:.3f}" for name, value in found.scores.items())
        self.say(f"step {found.step}: {said}")
        if self._speaks:
            shown = found.predictions[:NUM_SAMPLES]
            self._directory.samples.append({"step": found.step, **p.to_row()} for p in shown)
