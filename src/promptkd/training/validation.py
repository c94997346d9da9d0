"""Scores of the student while it trains, and which student is kept."""

import math
from dataclasses import dataclass
from typing import Any

from promptkd.config import Recipe
from promptkd.criteria import SMALLER_IS_BETTER
from promptkd.data import Dataset
from promptkd.errors import NotFinite, UserError
from promptkd.evaluation.exposure_bias import curve_in_training, generate_responses
from promptkd.evaluation.exposure_curves import Curve
from promptkd.evaluation.metrics import is_text_metric
from promptkd.evaluation.results import Prediction
from promptkd.evaluation.scorer import Scorer
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.ranks import Ranks
from promptkd.rollouts import Rollout
from promptkd.training.setup import Setup

SEED = 1
"""Of the decoding: the same at every evaluation."""


@dataclass(frozen=True)
class Validation:
    """One evaluation of the student as it is.

    Attributes:
        scores: means by name, over the requests of all processes.
    """

    step: int
    scores: dict[str, float]
    predictions: list[Prediction]


class Validator:
    """Scores the student on the validation data, by the protocol of ``evaluate``.

    ``metric`` is the one that chooses the student.
    """

    def __init__(self, setup: Setup, ranks: Ranks, metric: str):
        requests = setup.requests
        assert requests.validation is not None, "of makes one only where there is data"
        self._setup = setup
        self._scorer = Scorer(
            data=requests.validation,
            tokenizer=requests.tokenizer,
            stop=setup.stop,
            decoding=setup.decoding,
            micro_batch_tokens=setup.step.settings.micro_batch_tokens,
            ranks=ranks,
            metrics=(metric,) if is_text_metric(metric) else (),
        )
        self._teacher_responses: list[list[Rollout]] = []

    @classmethod
    def of(cls, setup: Setup, ranks: Ranks, metric: str) -> "Validator | None":
        """None without validation data."""
        return cls(setup, ranks, metric) if setup.requests.validation else None

    def score(self, step: int) -> Validation:
        """Of the student after ``step`` optimizer steps.

        Raises:
            NotFinite: if a score is NaN or infinite.
        """
        engine, models = self._setup.engine, self._setup.models
        asked = models.comparable and self._setup.requests.validates_teacher
        teacher = models.plain_teacher if asked else None
        bar = self._scorer.bar(engine, "validation", 1, stays=False)
        with models.gathered(teacher=False), bar:
            scores, predictions = self._scorer.score(engine, models.whole_student, teacher, (SEED,))
        means = {name: score.mean for name, score in scores.items()}
        if endless := [name for name, mean in means.items() if not math.isfinite(mean)]:
            raise NotFinite(
                f"On the validation data {', '.join(endless)} is not finite after step {step}."
            )
        return Validation(step=step, scores=means, predictions=predictions)

    def exposure_curve(self) -> Curve:
        """A point of the paper's Figure 3(b); the teacher's responses are generated once."""
        with self._setup.models.gathered():
            return self._exposure_curve()

    def _exposure_curve(self) -> Curve:
        setup, scorer = self._setup, self._scorer
        teacher = setup.models.whole_teacher
        assert teacher, "refused before the first step"
        share = Dataset(scorer.ranks.share(scorer.data.examples))
        if not self._teacher_responses:
            engine = TransformersEngine(teacher, setup.stop)
            self._teacher_responses = generate_responses(
                engine, share, setup.decoding, (SEED,), by_teacher=True
            )
        own = generate_responses(setup.engine, share, setup.decoding, (SEED,))
        return curve_in_training(
            own,
            self._teacher_responses,
            setup.models.whole_student,
            teacher,
            num_steps=setup.decoding.max_new_tokens,
            micro_batch_tokens=scorer.micro_batch_tokens,
            gather=scorer.ranks.gather,
        )


class Best:
    """Which evaluation's student is kept; part of every checkpoint.

    The best by the recipe's metric; of equals the one with the lower KL to its teacher, then the
    later one. The start, step 0, is never kept.
    """

    def __init__(self, recipe: Recipe):
        self._metric = recipe.evaluation.metric
        self.found: dict[str, Any] = {}

    def offer(self, validation: Validation) -> bool:
        """Whether this is the best so far; then it is remembered."""
        if validation.step == 0:
            return False
        if self._metric not in validation.scores:
            raise UserError(
                f"evaluation.metric {self._metric} gave no number for any validation response, so "
                "it can't choose a student. Mend the function, or set another metric."
            )
        if self.found and self._rank(validation.scores) < self._rank(self.found["scores"]):
            return False
        value = validation.scores[self._metric]
        self.found = {"step": validation.step, "value": value, "scores": validation.scores}
        return True

    def forget(self) -> None:
        """After going back to a checkpoint: a later student may have taken its place on disk."""
        self.found = {}

    def _rank(self, scores: dict[str, float]) -> tuple[float, float]:
        sign = -1 if self._metric in SMALLER_IS_BETTER else 1
        return sign * scores[self._metric], -scores.get("reverse_kl_to_teacher", 0.0)

    def state_dict(self) -> dict[str, Any]:
        return self.found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.found = state
