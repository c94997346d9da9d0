"""Evaluations as verbs return and commands print them. No torch."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from promptkd.evaluation.results import Evaluation, Prediction
from promptkd.records import Record


class Scores(Record):
    """What ``NAME.json`` holds: one model's scores on one data set, and how they were taken.

    Attributes:
        predictions: the responses, where they were just generated: ``NAME.predictions.jsonl``.
    """

    predictions: tuple[Prediction, ...] = ()

    @classmethod
    def of(cls, evaluation: Evaluation) -> "Scores":
        own = cls(evaluation.to_dict())
        own.predictions = evaluation.predictions
        return own

    def lines(self) -> Iterator[str]:
        """Its head, and a line per score."""
        cut = f", {self.num_cut_requests} requests cut" if self.num_cut_requests else ""
        yield f"{self.num_examples} examples, seeds {self.seeds}{cut}"
        for score, values in self["scores"].items():
            yield f"  {score:24} {self._shown(values)}"

    def _shown(self, values: Mapping[str, Any]) -> str:
        shown = f"{values['mean']:8.3f}"
        if len(self.seeds) > 1 and "deviation_over_seeds" in values:
            shown += f" ± {values['deviation_over_seeds']:.2f} over seeds"
        if "interval_95" in values:
            low, high = values["interval_95"]
            shown += f", 95% [{low:.2f}, {high:.2f}]"
        if values.get("num_requests", self.num_examples) < self.num_examples:
            shown += f", over the {values['num_requests']} requests that have it"
        return shown


class ScoresByData(Record):
    """The ``Scores`` of one model on each data set, by its name."""

    def lines(self) -> Iterator[str]:
        """Those of each, after its name."""
        for name, scores in self.items():
            first, *others = scores.lines()
            yield from (f"{name}: {first}", *others)


class ScoresByModel(Record):
    """The ``ScoresByData`` of each model, by its label."""

    def lines(self) -> Iterator[str]:
        """Those of each, under its label."""
        return chain.from_iterable((f"--- {own}", *found.lines()) for own, found in self.items())
