"""One step of a run, from its requests to its line in metrics.jsonl."""

import time
from typing import Any

from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.data import batch_of_step
from promptkd.ranks import Ranks
from promptkd.training.schedules import learning_rate, response_limit
from promptkd.training.setup import Setup
from promptkd.training.state import SourceStates
from promptkd.training.tracking import describe_step


class TrainingStep:
    """Takes a run's steps: sets the rates, generates the responses, learns from them.

    Everything random derives from (seed, step, example).
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        *,
        setup: Setup,
        sources: SourceStates,
        ranks: Ranks,
    ):
        self._recipe, self._method = recipe, method
        self._setup, self._sources, self._ranks = setup, sources, ranks

    def __call__(self, step: int) -> dict[str, Any]:
        """Take ``step``, counted from 0; returns its line of metrics.jsonl.

        Raises:
            LossNotFinite: before anything is updated with a NaN or infinite value.
        """
        started = time.perf_counter()
        optimization, setup, ranks = self._recipe.optimization, self._setup, self._ranks
        max_steps = setup.max_steps
        for learner in setup.step.learners:
            learner.set_rate(learning_rate(learner.base_rate, step, max_steps, optimization))
        limit = response_limit(self._recipe.data.max_response_tokens, step, max_steps)
        batch = batch_of_step(
            setup.requests.data,
            step,
            optimization.global_batch_size,
            self._recipe.seed,
            ranks.rank,
            ranks.number,
        )
        batch = batch.within(limit)
        generators = setup.generation.of_step(step, max_steps, limit)
        sources = [term.rollouts for term in self._method.terms]
        asked = [
            (source, (batch, generators, state))
            for source, state in zip(sources, self._sources.own, strict=True)
        ]
        student = setup.models.agree(any(source.asks_student(*given) for source, given in asked))
        with setup.models.gathered(student, any(source.asks_teacher for source in sources)):
            rollouts = [source.generate(*given) for source, given in asked]
        generated = time.perf_counter()
        metrics = setup.step(rollouts, step, max_steps)
        if setup.models.average:
            setup.models.average.update()
        if setup.models.teacher:
            setup.models.teacher.observe(metrics.loss, (step + 1) / max_steps)
        row = describe_step(step, rollouts, metrics, setup.stop, ranks)
        row["learning_rate"] = setup.step.student_learner.rate
        row["seconds_generation"] = generated - started
        row["seconds_learning"] = time.perf_counter() - generated
        return row
