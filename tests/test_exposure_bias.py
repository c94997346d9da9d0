"""Exposure bias of models and of runs: what is measured, beside the authors' script."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch import tensor

import runs
from promptkd.api import train
from promptkd.config import recipe_from_dict
from promptkd.data import Encoder, evaluation_set, read_examples
from promptkd.errors import UserError
from promptkd.evaluation.exposure_bias import (
    curve_in_training,
    exposure_bias,
    generate_responses,
    measure_gaps,
)
from promptkd.evaluation.exposure_curves import (
    authors_curve,
    exposure_curve,
    exposure_intervals,
)
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.models.language_model import LanguageModel
from promptkd.rollouts import Rollout
from promptkd.training.validation import SEED as VALIDATION_SEED
from tiny import EOS, model, recipe, save_pair, tokenizer, write_data

VOCABULARY = 98
NUM_STEPS = 12


def language_model(seed, architecture="llama", **options):
    return LanguageModel(model(architecture, seed=seed, **options), VOCABULARY)


def ends_sometimes(language):
    """Raise the probability of the stop token, so that responses end at different lengths."""
    with torch.no_grad():
        language.module.get_output_embeddings().weight[EOS] *= 2.5
    return language


def dataset(tmp_path, num_rows=6):
    examples = read_examples([str(write_data(tmp_path / "data.jsonl", num_rows))])
    return evaluation_set(examples, Encoder(tokenizer(), "none", 24, 24))


def write(language, data, seeds=(1, 2), num_samples=1, decoding=None):
    engine = TransformersEngine(language, (EOS,))
    return generate_responses(
        engine, data, decoding or GenerationSettings(NUM_STEPS), seeds, num_samples
    )


@pytest.fixture(scope="module")
def pair():
    return ends_sometimes(language_model(1)), ends_sometimes(language_model(2, num_layers=3))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exposure")
    save_pair(directory)
    write_data(directory / "train.jsonl")
    validation = write_data(directory / "validation.jsonl", 4)
    raw = recipe(
        directory,
        data={"validation": str(validation), "max_response_tokens": NUM_STEPS},
        optimization={"max_steps": 1},
    )
    return train(recipe_from_dict(raw)).path


# -- measuring


def test_gaps_are_those_of_a_naive_loop_from_the_first_token_to_the_stop_token(pair, tmp_path):
    student, teacher = pair
    responses = write(student, dataset(tmp_path))
    gaps = measure_gaps(responses, student, teacher, NUM_STEPS)
    assert len({len(r.response_ids) for samples in responses for r in samples}) > 2
    for i, samples in enumerate(responses):
        for s, rollout in enumerate(samples):
            ids = tensor([[*rollout.request_ids, *rollout.response_ids]])
            p, q = (
                m.module(ids).logits[0, :, :VOCABULARY].double().softmax(-1)
                for m in (teacher, student)
            )
            first = len(rollout.request_ids) - 1
            expected = [
                (p[first + t] * (p[first + t] / q[first + t]).log()).sum().item()
                for t in range(len(rollout.response_ids))
            ]
            expected += [0.0] * (NUM_STEPS - len(expected))
            assert gaps.nats[i, s].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert gaps.lengths[i, s].item() == len(rollout.response_ids)


def test_batching_and_order_do_not_change_the_gaps(pair, tmp_path):
    student, teacher = pair
    responses = write(teacher, dataset(tmp_path))
    whole = measure_gaps(responses, student, teacher, NUM_STEPS, 4096)
    for budget in (1, 70):
        cut = measure_gaps(responses, student, teacher, NUM_STEPS, budget)
        torch.testing.assert_close(cut.nats, whole.nats, rtol=1e-4, atol=1e-5)
    backwards = measure_gaps(responses[::-1], student, teacher, NUM_STEPS, 70)
    torch.testing.assert_close(backwards.nats.flip(0), whole.nats, rtol=1e-4, atol=1e-5)


def test_the_same_responses_for_both_authors_have_no_excess(pair, tmp_path):
    student, teacher = pair
    gaps = measure_gaps(write(student, dataset(tmp_path)), student, teacher, NUM_STEPS)
    assert exposure_curve(gaps, gaps).excess.tolist() == [0.0] * NUM_STEPS


def test_both_prefixes_agree_at_the_first_token(pair, tmp_path):
    student, teacher = pair
    data = dataset(tmp_path)
    curve = exposure_curve(
        measure_gaps(write(student, data), student, teacher, NUM_STEPS),
        measure_gaps(write(teacher, data), student, teacher, NUM_STEPS),
    )
    assert curve.excess[0].item() == pytest.approx(0.0, abs=1e-3)
    assert curve.excess[1:].abs().max() > 1


def test_a_student_next_to_its_teacher_has_no_excess_within_the_interval(tmp_path):
    teacher, student = (ends_sometimes(language_model(2)) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    data = dataset(tmp_path, 24)
    by_student, by_teacher = (
        measure_gaps(write(author, data, seed), student, teacher, NUM_STEPS)
        for author, seed in ((student, (1, 2)), (teacher, (3, 4)))
    )
    for per_token in (False, True):
        low, high = exposure_intervals(by_student, by_teacher, per_token=per_token)["excess"]
        assert low[-1] < 0 < high[-1]


def test_an_equal_student_has_no_gap_at_all(tmp_path):
    teacher = language_model(2)
    gaps = measure_gaps(write(teacher, dataset(tmp_path)), teacher, teacher, NUM_STEPS)
    assert gaps.nats.abs().max() == 0
    assert exposure_curve(gaps, gaps).to_dict()["excess"] == [None] * NUM_STEPS


def test_a_model_that_gives_nan_is_refused_with_its_requests(pair, tmp_path):
    _, teacher = pair
    responses = write(teacher, dataset(tmp_path))
    broken = language_model(1)
    with torch.no_grad():
        broken.module.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(UserError, match="requests \\[0, 1, 2, 3, 4\\]"):
        measure_gaps(responses, broken, teacher, NUM_STEPS)


def test_responses_are_a_function_of_request_seed_and_sample(pair, tmp_path):
    student, _ = pair
    data = dataset(tmp_path, 3)
    several = write(student, data, seeds=(5, 6), num_samples=2)
    assert [[len(samples) for samples in several], len(several)] == [[4, 4, 4], 3]
    alone = write(student, data, seeds=(6,), num_samples=2)
    assert [samples[2:] for samples in several] == alone
    assert len({r.response_ids for samples in several for r in samples}) == 12


# -- the authors' script


def naive_authors_script(student, teacher, responses, width, num_steps, pad):
    """An independent re-derivation, position by position, of what their script computes.

    Requests are left-padded to ``width``, responses right-padded, with the stop token for both.
    """
    means, deviations = [], []
    for author in ("student", "teacher"):
        rows = []
        for samples in responses[author]:
            errors = np.zeros((len(samples), num_steps))
            masks = np.zeros((len(samples), num_steps))
            for s, rollout in enumerate(samples):
                left = [pad] * (width - len(rollout.request_ids))
                right = [pad] * (num_steps - len(rollout.response_ids))
                ids = tensor([[*left, *rollout.request_ids, *rollout.response_ids, *right]])
                mask = ids != pad
                positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
                logprobs = [
                    m.module(ids, attention_mask=mask.long(), position_ids=positions)
                    .logits[0, width:, :VOCABULARY]
                    .double()
                    .log_softmax(-1)
                    .numpy()
                    for m in (student, teacher)
                ]
                masks[s] = mask[0, width:].numpy()
                q, p = logprobs
                errors[s] = masks[s] * (np.exp(p) * (p - q)).sum(-1)
            mean = [errors[:, t].sum() / (masks[:, t].sum() + 1e-3) for t in range(num_steps)]
            rows.append(np.cumsum(mean))
        means.append(np.mean(rows, axis=0))
        deviations.append(np.std(rows, axis=0, ddof=1))
    excess = 100 * (means[0] - means[1]) / means[1]
    bar = (abs(deviations[0] / means[0]) + abs(deviations[1] / deviations[1])) * excess
    return means[0], means[1], excess, bar


@torch.no_grad()
def test_the_authors_option_is_their_script_with_its_defects(pair, tmp_path):
    student, teacher = pair
    decoding = GenerationSettings(NUM_STEPS, no_repeat_ngram_size=6)
    data = dataset(tmp_path)
    responses = {
        "student": write(student, data, num_samples=2, decoding=decoding),
        "teacher": write(teacher, data, num_samples=2, decoding=decoding),
    }
    lengths = [len(r.response_ids) for samples in responses["student"] for r in samples]
    assert min(lengths) < NUM_STEPS == max(lengths)  # ended ones and cut ones
    curve = authors_curve(
        *(
            measure_gaps(
                responses[author], student, teacher, NUM_STEPS, authors_script=True, stop=(EOS,)
            )
            for author in ("student", "teacher")
        )
    )
    expected = naive_authors_script(student, teacher, responses, 24, NUM_STEPS, EOS)
    for name, values in zip(
        ("student_gap", "teacher_gap", "excess", "error_bar"), expected, strict=True
    ):
        assert curve[name].tolist() == pytest.approx(values.tolist(), rel=1e-3, abs=1e-3)


def test_the_authors_slice_loses_the_first_term(pair):
    student, teacher = pair
    cut = [[Rollout(0, (10, 20, 30), (40, 50, 60), "measured")]]
    ended = [[Rollout(0, (10, 20, 30), (40, 50, EOS), "measured")]]
    right = measure_gaps(ended, student, teacher, 3).nats[0, 0]
    theirs = measure_gaps(ended, student, teacher, 3, authors_script=True, stop=(EOS,))
    assert theirs.nats[0, 0].tolist() == pytest.approx([*right[1:].tolist(), 0.0])
    assert theirs.lengths.tolist() == [[2]]
    beyond = measure_gaps(cut, student, teacher, 3, authors_script=True, stop=(EOS,))
    longer = [[Rollout(0, (10, 20, 30), (40, 50, 60, 70), "measured")]]
    expected = measure_gaps(longer, student, teacher, 4).nats[0, 0, 1:]
    assert beyond.nats[0, 0].tolist() == pytest.approx(expected.tolist())


# -- runs


def test_a_run_gets_a_file_with_all_that_its_numbers_need(run):
    result = exposure_bias(run, seeds=(1, 2), num_samples=2)
    assert json.loads((run / "exposure_bias.json").read_text()) == result
    assert result["num_examples"] == 4
    assert result["decoding"]["max_new_tokens"] == NUM_STEPS
    assert result["decoding"]["no_repeat_ngram_size"] == 0
    assert result["steps"] == list(range(1, NUM_STEPS + 1))
    assert result["excess"][0] == pytest.approx(0.0, abs=1e-3)
    assert result["excess"] == pytest.approx(
        [
            100 * (r - e) / e
            for r, e in zip(result["student_gap"], result["teacher_gap"], strict=True)
        ]
    )
    for version in (result, result["per_token"]):
        for name in ("student_gap", "teacher_gap", "excess"):
            low, high = (version["intervals"][name][end] for end in ("low", "high"))
            assert len(low) == len(high) == len(version[name])
            assert all(a <= b for a, b in zip(low, high, strict=True))
    assert len(result["excess_by_seed"]) == 2
    assert not list(run.glob(".*"))


def test_the_authors_option_of_a_run_blocks_repeated_6_grams_in_a_file_of_its_own(run):
    result = exposure_bias(run, seeds=(1,), num_samples=2, num_examples=3, authors_script=True)
    saved = json.loads((run / "exposure_bias_authors_script.json").read_text())
    assert saved == result
    assert result["decoding"]["no_repeat_ngram_size"] == 6
    assert result["num_examples"] == 3
    assert len(result["error_bar"]) == len(result["excess"]) == NUM_STEPS


def measuring_every_two_steps(directory):
    save_pair(directory)
    write_data(directory / "train.jsonl")
    write_data(directory / "valid.jsonl", 4)
    return recipe(
        directory,
        data={"validation": str(directory / "valid.jsonl")},
        optimization={"max_steps": 4},
        evaluation={"every_steps": 0, "exposure_bias_every_steps": 2},
    )


def test_training_logs_the_curve_that_the_kept_student_has(tmp_path):
    directory = runs.train(measuring_every_two_steps(tmp_path))
    curves = {
        row["step"]: row["exposure_bias"]
        for row in runs.json_lines(directory / "metrics.jsonl")
        if "exposure_bias" in row
    }
    assert list(curves) == [2, 4]
    expected = exposure_bias(directory, seeds=(VALIDATION_SEED,))
    assert curves[4]["student_gap"] == pytest.approx(expected["student_gap"], rel=1e-4)
    assert curves[4]["teacher_gap"] == pytest.approx(expected["teacher_gap"], rel=1e-4)
    assert curves[2]["student_gap"] != curves[4]["student_gap"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data": {"validation": []}}, "needs at least 1 validation requests"),
        ({"teacher": None, "method": {"name": "sft"}}, "names no teacher with the student's"),
    ],
)
def test_a_curve_that_cannot_be_measured_in_training_is_refused_first(tmp_path, changes, complaint):
    raw = measuring_every_two_steps(tmp_path)
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=complaint):
        runs.train(raw)


def test_ranks_that_gather_their_shares_get_the_whole_curve(pair, tmp_path):
    student, teacher = pair
    data, decoding = dataset(tmp_path), GenerationSettings(NUM_STEPS)
    engine = TransformersEngine(student, (EOS,))
    by_teacher = write(teacher, data)
    own = generate_responses(engine, data, decoding, (1, 2))
    whole = curve_in_training(own, by_teacher, student, teacher, num_steps=NUM_STEPS)
    others = iter(
        measure_gaps(responses[1::2], student, teacher, NUM_STEPS)
        for responses in (own, by_teacher)
    )
    first_of_two = curve_in_training(
        own[::2],
        by_teacher[::2],
        student,
        teacher,
        num_steps=NUM_STEPS,
        gather=lambda found: [*found, next(others)],
    )
    torch.testing.assert_close(first_of_two.excess, whole.excess, rtol=1e-3, atol=1e-3)


def test_a_run_without_a_teacher_is_refused(tmp_path):
    save_pair(tmp_path)
    write_data(tmp_path / "train.jsonl")
    raw = recipe(tmp_path, method={"name": "sft"}, optimization={"max_steps": 1})
    del raw["teacher"]
    run = train(recipe_from_dict(raw))
    with pytest.raises(UserError, match="has no teacher"):
        exposure_bias(run, str(tmp_path / "train.jsonl"))


def test_a_run_without_validation_data_asks_for_data(tmp_path):
    save_pair(tmp_path)
    write_data(tmp_path / "train.jsonl")
    run = train(recipe_from_dict(recipe(tmp_path, optimization={"max_steps": 1})))
    with pytest.raises(UserError, match="no validation data"):
        exposure_bias(run)
    with pytest.raises(UserError, match="too few"):
        exposure_bias(run, str(tmp_path / "train.jsonl"), num_examples=1)


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a finished run"):
        exposure_bias(tmp_path)


def test_a_student_equal_to_its_teacher_is_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "student")
    teacher = json.loads((run / "environment.json").read_text())["identity"]["recipe"]["teacher"]
    shutil.copytree(teacher["model"], copy / "student")
    with pytest.raises(UserError, match="same probabilities as its teacher"):
        exposure_bias(copy, seeds=(1,))
