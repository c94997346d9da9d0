"""Responses to held-out requests, scored: one protocol, in training and after."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from promptkd.data import Dataset
from promptkd.evaluation.metrics import exact_match, rouge_l, rouge_reads
from promptkd.evaluation.results import Prediction, Score, summarise
from promptkd.evaluation.statistics import mean_and_deviation
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import Engine
from promptkd.models.language_model import LanguageModel
from promptkd.ranks import ALONE, Ranks
from promptkd.rollouts import Rollout, reference_rollouts
from promptkd.token_losses import LossSums, loss_sums

MICRO_BATCH_TOKENS = 4096
"""Of passes without gradient, where a run has no budget of its own."""


def predict(
    engine: Engine, data: Dataset, decoding: GenerationSettings, seed: int, **front: Any
) -> list[Rollout]:
    """One response per request; a function of model, request, decoding and seed alone.

    ``front`` is what ``TransformersEngine.generate`` puts before the requests, a soft prompt say.
    """
    responses = engine.generate(
        [example.request_ids for example in data.examples],
        [(seed, example.index) for example in data.examples],
        decoding,
        **front,
    )
    return [
        Rollout(example.index, example.request_ids, response.token_ids, author="student")
        for example, response in zip(data.examples, responses, strict=True)
    ]


def score(
    rollouts: Sequence[Rollout], data: Dataset, tokenizer: Any, stop: Sequence[int], seed: int
) -> list[Prediction]:
    """Decode responses and compare them with their references."""
    references = {example.index: example.references for example in data.examples}
    predictions = []
    for rollout in rollouts:
        response = tokenizer.decode(rollout.response_ids, skip_special_tokens=True).strip()
        known = references[rollout.index]
        predictions.append(
            Prediction(
                index=rollout.index,
                seed=seed,
                request=tokenizer.decode(rollout.request_ids, skip_special_tokens=True),
                response=response,
                references=known,
                num_tokens=len(rollout.response_ids),
                ended=rollout.response_ids[-1] in stop,
                rouge_l=rouge_l(response, known) if any(map(rouge_reads, known)) else None,
                exact_match=exact_match(response, known) if known else None,
            )
        )
    return predictions


@dataclass(frozen=True)
class Scorer:
    """What a model is asked, and how; several processes share the requests.

    Attributes:
        stop: the tokens that end a response.
    """

    data: Dataset
    tokenizer: Any
    stop: Sequence[int]
    decoding: GenerationSettings
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    ranks: Ranks = ALONE

    def score(
        self,
        engine: Engine,
        student: LanguageModel,
        teacher: LanguageModel | None,
        seeds: Iterable[int],
    ) -> tuple[dict[str, Score], list[Prediction]]:
        """Generate with ``engine``, the student's, and measure.

        Args:
            teacher: also measure KL(student || teacher) on the student's responses; None measures
                nothing of the kind.
            seeds: of the decoding, one response per request each.

        Returns:
            Scores by name, and every process's predictions in the order of requests and seeds.
        """
        share = replace(self.data, examples=self.ranks.share(self.data.examples))
        predictions: list[Prediction] = []
        distances = []
        for seed in seeds:
            rollouts = predict(engine, share, self.decoding, seed)
            found = score(rollouts, share, self.tokenizer, self.stop, seed)
            predictions += sorted(self.ranks.gather(found), key=lambda p: p.index)
            if teacher:
                own = loss_sums(rollouts, student, teacher, self.micro_batch_tokens)
                distances.append(self._summed(own, student).mean_reverse_kl)
        scores = summarise(predictions)
        if distances:
            mean, deviation = mean_and_deviation(distances)
            scores["reverse_kl_to_teacher"] = Score(
                mean=mean, by_seed=tuple(distances), deviation_over_seeds=deviation
            )
        if any(example.response_ids is not None for example in self.data.examples):
            known = [e for e in share.examples if e.response_ids is not None]
            own = loss_sums(reference_rollouts(known), student, None, self.micro_batch_tokens)
            scores["cross_entropy"] = Score(mean=self._summed(own, student).mean_cross_entropy)
        return scores, predictions

    def _summed(self, own: LossSums, student: LanguageModel) -> LossSums:
        return LossSums(
            *self.ranks.sums([own.cross_entropy, own.reverse_kl, own.count], student.device)
        )
