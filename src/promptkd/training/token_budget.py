"""How many tokens fit into memory at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from jaxtyping import Int
from torch import Tensor, nn

from promptkd.errors import UserError
from promptkd.models.language_model import LanguageModel
from promptkd.ranks import Ranks
from promptkd.teachers import Teacher

CEILINGS = {"cpu": 4096, "cuda": 32768}
"""Tokens beyond which matmuls don't get faster."""


@dataclass(frozen=True)
class Budget:
    """Of tokens, padding included.

    Attributes:
        micro_batch: of a forward pass.
        kept: of a step whose graphs of student and teacher are both kept meanwhile.
    """

    micro_batch: int
    kept: int


SHARE = 0.5
"""Of free memory; activations that aren't kept, fragments and other processes need the rest."""

Trunk = Callable[[Int[Tensor, "batch time"]], Tensor]
"""A model's hidden states, with a graph if anything in it learns."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the GPU, or on the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def bytes_per_token(trunk: Trunk, parameters: Sequence[nn.Parameter], device: torch.device) -> int:
    """What every token of a forward pass keeps until the backward pass.

    Counted in two passes of different length, so that what doesn't grow drops out.

    Args:
        parameters: the model's; kept too, but they are there anyway.
        device: the model's.
    """
    there = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    lengths, kept = (16, 32), []
    for length in lengths:
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in there:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.ones(1, length, dtype=torch.long, device=device)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = trunk(tokens)
        kept.append(sum(storages.values()))
        del hidden
    return (kept[1] - kept[0]) // (lengths[1] - lengths[0])


def token_budget(
    per_token: Sequence[int], reserved: int, free: int, longest: int, device: torch.device
) -> Budget:
    """The most tokens of a micro-batch, padding included.

    A pass builds the graph of one model that learns, so the larger counts; where a step is small
    enough for the sum of them, the student's is kept while the teacher learns.

    Args:
        per_token: bytes that each keeps in the graph of each model that learns.
        reserved: bytes that training will take whatever the budget: gradients, optimizer state.
        free: bytes.
        longest: tokens of the longest sequence, which must fit.

    Raises:
        UserError: if not even one longest sequence fits.
    """
    usable = SHARE * (free - reserved)
    fitting = int(usable / max(per_token))
    if fitting < longest:
        raise UserError(
            f"A sequence of {longest} tokens does not fit into memory: {free / 1e9:.1f} GB are "
            f"free, gradients and optimizer state take {reserved / 1e9:.1f} GB of them, and a "
            f"token {max(per_token) / 1e6:.2f} MB. Use gradient_checkpointing, shorter sequences, "
            "a LoRA student, or set micro_batch_tokens yourself to try it."
        )
    micro_batch = max(longest, min(fitting, CEILINGS[device.type]))
    return Budget(micro_batch, kept=min(micro_batch, int(usable / sum(per_token))))


def measured_budget(
    student: LanguageModel,
    teacher: Teacher | None,
    longest: int,
    *,
    together: bool,
    ranks: Ranks,
    say: Callable[[str], None],
) -> Budget:
    """The same, from what a token keeps in the models that learn, and what is free here.

    Args:
        student: learns.
        teacher: learns, or not, or there is none.
        longest: tokens of a request and its response, what stands in front of the teacher's aside.
        together: whether both learn from one pass, so that both graphs are there at a time.
        ranks: share a machine's memory on the CPU; the one with the least decides for all.
        say: is told the result.
    """
    device = student.device
    learners: list[tuple[Trunk, LanguageModel]] = [(student.hidden_states, student)]
    if teacher and teacher.parameters():
        learners.append((teacher.hidden_states, teacher.model))
    kept = [
        bytes_per_token(trunk, list(model.module.parameters()), device) for trunk, model in learners
    ]
    per_token = [sum(kept)] if together else kept
    trained = sum(p.nbytes for p in student.module.parameters() if p.requires_grad)
    free = free_memory(device) // (ranks.number if device.type == "cpu" else 1)
    free = min(ranks.gather([free]))
    longest += teacher.front_length if teacher else 0
    budget = token_budget(per_token, 3 * trained, free, longest, device)
    say(
        f"micro_batch_tokens: {budget.micro_batch} ({free / 1e9:.1f} GB free, "
        f"{max(per_token) / 1e6:.2f} MB kept per token)"
    )
    return budget
