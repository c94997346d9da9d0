"""A student out of the teacher: fewer layers, the ones whose loss hurts least are dropped.

Which layers go matters more than any warm-up: dropping those whose single removal hurts least
costs a fraction of what evenly spaced layers cost (docs/log.md has the numbers).
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from promptkd.bars import progress_bar
from promptkd.config import ColumnsSection
from promptkd.data import Encoder, given_rows, read_examples, training_set
from promptkd.errors import UserError
from promptkd.files import check_place, whole_directory, write_json
from promptkd.keys import validate
from promptkd.micro_batches import split_by_length
from promptkd.models.language_model import LanguageModel, proven
from promptkd.models.loading import (
    compute_dtype,
    default_device,
    embedding_rows,
    load_model,
    load_tokenizer,
    save_model,
)
from promptkd.models.objects import given_model
from promptkd.records import Record
from promptkd.rollouts import Rollout, reference_rollouts
from promptkd.token_losses import cross_entropies

MICRO_BATCH_TOKENS = 2048


class Pruning(Record):
    """What ``pruning.json`` holds: the layers kept and dropped, and what that cost."""

    def lines(self) -> Iterator[str]:
        """The layers, and the losses where they were measured."""
        yield f"layers dropped: {self.dropped} ({self.search})"
        if "loss_whole" in self:
            yield (
                f"cross-entropy, nats per token: teacher {self.loss_whole:.3f}, "
                f"student {self.loss_pruned:.3f}"
            )


class Reading(TypedDict, total=False):
    """How calibration data are read, as a recipe's ``data`` says it.

    Attributes:
        template: ``auto`` if not given.
        template_options: given to the chat template.
        columns: which column is what, where the names aren't known ones.
        num_calibration_rows: 32 if not given; the shortest 4 in 5 of the first ones are used.
    """

    template: str
    template_options: Mapping[str, Any]
    columns: Mapping[str, Any]
    num_calibration_rows: int


def init_student(
    teacher: Any,
    num_layers: int,
    output: str | Path,
    *,
    calibration: Any = None,
    search: str = "greedy",
    precision: str = "auto",
    tokenizer: Any = None,
    **reading: Unpack[Reading],
) -> Pruning:
    """Write a student with the teacher's tokenizer and ``num_layers`` of its layers.

    Args:
        teacher: a name as ``load_model`` takes it, or a loaded model, which isn't changed.
        calibration: data with reference responses, or rows; without it layers are evenly spaced.
        search: ``greedy`` drops the layer whose absence costs least, measures the others again, and
            so on; ``single`` measures each once and drops the cheapest: quicker and worse.
        tokenizer: of a teacher that is an object; else the one where it came from.
        reading: template, columns and number of the calibration data: see ``Reading``.

    Returns:
        What ``pruning.json`` holds: layers kept and dropped, losses in nats per response token.

    Raises:
        UserError: if the output exists, or the number of layers makes no sense.
    """
    output = _empty(output)
    name = given_model(teacher, tokenizer, "teacher")
    # The kept layers are the student's start: kept exactly, whatever they are measured in.
    module, tokenizer = load_model(name, torch.float32, default_device()), load_tokenizer(name)
    total = len(layers_of(module)[1])
    check_layers(num_layers, total)
    record = Pruning(teacher=name, teacher_layers=total)
    if calibration is None:
        kept, record["search"] = evenly_spaced(total, num_layers), "uniform"
    else:
        sources = list(given_rows(calibration, "calibration"))
        rollouts = _calibration_rollouts(tokenizer, sources, **reading)
        model = _measurable(module, precision, name)
        kept, measured = rank_layers(model, rollouts, num_layers, search)
        record |= {"search": search, "calibration": sources, **measured}
    record |= {"kept": kept, "dropped": [layer for layer in range(total) if layer not in kept]}
    student = keep_layers(module, kept)
    with whole_directory(output, "student") as directory:
        save_model(student, directory)
        tokenizer.save_pretrained(directory)
        write_json(directory / "pruning.json", record)
    return record


def _empty(output: str | Path) -> Path:
    place = Path(output)
    check_place(place)
    if place.exists() and any(place.iterdir()):
        raise UserError(f"{place} exists and is not empty. Choose another output.")
    return place


def _measurable(module: PreTrainedModel, precision: str, name: str) -> LanguageModel:
    dtype = compute_dtype(precision, module.device)
    return proven(LanguageModel(module, embedding_rows(module), dtype), name)


def check_layers(num_layers: int, total: int) -> None:
    """Refuse a student that would keep none of the teacher's layers, or all.

    Raises:
        UserError: with how many there are.
    """
    if not 1 <= num_layers < total:
        raise UserError(
            f"--layers {num_layers}: the teacher has {total} layers, so a student keeps 1 to "
            f"{total - 1} of them."
        )


def layers_of(module: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of transformer layers, and its name.

    Raises:
        UserError: if none of the model's lists has the configured number of layers.
    """
    expected = module.config.get_text_config().num_hidden_layers
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == expected:
            return name, part
    raise UserError(
        f"{type(module).__name__} has no list of its {expected} layers, so it can't be pruned in "
        "depth. Bring a student of your own."
    )


def evenly_spaced(total: int, kept: int) -> list[int]:
    """First and last layer, and even steps between.

    >>> evenly_spaced(7, 3)
    [0, 3, 6]
    """
    if kept == 1:
        return [0]
    return [round(i * (total - 1) / (kept - 1)) for i in range(kept)]


def rank_layers(
    model: LanguageModel, rollouts: Sequence[Rollout], num_layers: int, search: str
) -> tuple[list[int], dict[str, Any]]:
    """The layers to keep, and the cross-entropy (nats per token) with and without each."""
    total = len(layers_of(model.module)[1])
    kept = list(range(total))
    rounds = [total - num_layers] if search == "single" else [1] * (total - num_layers)
    num_passes = sum(total - done for done in range(len(rounds)))
    with (
        model.autocast(),  # weights are cast once for all passes
        progress_bar(total=num_passes, unit="pass", desc="measuring layers") as progress,
    ):
        measured: dict[str, Any] = {"loss_whole": _loss(model, rollouts), "loss_without": []}
        for num_dropped in rounds:
            losses: dict[int, float] = {}
            for layer, loss in losses_without_each(model, rollouts, kept):
                losses[layer] = loss
                progress.update()
            cheapest = sorted(losses, key=lambda layer: losses[layer])[:num_dropped]
            measured["loss_without"].append({str(layer): loss for layer, loss in losses.items()})
            kept = [layer for layer in kept if layer not in cheapest]
        with only_layers(model.module, kept):
            measured["loss_pruned"] = _loss(model, rollouts)
    return kept, measured


def losses_without_each(
    model: LanguageModel, rollouts: Sequence[Rollout], kept: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """Each of the kept layers, and the loss of the others.

    The layers below the missing one aren't run again: what they return is handed on from layer to
    layer, which halves the work.
    """
    _, layers = layers_of(model.module)
    below: list[int] = []
    returned = Returned(layers[kept[0]], [])
    for place, layer in enumerate(kept):
        above = list(kept[place + 1 :])
        with only_layers(model.module, [*below, *above], returned if below else None):
            yield layer, _loss(model, rollouts)
        if not above:
            return
        outputs: list[Any] = []
        hook = layers[layer].register_forward_hook(lambda *call, to=outputs: to.append(call[2]))
        with only_layers(model.module, [*below, layer], returned if below else None):
            _run(model, rollouts)
        hook.remove()
        below, returned = [layer], Returned(layers[layer], outputs)


class Returned(nn.Module):
    """Stands for a layer and all below it: what it returned, micro-batch by micro-batch."""

    def __init__(self, layer: nn.Module, outputs: Sequence[Any]):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.outputs = outputs
        self.num_calls = 0

    def forward(self, *_: Any, **__: Any) -> Any:
        self.num_calls += 1
        return self.outputs[(self.num_calls - 1) % len(self.outputs)]


@contextmanager
def only_layers(
    module: PreTrainedModel, kept: Iterable[int], first: nn.Module | None = None
) -> Iterator[None]:
    """Run the model with some of its layers, in order, as long as the context lasts.

    ``first`` takes the place of the first of them.
    """
    name, layers = layers_of(module)
    parent = module.get_submodule(name.rpartition(".")[0])
    attribute, config = name.rpartition(".")[2], module.config.get_text_config()
    numbers = list(kept)
    chosen = [layers[i] for i in numbers]
    if first is not None:
        chosen[0] = first
    saved = {"num_hidden_layers": config.num_hidden_layers}
    if getattr(config, "layer_types", None):
        saved["layer_types"] = config.layer_types
    setattr(parent, attribute, nn.ModuleList(chosen))
    try:
        config.num_hidden_layers = len(chosen)
        if "layer_types" in saved:
            config.layer_types = [saved["layer_types"][i] for i in numbers]
        yield
    finally:
        setattr(parent, attribute, layers)
        for key, value in saved.items():
            setattr(config, key, value)


def keep_layers(module: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A new model with only the given layers, renumbered."""
    name, _ = layers_of(module)
    config = copy.deepcopy(module.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in kept]
    student = AutoModelForCausalLM.from_config(config).to(module.dtype)
    pattern = re.compile(rf"^{re.escape(name)}\.(\d+)\.")
    state = {}
    for key, tensor in module.state_dict().items():
        match = pattern.match(key)
        if match is None:
            state[key] = tensor
        elif int(match[1]) in kept:
            state[f"{name}.{kept.index(int(match[1]))}.{key[match.end() :]}"] = tensor
    student.load_state_dict(state)
    student.generation_config = copy.deepcopy(module.generation_config)
    return student.eval()


def _calibration_rollouts(
    tokenizer: Any,
    sources: list[str],
    template: str = "auto",
    template_options: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    num_calibration_rows: int = 32,
) -> list[Rollout]:
    encoder = Encoder(tokenizer, template, template_options=template_options)
    mapped = validate(ColumnsSection, dict(columns or {}), prefix="data.columns.")
    data = training_set(read_examples(sources, mapped), encoder)
    if not data.has_references:
        raise UserError(
            f"The calibration data {', '.join(sources)} has rows without a reference response; "
            "the loss that ranks layers needs one in each."
        )
    chosen = reference_rollouts(data.examples[: num_calibration_rows * 5 // 4])
    return sorted(chosen, key=lambda rollout: rollout.num_tokens)[:num_calibration_rows]


def _loss(model: LanguageModel, rollouts: Sequence[Rollout]) -> float:
    return torch.cat(cross_entropies(rollouts, model, MICRO_BATCH_TOKENS)).mean().item()


@torch.no_grad()
def _run(model: LanguageModel, rollouts: Sequence[Rollout]) -> None:
    """The trunk alone, on the micro-batches of ``_loss``."""
    packed = model.packs(max(rollout.num_tokens for rollout in rollouts))
    for batch in split_by_length(rollouts, MICRO_BATCH_TOKENS, model.device, packed=packed):
        model.hidden_states(batch.tokens)
