"""Responses to held-out requests and their scores: one protocol, in training and after."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from promptkd.data import Dataset
from promptkd.evaluation.metrics import TEACHER_CROSS_ENTROPY, metrics_of
from promptkd.evaluation.results import Prediction, Score, summarise
from promptkd.generation.responses_bar import responses_bar
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import Engine
from promptkd.models.language_model import LanguageModel
from promptkd.ranks import ALONE, Ranks
from promptkd.rollouts import Rollout, reference_rollouts
from promptkd.token_losses import cross_entropies, distances

MICRO_BATCH_TOKENS = 4096
"""Of passes without gradient, where a run has no budget of its own."""


def predict(
    engine: Engine,
    data: Dataset,
    decoding: GenerationSettings,
    seed: int,
    *,
    by_teacher: bool = False,
    **front: Any,
) -> list[Rollout]:
    """One response per request; a function of model, request, decoding and seed alone.

    ``by_teacher``: the engine is the teacher's, which reads its own requests.

    ``front`` is what ``TransformersEngine.generate`` puts before the requests, a soft prompt say.
    """
    responses = engine.generate(
        [example.request_of(by_teacher) for example in data.examples],
        [(seed, example.index) for example in data.examples],
        decoding,
        **front,
    )
    return [
        Rollout.answer(example, response.token_ids, author="teacher" if by_teacher else "student")
        for example, response in zip(data.examples, responses, strict=True)
    ]


def score(
    rollouts: Sequence[Rollout],
    data: Dataset,
    tokenizer: Any,
    stop: Sequence[int],
    seed: int,
    metrics: Sequence[str] = (),
) -> list[Prediction]:
    """Decode responses and compare them with their references.

    Args:
        data: all requests, though ``rollouts`` may answer only a part of them.
        metrics: what is computed beside what always is.
    """
    read = partial(tokenizer.decode, skip_special_tokens=True)
    references = {example.index: example.references for example in data.examples}
    names = metrics_of([*references.values()], metrics)
    predictions = []
    for rollout in rollouts:
        response = read(rollout.response_ids).strip()
        of_teacher = rollout.teacher_request_ids
        prediction = Prediction(
            index=rollout.index,
            seed=seed,
            request=read(rollout.request_ids),
            teacher_request=None if of_teacher is None else read(of_teacher),
            response=response,
            references=references[rollout.index],
            num_tokens=len(rollout.response_ids),
            ended=rollout.response_ids[-1] in stop,
        )
        predictions.append(prediction.scored_by(names))
    return predictions


@dataclass(frozen=True)
class Scorer:
    """What a model is asked, and how; several processes share the requests.

    Attributes:
        stop: the tokens that end a response.
        metrics: what is computed beside what always is.
        by_teacher: the model is a teacher that reads its own requests.
    """

    data: Dataset
    tokenizer: Any
    stop: Sequence[int]
    decoding: GenerationSettings
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    ranks: Ranks = ALONE
    metrics: tuple[str, ...] = ()
    by_teacher: bool = False

    def bar(
        self, engine: Engine, what: str, num_seeds: int, *, stays: bool = True
    ) -> AbstractContextManager[None]:
        """Of this process's responses, while ``score`` is at work; rank 0 shows its own."""
        total = num_seeds * len(self.ranks.share(self.data.examples))
        return responses_bar(engine, total, what, shown=self.ranks.rank == 0, stays=stays)

    def score(
        self,
        engine: Engine,
        student: LanguageModel,
        teacher: LanguageModel | None,
        seeds: Iterable[int],
    ) -> tuple[dict[str, Score], list[Prediction]]:
        """Generate with ``engine``, the student's, and measure.

        Args:
            teacher: also measure KL(student || teacher) on the student's responses, the teacher
                reading its own requests; where it has some, also what it is without them. None
                measures nothing of the kind.
            seeds: of the decoding, one response per request each.

        Returns:
            Scores by name, and every process's predictions in the order of requests and seeds.
        """
        share = replace(self.data, examples=self.ranks.share(self.data.examples))
        predictions: list[Prediction] = []
        for seed in seeds:
            rollouts = predict(engine, share, self.decoding, seed, by_teacher=self.by_teacher)
            found = score(rollouts, self.data, self.tokenizer, self.stop, seed, self.metrics)
            if teacher:
                found = _with_distances(found, rollouts, student, teacher, self.micro_batch_tokens)
            if teacher and TEACHER_CROSS_ENTROPY in self.metrics:
                nats = cross_entropies(rollouts, teacher, self.micro_batch_tokens)
                found = _with_score(found, TEACHER_CROSS_ENTROPY, nats)
            predictions += sorted(self.ranks.gather(found), key=lambda p: p.index)
        scores = summarise(predictions, self.metrics)
        if any(example.response_ids is not None for example in self.data.examples):
            known = [e for e in share.examples if e.response_ids is not None]
            texts = reference_rollouts(known)
            read = [text.for_teacher for text in texts] if self.by_teacher else texts
            nats = cross_entropies(read, student, self.micro_batch_tokens)
            sums = [sum(n.sum().item() for n in nats), float(sum(map(len, nats)))]
            total, count = self.ranks.sums(sums, student.device)
            scores["cross_entropy"] = Score(mean=total / count)
        return scores, predictions


def _with_distances(
    predictions: Sequence[Prediction],
    rollouts: Sequence[Rollout],
    student: LanguageModel,
    teacher: LanguageModel,
    micro_batch_tokens: int,
) -> list[Prediction]:
    """With KL(student || teacher) on the student's own responses, in nats per token."""
    nats = distances(rollouts, student, teacher, micro_batch_tokens)
    found = _with_score(predictions, "reverse_kl_to_teacher", nats)
    if any(rollout.teacher_request_ids is not None for rollout in rollouts):
        alike = [replace(rollout, teacher_request_ids=None) for rollout in rollouts]
        nats = distances(alike, student, teacher, micro_batch_tokens)
        found = _with_score(found, "reverse_kl_without_context", nats)
    return found


def _with_score(
    predictions: Sequence[Prediction], name: str, nats: Sequence[Tensor]
) -> list[Prediction]:
    """With the mean over each response's tokens."""
    return [
        replace(p, scores=p.scores | {name: own.mean().item()})
        for p, own in zip(predictions, nats, strict=True)
    ]
