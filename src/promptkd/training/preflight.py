"""Checks before step 1 for mistakes that corrupt a run silently; codes: ``findings``."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from promptkd.adapters import Prefix
from promptkd.composition import Method
from promptkd.config import THE_STUDENT, Recipe, SamplingSection, TeacherSection
from promptkd.data import Dataset, Encoder
from promptkd.errors import UserError
from promptkd.evaluation.finished_run import TEACHER_LIMIT
from promptkd.evaluation.metrics import NEED_REFERENCES, check_criterion
from promptkd.findings import Finding
from promptkd.micro_batches import pad
from promptkd.models.language_model import LanguageModel, select_responses
from promptkd.models.loading import check_context, embedding_rows
from promptkd.objectives import Objective, SampledToken, Weighted
from promptkd.rollouts import Rollout
from promptkd.teachers import Teacher


def check_data(
    method: Method, data: Dataset, validation: Dataset | None, metric: str, has_teacher: bool
) -> list[Finding]:
    """Refuse what the method or the metric can't use.

    Returns:
        What is only worth a warning.

    Raises:
        UserError: if references are needed and missing, or a teacher is.
    """
    if method.needs_references and not data.has_references:
        first = next(e for e in data.examples if e.response_ids is None)
        missing = first.where or f"row {first.index} (counted from 0)"
        raise UserError(
            f"The method '{method.name}' learns from reference responses, but {missing} "
            "has none. Add an 'output' column, or use rollouts "
            "written by the student: method.name=promptkd, or gkd with student_share=1.",
            "PK101",
        )
    if method.needs_validation and not (validation and validation.has_references):
        raise UserError(
            f"The method '{method.name}' is steered by the validation loss, but data.validation "
            "has no references, or isn't given. Add held-out data with an 'output' column.",
            "PK102",
        )
    if method.needs_teacher and not has_teacher:
        raise UserError(
            f"The method '{method.name}' needs a teacher, but the recipe names none. "
            "Add 'teacher: {model: ...}'.",
            "PK103",
        )
    if metric == "reverse_kl_to_teacher" and validation and not has_teacher:
        raise UserError(
            "evaluation.metric reverse_kl_to_teacher needs a teacher in the recipe. Add "
            "'teacher: {model: ...}', or choose another metric.",
            "PK104",
        )
    if validation:
        references = [example.references for example in validation.examples]
        if metric in NEED_REFERENCES and not any(references):
            raise UserError(
                f"evaluation.metric {metric} compares with references, but data.validation has "
                "none. Add them, or use evaluation.metric=reverse_kl_to_teacher.",
                "PK104",
            )
        if left_out := check_criterion(metric, references):
            return [Finding("PK110", left_out)]
    return []


def check_sampling(method: Method, sampling: SamplingSection) -> None:
    """Refuse an estimate from sampled tokens where they come from another law than the student's.

    Its expectation would be another loss. MiniLLM's weights correct for the law; these can't.

    Raises:
        UserError: with the settings to take.
    """
    plain = sampling.temperature == 1 and sampling.top_p == 1 and sampling.top_k == 0
    if not plain and any(_samples_tokens(term.objective) for term in method.terms):
        raise UserError(
            f"The method '{method.name}' estimates KL(student || teacher) from the tokens that the "
            f"student samples, so they have to come from the student's own law; sampling has "
            f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k "
            f"{sampling.top_k}. Set 1, 1 and 0, or use gkd, which compares whole vocabularies.",
            "PK111",
        )


def _samples_tokens(objective: Objective) -> bool:
    if isinstance(objective, Weighted):
        return any(_samples_tokens(part) for _, part in objective.parts)
    return isinstance(objective, SampledToken)


def check_reads_more(method: Method, section: TeacherSection | None) -> None:
    """Refuse a method that copies a teacher's context from a teacher that has none.

    Raises:
        UserError: naming the keys that give it one.
    """
    if method.needs_context and not (section and section.reads_more):
        raise UserError(
            f"The method '{method.name}' teaches what its teacher reads and the student doesn't, "
            "but the teacher reads nothing more. Set teacher.context (a column), teacher.system or "
            "teacher.context_template.",
            "PK112",
        )


def check_self_teacher(section: TeacherSection, encoder: Encoder | None, teacher: Teacher) -> None:
    """Refuse a student that copies itself: its teacher must read or say something else.

    Raises:
        UserError: naming what may differ.
    """
    says_more = teacher.front_length > 0 or bool(teacher.parameters())
    if section.model == THE_STUDENT and encoder is None and not says_more:
        raise UserError(
            "The teacher is the student itself and reads the same requests: there is nothing to "
            "learn from it. Set teacher.context or teacher.system, or use method.name=promptkd.",
            "PK204",
        )


def check_gradient(teacher: Teacher) -> None:
    """Refuse a teacher through whose weights, as they are held, no gradient comes.

    Raises:
        UserError: naming what is wrong with it.
    """
    learned = teacher.parameters()
    if not learned:
        return
    tokens = torch.arange(1, 9, device=teacher.model.device)[None]
    hidden = teacher.hidden_states(tokens.clamp_max(teacher.model.vocabulary - 1)).float()
    loss = (hidden * torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)).sum()
    gradients = torch.autograd.grad(loss, learned, allow_unused=True)
    norms = [torch.zeros(()) if g is None else g.detach().norm().cpu() for g in gradients]
    norm = torch.stack([own.float() for own in norms]).sum().item()
    if norm == 0 or not math.isfinite(norm):
        raise UserError(
            f"The gradient that comes through the teacher to what is adapted has the norm {norm}: "
            "nothing would be learnt. Leave out teacher.quantization or teacher.offload if one is "
            "set, or use gkd; please report the model.",
            "PK209",
        )


def check_contexts(recipe: Recipe, context: str | None, validates_teacher: bool) -> None:
    """Refuse to measure a teacher that reads what the validation data haven't.

    Raises:
        UserError: naming the setting that measures it.
    """
    evaluation = recipe.evaluation
    measured = [
        *(["evaluation.metric"] if evaluation.metric == "reverse_kl_to_teacher" else []),
        *(["evaluation.exposure_bias_every_steps"] if evaluation.exposure_bias_every_steps else []),
    ]
    if measured and not validates_teacher:
        raise UserError(
            f"{measured[0]} measures the distance to a teacher that reads the column '{context}' "
            "(teacher.context), which no row of data.validation has. Bring it, or measure "
            "something else.",
            "PK104",
        )


def check_batch(global_batch_size: int, num_rows: int, num_ranks: int) -> None:
    """Refuse a batch that the data or the processes can't fill.

    Raises:
        UserError: with the number that it is compared with.
    """
    if global_batch_size < num_ranks:
        raise UserError(
            f"global_batch_size {global_batch_size} is smaller than the number of processes "
            f"{num_ranks}: some would have nothing to do. Raise it, or start fewer.",
            "PK107",
        )
    if global_batch_size > num_rows:
        raise UserError(
            f"optimization.global_batch_size is {global_batch_size}, but data.train has only "
            f"{num_rows} rows that can be used: a step would see rows twice. Lower it, or bring "
            "more data.",
            "PK106",
        )


def check_sharding(recipe: Recipe, num_ranks: int) -> None:
    """Refuse to share a model among one.

    Raises:
        UserError: with the way to start several processes.
    """
    if recipe.sharding != "none" and num_ranks == 1:
        raise UserError(
            f"sharding is {recipe.sharding}, which shares the models among processes, but there is "
            "one. Start several: torchrun --nproc_per_node N -m promptkd ..., or set sharding=none."
        )


def check_checkpointed(teacher: Any) -> None:
    """Refuse a checkpointed teacher that is adapted by keys and values: they would be dropped.

    Raises:
        UserError: with the key to leave out.
    """
    if isinstance(teacher, Prefix):
        raise UserError(
            "teacher.gradient_checkpointing is true, but this method's teacher reads a prefix of "
            "keys and values, which transformers drops from checkpointed layers. Leave it out."
        )


def check_token_ids(datasets: Sequence[Dataset], tokenizer: Any, vocabulary: int) -> None:
    """Refuse data with tokens that the student has no embedding for.

    Raises:
        UserError: naming the first row and token.
    """
    for example in (example for dataset in datasets for example in dataset.examples):
        highest = max(*example.request_ids, *(example.response_ids or ()), 0)
        if highest >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(highest)
            raise UserError(
                f"{example.where or f'Row {example.index} (counted from 0)'}: the text holds the "
                f"token {token!r} (id {highest}), "
                f"but the student has only {vocabulary} embedding rows. Take the text out, or use "
                "the tokenizer that belongs to the model.",
                "PK108",
            )


def check_exposure_bias(validation: Dataset | None, comparable: bool, num_ranks: int) -> None:
    """Refuse what can't be measured during training.

    Raises:
        UserError: without a teacher of the student's tokenizer, or a request for every process.
    """
    if not comparable:
        raise UserError(
            "evaluation.exposure_bias_every_steps compares the student with its teacher token by "
            "token, but the recipe names no teacher with the student's tokenizer. Set it to 0.",
            "PK105",
        )
    if validation is None or len(validation) < num_ranks:
        raise UserError(
            f"evaluation.exposure_bias_every_steps needs at least {num_ranks} validation "
            f"requests, one per process; there are {len(validation) if validation else 0}. "
            "Set data.validation.",
            "PK105",
        )


@torch.no_grad()
def check_models(
    student: LanguageModel,
    teacher: Teacher | None,
    encoder: Encoder,
    sets: Sequence[Dataset],
    *,
    stop: Sequence[int],
    names: tuple[str, str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Check the pair on real requests (training's are the first of ``sets``), say what was found.

    Raises:
        UserError: if lengths exceed a context, or the prompt does nothing.
    """
    tokenizer = encoder.tokenizer
    lengths = encoder.max_request_tokens, encoder.max_response_tokens
    check_context(student.module.config, *lengths, f"the student {names[0]}")
    stops = tuple(stop)
    found: dict[str, Any] = {"stop_ids": list(stops), "vocabulary": student.vocabulary}
    say(f"responses end with {[tokenizer.convert_ids_to_tokens(i) for i in stops]} {list(stops)}")
    if teacher is None:
        return found
    front = teacher.front_length
    whose, config = f"the teacher {names[1]}", teacher.model.module.config
    if any(data.has_teacher_requests for data in sets):
        own = max(data.longest_teacher_request for data in sets), lengths[1]
        check_context(config, *own, whose, front, limit=TEACHER_LIMIT)
    else:
        check_context(config, *lengths, whose, front)
    probes = sets[0].examples[:4]
    rollouts = [Rollout.answer(e, e.request_ids[-1:], author="probe") for e in probes]
    batch = pad(rollouts, student.device).for_teacher
    hidden = teacher.plain_hidden_states(batch.tokens)
    states = select_responses(hidden, batch.response_mask)
    rows = [embedding_rows(m.module) for m in (student, teacher.model)]
    whole = LanguageModel(teacher.model.module, rows[1], teacher.model.dtype)
    logprobs = whole.head.logprobs(states)
    beyond = logprobs[:, student.vocabulary :]
    outside = beyond.exp().sum(-1).max().item()  # 0 where there is nothing beyond
    found["teacher_mass_outside"] = outside
    say(
        f"vocabulary: token tables equal; student {rows[0]} rows, teacher {rows[1]}: the first "
        f"{student.vocabulary} are compared; teacher mass cut off: at most {outside:.2g}"
    )
    if front:
        adapted = select_responses(teacher.hidden_states(batch.tokens), batch.response_mask)
        _check_front(adapted, states)
    return found


def _check_front(adapted: Tensor, plain: Tensor) -> None:
    if (adapted.float() - plain.float()).abs().max().item() == 0:
        raise UserError(
            "What is put in front of the teacher doesn't change what it says: its hidden states "
            "are equal with and without it. This architecture ignores it; please report it.",
            "PK202",
        )
