"""How a step's work is cut changes nothing but float noise, and what a step must and must not do.

SGD with rate 1 and without clipping: the update is the gradient, scale errors included.
"""

from dataclasses import dataclass

import pytest
import torch

import tiny
from promptkd.composition import Method, Term
from promptkd.errors import UserError
from promptkd.micro_batches import pad, split_by_length
from promptkd.models.language_model import LanguageModel, select_responses
from promptkd.objectives import CrossEntropy, Divergence, States, Tiling, accumulate
from promptkd.rollouts import Reference, Rollout, Stateless, reference_rollouts
from promptkd.teachers import Adaptation, Frozen, SoftPrompt, TextPrompt
from promptkd.training.learner import Learner
from promptkd.training.step import LossNotFinite, Step, StepSettings

CPU = torch.device("cpu")


@dataclass(frozen=True)
class FirstHalf(Stateless):
    """The references of the first half of the batch: a source with fewer tokens."""

    needs_references = True

    def generate(self, batch, generators, state):
        return reference_rollouts(batch.examples[: len(batch.examples) // 2])


def written(seed=0, lengths=((3, 4), (9, 1), (1, 12), (5, 7), (2, 2), (14, 9))):
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for index, (request, response) in enumerate(lengths):
        ids = torch.randint(2, 98, (request + response,), generator=generator).tolist()
        rollouts.append(Rollout(index, tuple(ids[:request]), tuple(ids[request:]), "reference"))
    return rollouts


def promptkd_method(terms=None):
    return Method(
        "promptkd",
        terms or (Term(Reference(), Divergence("reverse_kl")),),
        SoftPrompt(),
        Adaptation(),
    )


def step_of(
    architecture, method, *, rate=1.0, max_grad_norm=1e9, teacher_step="before_student", **options
):
    """A step with SGD, whose update is the gradient itself, and without clipping."""
    student = tiny.language_model(tiny.model(architecture, seed=1), tiny.ROWS)
    module = tiny.model(architecture, num_layers=3, rows=128, seed=2).requires_grad_(False)
    teacher = method.teacher.build(tiny.language_model(module, tiny.ROWS), tiny.tokenizer())
    learners = [
        Learner(list(parameters), torch.optim.SGD(list(parameters), lr=rate))
        if parameters
        else None
        for parameters in (list(student.module.parameters()), teacher.parameters())
    ]
    return Step(
        method,
        student,
        teacher,
        student_learner=learners[0],
        teacher_learner=learners[1],
        settings=StepSettings(
            max_grad_norm=max_grad_norm,
            teacher_step=teacher_step,
            **{"micro_batch_tokens": 64, **options},
        ),
    )


def updates(architecture, method, rollouts, step=0, max_steps=4, **options):
    """What one step of SGD with rate 1 adds to the student and to the soft prompt."""
    stepper = step_of(architecture, method, **options)
    trained = dict(stepper.student.module.named_parameters())
    if stepper.teacher.soft_prompt is not None:
        trained["soft_prompt"] = stepper.teacher.soft_prompt
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    metrics = stepper(rollouts, step, max_steps)
    moved = {name: parameter.detach() - before[name] for name, parameter in trained.items()}
    return moved, metrics


def assert_same_updates(actual, expected, tolerance=1e-5):
    scale = torch.cat([e.flatten() for e in expected.values()]).norm()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * max(value.norm(), 1e-2 * scale), name


def test_a_step_whose_real_tokens_fit_the_budget_computes_nothing_twice(monkeypatch):
    passes = []
    given = LanguageModel.hidden_states
    monkeypatch.setattr(LanguageModel, "hidden_states", lambda *a: passes.append(a) or given(*a))
    num_tokens = sum(rollout.num_tokens for rollout in written())
    assert len(split_by_length(written(), num_tokens, CPU)) > 1  # padding wouldn't fit

    def step(budget):
        passes.clear()
        return updates("llama", promptkd_method(), [written()], micro_batch_tokens=budget)

    proofs = step(10_000) and len(passes) - 4
    whole, metrics = step(num_tokens)
    assert len(passes) - proofs == 4  # the student's, the adapted teacher's twice, the plain one's
    assert metrics.padding_share == 0
    cut, _ = step(num_tokens - 1)
    assert len(passes) - proofs == 2 * 5  # once more by the student, who is taught in a second pass
    assert_same_updates(cut, whole)


@pytest.mark.parametrize("teacher_step", ["before_student", "with_student"])
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "gemma2"])
def test_micro_batches_and_tiles_do_not_change_the_step(architecture, teacher_step):
    method, rollouts = promptkd_method(), [written()]
    expected, whole = updates(
        architecture, method, rollouts, micro_batch_tokens=10_000, teacher_step=teacher_step
    )
    tilings = Tiling(10**6, 10**6), Tiling(1, 1), Tiling(3 * tiny.ROWS, 2 * tiny.ROWS)
    for micro_batch_tokens, tiling in zip((1, 40, 10_000), tilings, strict=True):
        actual, metrics = updates(
            architecture,
            method,
            rollouts,
            teacher_step=teacher_step,
            micro_batch_tokens=micro_batch_tokens,
            tiling=tiling,
        )
        assert_same_updates(actual, expected)
        for name in ("student", "towards_student", "towards_itself"):
            assert metrics.nats[name] == pytest.approx(whole.nats[name], rel=1e-6)


def test_the_order_of_the_rollouts_does_not_change_the_step():
    method, rollouts = promptkd_method(), written()
    expected, _ = updates("llama", method, [rollouts])
    actual, _ = updates("llama", method, [rollouts[::-1]])
    assert_same_updates(actual, expected)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_longer_padding_does_not_change_loss_or_gradient(architecture):
    teacher = tiny.model(architecture, num_layers=3, seed=2).requires_grad_(False)

    def gradients(length):
        student = tiny.language_model(tiny.model(architecture, seed=1), tiny.ROWS)
        batch = pad(written(), CPU, length)
        assert batch.tokens.shape[1] >= length
        states = {
            name: States(
                select_responses(m.hidden_states(batch.tokens), batch.response_mask), m.head, learns
            )
            for name, m, learns in (
                ("student", student, True),
                ("teacher", tiny.language_model(teacher, tiny.ROWS), False),
            )
        }
        nats = accumulate(
            states,
            lambda logprobs, _: {
                "student": Divergence("reverse_kl").between(
                    logprobs["student"], logprobs["teacher"]
                )
            },
            {"student": 1 / 35},
        )
        return {n: p.grad for n, p in student.module.named_parameters()}, nats["student"]

    expected, nats = gradients(0)
    actual, padded_nats = gradients(60)
    assert len(nats) == 35
    torch.testing.assert_close(padded_nats, nats, rtol=1e-4, atol=1e-6)
    assert_same_updates(actual, expected)


@pytest.mark.parametrize("teacher_step", ["before_student", "with_student"])
def test_last_step_has_no_pull_towards_the_plain_teacher(teacher_step):
    free = Method("free", promptkd_method().terms, SoftPrompt(), Adaptation(regularizer=0.0))
    expected, _ = updates("llama", free, [written()], teacher_step=teacher_step)
    last, metrics = updates(
        "llama", promptkd_method(), [written()], step=3, max_steps=4, teacher_step=teacher_step
    )
    first, _ = updates(
        "llama", promptkd_method(), [written()], step=0, max_steps=4, teacher_step=teacher_step
    )
    assert torch.equal(last["soft_prompt"], expected["soft_prompt"])
    assert "towards_itself" not in metrics.nats
    difference = first["soft_prompt"] - last["soft_prompt"]
    assert difference.norm() > 0.01 * last["soft_prompt"].norm()


def test_student_sees_the_new_prompt_only_when_the_teacher_moves_first():
    fixed = Method("fixed", promptkd_method().terms, TextPrompt("Suppose"))
    old_prompt, _ = updates("llama", fixed, [written()])
    together, _ = updates("llama", promptkd_method(), [written()], teacher_step="with_student")
    before, _ = updates("llama", promptkd_method(), [written()], teacher_step="before_student")
    for moved in (old_prompt, together, before):
        moved.pop("soft_prompt")
    assert_same_updates(together, old_prompt, tolerance=1e-6)
    head = "lm_head.weight"
    assert (before[head] - old_prompt[head]).norm() > 0.01 * old_prompt[head].norm()


def test_gradients_are_clipped_to_their_global_norm():
    _, metrics = updates("llama", promptkd_method(), [written()])
    limit = 0.5 * metrics.gradient_norms["student"]
    moved, clipped_metrics = updates("llama", promptkd_method(), [written()], max_grad_norm=limit)
    moved.pop("soft_prompt")
    norm = torch.cat([m.flatten() for m in moved.values()]).norm().item()
    assert norm == pytest.approx(limit, rel=1e-4)
    assert clipped_metrics.gradient_norms["student"] > limit


def test_nothing_is_updated_with_a_loss_that_is_not_finite():
    stepper = step_of("gpt2", promptkd_method(), micro_batch_tokens=20)
    with torch.no_grad():
        stepper.student.module.transformer.wpe.weight[20] = torch.nan  # the longest row alone
    before = {n: p.detach().clone() for n, p in stepper.student.module.named_parameters()}
    soft_prompt = stepper.teacher.soft_prompt.detach().clone()
    with pytest.raises(LossNotFinite, match=r"step 3, on the training examples \[5\]"):
        stepper([written()], 2, 4)
    assert issubclass(LossNotFinite, UserError)
    assert torch.equal(stepper.teacher.soft_prompt, soft_prompt)
    for name, parameter in stepper.student.module.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name


def test_a_step_of_two_terms_adds_up_their_token_means_with_their_weights():
    terms = (
        Term(Reference(), CrossEntropy(), weight=0.3),
        Term(FirstHalf(), Divergence("forward_kl"), weight=0.7),
    )
    method = Method("two", terms, Frozen())
    rollouts = written()
    actual, _ = updates("gpt2", method, [rollouts, rollouts[:3]], micro_batch_tokens=30)

    student = tiny.model("gpt2", seed=1).double()
    teacher = tiny.model("gpt2", num_layers=3, rows=128, seed=2).double()
    total = 0.0
    for term, share in ((0, rollouts), (1, rollouts[:3])):
        count = sum(len(r.response_ids) for r in share)
        for rollout in share:
            tokens = torch.tensor(rollout.request_ids + rollout.response_ids)
            start = len(rollout.request_ids)
            q = student(tokens[None]).logits[0, start - 1 : -1].log_softmax(-1)
            if term == 0:
                total = total - 0.3 / count * sum(
                    q[t, y] for t, y in enumerate(rollout.response_ids)
                )
            else:
                logits = teacher(tokens[None]).logits[0, start - 1 : -1, : tiny.ROWS]
                p = logits.log_softmax(-1).detach()
                total = total + 0.7 / count * (p.exp() * (p - q)).sum()
    names, parameters = zip(*student.named_parameters(), strict=True)
    expected = {n: -g for n, g in zip(names, torch.autograd.grad(total, parameters), strict=True)}
    assert_same_updates({n: u.double() for n, u in actual.items()}, expected)
