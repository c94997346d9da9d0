"""The training seeds of one method as one model: its scores are those of study.json."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from promptkd.evaluation.results import Evaluation, Score
from promptkd.report.data import DataSet, Model, Run
from promptkd.report.study import StudyOutline


def by_method(sets: Sequence[DataSet], runs: Sequence[Run], study: StudyOutline) -> list[DataSet]:
    """The study's data sets, in its order, with a model per method in place of one per run."""
    found = []
    for data in sorted(sets, key=lambda data: _place(data, study)):
        own = study.on(data.name)
        if own is None:
            continue
        models = [
            _pooled(method, own.scores[method], evaluations)
            for method in study.methods
            if method in own.scores
            and (evaluations := _of_method(method, own.training_seeds[method], runs, data))
        ]
        others = [model for model in data.models if model.role != "run"]
        found.append(DataSet(data.name, (*models, *others), own.compared))
    return found


def _place(data: DataSet, study: StudyOutline) -> int:
    titles = [own.title for own in study.scores]
    return titles.index(data.name) if data.name in titles else len(titles)


def _of_method(
    method: str, seeds: Sequence[int], runs: Sequence[Run], data: DataSet
) -> list[Evaluation]:
    own = [r for r in runs if r.method_of_study == method and r.recipe.get("seed", 0) in seeds]
    return [model.evaluation for run in own if (model := data.of_run(run))]


def _pooled(label: str, scores: dict[str, Score], evaluations: Sequence[Evaluation]) -> Model:
    predictions = tuple(row for e in evaluations for row in e.predictions)
    measured = [e.size_and_speed for e in evaluations]
    whole = replace(
        evaluations[0],
        scores=scores,
        predictions=predictions,
        size_and_speed=_over_runs(measured),
    )
    return Model(label, "run", whole, training_seeds=tuple(evaluations))


def _over_runs(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs of a method weigh the same; their speeds are averaged."""
    if not all(measured):
        return {}
    rates = [key for key in measured[0] if key.endswith("tokens_per_second")]
    means = {k: fmean(m[k] for m in measured) for k in rates if all(k in m for m in measured)}
    return {key: value for key, value in measured[0].items() if key not in rates} | means
