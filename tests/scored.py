"""Models with made-up scores: what a report's findings and tables are about."""

import random
from pathlib import Path
from typing import Any

from promptkd.evaluation.results import Evaluation, Prediction, Score
from promptkd.report.data import Model, Run


def predictions(scores: list[float], seeds: tuple[int, ...] = (1,)) -> tuple[Prediction, ...]:
    return tuple(
        Prediction(
            index=i,
            seed=seed,
            request=f"request {i}",
            response=f"response {i} of seed {seed}",
            references=(f"reference {i}",),
            num_tokens=5 + i % 3,
            ended=i % 4 > 0,
            scores={"rouge_l": score, "exact_match": 0.0},
        )
        for seed in seeds
        for i, score in enumerate(scores)
    )


def evaluation(
    scores: list[float], model: str = "m", name: str = "held_out", kl: float | None = None
) -> Evaluation:
    mean = sum(scores) / len(scores)
    values = {"rouge_l": Score(mean=mean, interval_95=(mean - 1, mean + 1))}
    if kl is not None:
        values["reverse_kl_to_teacher"] = Score(mean=kl)
    return Evaluation(
        name=name,
        model=model,
        data=("held_out.jsonl",),
        num_examples=len(scores),
        template="none",
        max_request_tokens=24,
        decoding={"temperature": 1.0, "max_new_tokens": 16},
        seeds=(1,),
        scores=values,
        predictions=predictions(scores),
    )


def student(label: str, scores: list[float], **options: Any) -> Model:
    return Model(label, "run", evaluation(scores, label, **options))


def run(label: str = "promptkd", **options: Any) -> Run:
    recipe = {"student": {"model": "start"}, "teacher": {"model": "teacher"}, "method": {}}
    return Run(Path(label), label, recipe, **options)


def noisy(mean: float, seed: int = 0, spread: float = 5.0, size: int = 60) -> list[float]:
    """Half above the mean, half as far below it, in an order that the seed decides."""
    values = [mean + spread * (i + 1) / size * sign for i in range(size // 2) for sign in (1, -1)]
    random.Random(seed).shuffle(values)
    return values
