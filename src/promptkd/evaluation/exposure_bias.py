"""Exposure bias: does the student err more after its own words than after the teacher's?

    R(l) = sum_{t<=l} E_{y_<t by q} KL(p(.|x, y_<t) || q(.|x, y_<t))       prefixes by the student
    E(l) = sum_{t<=l} E_{y_<t by p} KL(p(.|x, y_<t) || q(.|x, y_<t))       prefixes by the teacher
    ExAccErr(l) = 100 (R(l) - E(l)) / E(l)                                 percent; 0 is the aim

p is the plain teacher, q the student. Two versions stand side by side: the paper's, in which a
response that has ended adds nothing but is still counted, so that short responses alone lower the
sum; and the per-token version, whose mean at t is over the responses still running at t.

The authors' script, reproduced on request, has defects: its slice starts one position late, so that
the term t = 1 is lost and index l holds the terms 2 .. l + 1; repeated 6-grams are blocked while
sampling, so that the text comes from neither model; means over samples are divided by n + 0.001; a
request whose responses have ended counts as zero error; the error bar divides the teacher's
deviation by itself; the stop token doubles as padding and is masked.

Source: Arora et al. 2022; PromptKD, arXiv:2402.12842, Eq. 5-7.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import tensor

from promptkd.bars import progress_bar
from promptkd.data import Dataset
from promptkd.divergences import forward_kl
from promptkd.errors import UserError
from promptkd.evaluation.exposure_curves import (
    NO_GAP,
    Curve,
    Gaps,
    authors_curve,
    describe_gaps,
    exposure_curve,
    numbers,
)
from promptkd.evaluation.finished_run import FinishedRun, load_run
from promptkd.evaluation.suites import distinct
from promptkd.files import write_json
from promptkd.generation.responses_bar import responses_bar
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import Engine, TransformersEngine
from promptkd.models.language_model import LanguageModel, select_responses
from promptkd.records import Record
from promptkd.rollouts import Rollout
from promptkd.run import Place
from promptkd.token_losses import Reader, token_losses

Responses: TypeAlias = Sequence[Sequence[Rollout]]
"""By request, then by sample."""

SHOWN_LENGTHS = (1, 16, 50, 100, 256)
AUTHORS_BLOCKED_NGRAM = 6

DEFINITION = {
    "student_gap": "R(l), nats: KL(teacher || student) over the whole vocabulary, mean over all "
    "responses the student wrote, summed over the first l tokens; ended responses count as 0",
    "teacher_gap": "E(l), nats: the same over responses the plain teacher wrote",
    "excess": "100 (R(l) - E(l)) / E(l), percent; null where E(l) is 0 up to rounding",
    "per_token": "the same with the mean at each token over the responses still running there",
    "survival": "the share of an author's responses with a token at step l",
}
AUTHORS_DEFINITION = {
    "student_gap": "R of the authors' script, nats: index l holds the terms 2 .. l + 1",
    "teacher_gap": "E of the authors' script, nats: likewise",
    "excess": "100 (R - E) / E, percent",
    "error_bar": "(|std R / R| + |std E / std E|) excess, percent: not a standard error",
}


def generate_responses(
    engine: Engine,
    data: Dataset,
    decoding: GenerationSettings,
    seeds: Sequence[int],
    num_samples: int = 1,
    *,
    by_teacher: bool = False,
) -> list[list[Rollout]]:
    """``len(seeds) * num_samples`` responses per request, seed by seed.

    ``by_teacher``: the engine is the teacher's, which reads its own requests.

    Two models asked with the same seeds draw the same uniform numbers, so what they share of
    their distributions they generate alike, and R - E is measured with less noise.
    """
    draws = [(seed, sample) for seed in seeds for sample in range(num_samples)]
    asked = [(example, draw) for example in data.examples for draw in draws]
    written = engine.generate(
        [example.request_of(by_teacher) for example, _ in asked],
        [(*draw, example.index) for example, draw in asked],
        decoding,
    )
    rollouts = [
        Rollout.answer(example, response.token_ids, author="measured")
        for (example, _), response in zip(asked, written, strict=True)
    ]
    return [rollouts[i : i + len(draws)] for i in range(0, len(rollouts), len(draws))]


def measure_gaps(
    responses: Responses,
    student: LanguageModel,
    teacher: LanguageModel,
    num_steps: int,
    micro_batch_tokens: int = 4096,
    *,
    authors_script: bool = False,
    stop: Sequence[int] = (),
) -> Gaps:
    """KL(teacher || student) over the whole vocabulary at every token of the responses.

    Args:
        responses: as many samples for each request.
        student: q.
        teacher: p, plain.
        num_steps: no response is longer.
        micro_batch_tokens: tokens per forward pass, padding included.
        authors_script: score the state at y_t instead of the one before it, as the authors' slice
            does: the entry at t is then the gap at t + 1, the first is lost, and a response that
            was cut gets one beyond its end.
        stop: the tokens that end a response; the authors' mask hides them.

    Raises:
        UserError: if a gap is not finite, which is a broken model.
    """
    rollouts = [rollout for samples in responses for rollout in samples]
    measured = token_losses(
        rollouts,
        {"student": Reader(student), "teacher": Reader(teacher, is_teacher=True)},
        # A divergence is never negative; rounding leaves a trace below zero.
        lambda logprobs, _: {
            "gap": forward_kl(learner=logprobs["student"], target=logprobs["teacher"]).clamp_min(0)
        },
        micro_batch_tokens,
        (lambda hidden, mask: hidden[mask]) if authors_script else select_responses,
    )["gap"]
    _check_finite(rollouts, measured)
    lengths = [
        len(r.response_ids) - (authors_script and r.response_ids[-1] in stop) for r in rollouts
    ]
    nats = torch.zeros(len(rollouts), num_steps, dtype=torch.double)
    for row, (values, length) in enumerate(zip(measured, lengths, strict=True)):
        nats[row, :length] = values[:length]
    shape = len(responses), len(responses[0])
    return Gaps(nats.view(*shape, num_steps), tensor(lengths).view(shape))


def _check_finite(rollouts: Sequence[Rollout], measured: Sequence[torch.Tensor]) -> None:
    broken = [r.index for r, v in zip(rollouts, measured, strict=True) if not v.isfinite().all()]
    if broken:
        raise UserError(
            f"KL(teacher || student) is not finite on the requests {sorted(set(broken))[:5]} (rows "
            "counted from 0): one of the models gives NaN. Train again at a lower learning rate."
        )


def curve_in_training(
    own_responses: Responses,
    teacher_responses: Responses,
    student: LanguageModel,
    teacher: LanguageModel,
    *,
    num_steps: int,
    micro_batch_tokens: int = 4096,
    gather: Callable[[list[Gaps]], list[Gaps]] = list,
) -> Curve:
    """R and E (the paper's) of the student as it is now: a point of the paper's Figure 3(b).

    Args:
        own_responses: the student's, to this process's share of the requests.
        teacher_responses: the plain teacher's to the same; it doesn't change, so they are made
            once per run, with the same seeds.
        student: q.
        teacher: p, plain.
        num_steps: no response is longer.
        micro_batch_tokens: tokens per forward pass.
        gather: puts together what the processes measured (``Ranks.gather``).
    """
    curves = []
    for responses in (own_responses, teacher_responses):
        gaps = measure_gaps(responses, student, teacher, num_steps, micro_batch_tokens)
        shares = gather([gaps])
        curves.append(
            Gaps(torch.cat([s.nats for s in shares]), torch.cat([s.lengths for s in shares]))
        )
    return exposure_curve(*curves)


class ExposureBias(Record):
    """What ``exposure_bias.json`` holds."""

    def lines(self) -> Iterator[str]:
        """R, E and ExAccErr at a few lengths."""
        for step in sorted({min(step, len(self.steps)) for step in SHOWN_LENGTHS}):
            keys = ("student_gap", "teacher_gap", "excess")
            student_gap, teacher_gap, excess = (self[key][step - 1] for key in keys)
            shown = "undefined" if excess is None else f"{excess:+.1f} %"
            yield (
                f"l = {step:3}: R {student_gap:.3f} nats, E {teacher_gap:.3f} nats, "
                f"ExAccErr {shown}"
            )


def exposure_bias(
    run: Place,
    data: Any = None,
    *,
    num_examples: int | None = 500,
    num_samples: int = 1,
    seeds: Sequence[int] = (10, 20, 30),
    max_new_tokens: int | None = None,
    precision: str = "fp32",
    authors_script: bool = False,
) -> ExposureBias:
    """Measure a run's exposure bias and save it as ``RUN/exposure_bias.json``.

    Responses are written with the run's decoding and nothing blocked; a gap is scored at every
    response position from the first (where both prefixes agree, so the excess starts at 0) to the
    one that predicts the end.

    Args:
        run: a finished run or its directory.
        data: requests, as a recipe's data or rows; the run's validation data if not given.
        num_examples: only the first ones; the authors' script takes 500. None takes all.
        num_samples: responses per request, seed and author.
        seeds: of the sampling. Together three samples, as the authors' script draws.
        max_new_tokens: of a response; the run's own if not given.
        precision: auto | bf16 | fp32, of the models' matrices; the gap is computed in fp32.
        authors_script: as that does (above): ``RUN/exposure_bias_authors_script.json``.

    Returns:
        What the file holds: R, E, ExAccErr for l = 1, 2, ..., the same per token, intervals.

    Raises:
        UserError: for a run without teacher or student, two tokenizers, equal models, one request.
    """
    finished = load_run(run, "exposure bias", precision=precision, max_new_tokens=max_new_tokens)
    sources = finished.held_out(data)
    dataset = _requests(finished, sources, num_examples)
    describe = _by_authors_script if authors_script else _by_definition
    decoding, found = describe(finished, dataset, distinct(seeds), num_samples)
    result = finished.protocol(decoding) | {
        "data": sources,
        "num_examples": len(dataset),
        "num_samples": num_samples,
        "seeds": list(seeds),
        "num_cut_requests": dataset.num_cut_requests,
        **found,
    }
    name = "exposure_bias_authors_script" if authors_script else "exposure_bias"
    write_json(Path(run) / f"{name}.json", result)
    return ExposureBias(result)


def _requests(run: FinishedRun, sources: list[str], num_examples: int | None) -> Dataset:
    if not sources:
        raise UserError(
            f"{run.directory} has no validation data to measure on. Give data (--data FILE)."
        )
    dataset = run.evaluation_set(sources, num_examples)
    if len(dataset) < 2:
        raise UserError(
            f"{', '.join(sources)}: {len(dataset)} request is too few for an interval. "
            "Give at least two."
        )
    return dataset


Described = tuple[GenerationSettings, dict[str, Any]]


def _by_definition(
    run: FinishedRun, data: Dataset, seeds: Sequence[int], num_samples: int
) -> Described:
    decoding = run.decoding()
    gaps = _gaps(run, _generate_by_both(run, data, decoding, seeds, num_samples))
    return decoding, {"definition": DEFINITION, **describe_gaps(*gaps, num_seeds=len(seeds))}


def _by_authors_script(
    run: FinishedRun, data: Dataset, seeds: Sequence[int], num_samples: int
) -> Described:
    decoding = run.decoding(AUTHORS_BLOCKED_NGRAM)
    responses = _generate_by_both(run, data, decoding, seeds, num_samples)
    gaps = _gaps(run, responses, authors_script=True, stop=run.stop)
    curves = authors_curve(*gaps)
    steps = list(range(1, gaps[0].num_steps + 1))
    found = {key: numbers(values) for key, values in curves.items()}
    return decoding, {"definition": AUTHORS_DEFINITION, "steps": steps, **found}


def _generate_by_both(
    run: FinishedRun,
    data: Dataset,
    decoding: GenerationSettings,
    seeds: Sequence[int],
    num_samples: int,
) -> list[Responses]:
    """The student's responses, and the plain teacher's."""
    responses, total = [], len(data) * len(seeds) * num_samples
    for who, author in {"student": run.student, "teacher": run.teacher}.items():
        engine, by_teacher = TransformersEngine(author, run.stop), who == "teacher"
        with responses_bar(engine, total, f"the {who} responds"):
            asked = generate_responses(
                engine, data, decoding, seeds, num_samples, by_teacher=by_teacher
            )
        responses.append(asked)
    return responses


def _gaps(run: FinishedRun, responses: list[Responses], **how: Any) -> list[Gaps]:
    """Of either author's responses.

    Raises:
        UserError: if there is no gap at all.
    """
    num_steps = run.encoder.max_response_tokens
    with progress_bar(responses, desc="errors on either's text") as shown:
        gaps = [measure_gaps(own, run.student, run.teacher, num_steps, **how) for own in shown]
    if exposure_curve(*gaps).teacher_gap[-1] <= NO_GAP:
        raise UserError(
            f"The student of {run.directory} gives the same probabilities as its teacher on the "
            "teacher's own text: there is no error to compare. Name a run with another student."
        )
    return gaps
