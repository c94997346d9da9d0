"""The training seeds of one method as one model, so that what holds of models holds of methods."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from promptkd.evaluation.results import Evaluation, Score, totals
from promptkd.evaluation.statistics import bootstrap_interval, mean_and_deviation
from promptkd.report.data import DataSet, Model, Run


def pooled(label: str, role: str, evaluations: Sequence[Evaluation]) -> Model:
    """Scores are means over the evaluations, their intervals over requests."""
    predictions = tuple(row for e in evaluations for row in e.predictions)
    whole = replace(evaluations[0], predictions=predictions)
    scores = {
        score: _over_seeds(score, evaluations, whole)
        for score in evaluations[0].scores
        if all(score in evaluation.scores for evaluation in evaluations)
    }
    measured = [e.size_and_speed for e in evaluations]
    whole = replace(whole, scores=scores, size_and_speed=_over_runs(measured))
    of_seeds = tuple(evaluations) if role == "run" else ()
    return Model(label, role, whole, training_seeds=of_seeds)


def _over_seeds(name: str, evaluations: Sequence[Evaluation], whole: Evaluation) -> Score:
    by_seed = [evaluation.scores[name].mean for evaluation in evaluations]
    mean, deviation = mean_and_deviation(by_seed)
    of_requests = totals(whole.predictions, name).values()
    return Score(
        mean=mean,
        num_requests=len(of_requests) or None,
        interval_95=bootstrap_interval(*zip(*of_requests, strict=True)) if of_requests else None,
        by_seed=tuple(by_seed),
        deviation_over_seeds=deviation if len(by_seed) > 1 else None,
    )


def _over_runs(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs of a method weigh the same; their speeds are averaged."""
    if not all(measured):
        return {}
    return measured[0] | {"tokens_per_second": fmean(m["tokens_per_second"] for m in measured)}


def by_method(sets: Sequence[DataSet], runs: Sequence[Run]) -> list[DataSet]:
    """The data sets of a study's runs with a model per method in place of one per run."""
    methods = dict.fromkeys(run.method_of_study for run in runs)
    found = []
    for data in sets:
        own = {
            method: [
                model.evaluation
                for run in runs
                if run.method_of_study == method and (model := data.of_run(run))
            ]
            for method in methods
        }
        models = [pooled(method, "run", e) for method, e in own.items() if e]
        others = [model for model in data.models if model.role != "run"]
        found.append(DataSet(data.name, (*models, *others)))
    return found
