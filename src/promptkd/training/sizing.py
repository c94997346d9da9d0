"""What a run takes on machines that aren't at hand: bytes and seconds, as equations. No torch.

    bytes   = weights + gradients + AdamW + writing + losses + tokens of a micro-batch x kept
    seconds = writing + passes of the trunks + losses + talk of the ranks

An estimate: attention's own products, loading, evaluation and the wait for the longest response
are left out. What is calibrated, and on what, is said at each ``Machine``.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

CONTEXT_BYTES = {"cuda": 0.7e9, "cpu": 0.0}
"""Of the device's own library."""
LOSS_BYTES = {"cuda": 2.0e9, "cpu": 0.2e9}
"""Both models' logits of a chunk and temporaries of a tile, ``objectives.TILINGS``."""
USABLE = 0.9
"""Of a card's memory; the allocator's fragments take the rest."""
BITS = {None: 16.0, "8bit": 8.1, "4bit": 4.5}
"""Of a weight in the teacher's linear layers, scales counted."""


@dataclass(frozen=True)
class Shape:
    """A decoder of gated MLPs, as Llama's and Qwen's are; other architectures come near."""

    layers: int
    width: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool

    @classmethod
    def of_config(cls, config: Any) -> "Shape":
        """From transformers' configuration of a text model."""
        heads, width = config.num_attention_heads, config.hidden_size
        head = getattr(config, "head_dim", None) or width // heads
        return cls(
            layers=config.num_hidden_layers,
            width=width,
            intermediate=getattr(config, "intermediate_size", None) or 4 * width,
            queries=heads * head,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
        )

    @property
    def layer(self) -> int:
        """Weights of one."""
        return self.width * (2 * self.queries + 2 * self.keys + 3 * self.intermediate)

    @property
    def trunk(self) -> int:
        return self.layers * self.layer

    @property
    def head(self) -> int:
        return self.vocabulary * self.width

    @property
    def ends(self) -> int:
        """Weights of embeddings and head."""
        return self.head * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        return self.trunk + self.ends

    def kept_per_token(self, learns: bool, checkpointed: bool) -> float:
        """Bytes that a token keeps in the graph in mixed precision, transformers' layers on a GPU.

        With h the width, i the MLP's and k keys' and values', a layer keeps

            30 h + 4 k + 8 i    that learns: fp32 norms, every product's bf16 input
            12 h + 4 k + 6 i    frozen, under a prompt that learns: no product's input
            4 h, 2 h            the same, checkpointed: the layer's input; and one layer whole

        Counted on 1.5B and 7B (Qwen2.5's shapes): 3.34 and 4.46 MB a token; the equations give
        3.33 and 4.44. q is as wide as h there; elsewhere its own width stands for the attention's
        part of h.
        """
        norms, products, gates = (26, 4, 8) if learns else (8, 4, 6)
        attention = products * (self.queries + self.keys)
        layer = norms * self.width + attention + gates * self.intermediate
        if checkpointed:
            return layer + self.layers * (4 if learns else 2) * self.width
        return self.layers * layer


@dataclass(frozen=True)
class Machine:
    """One rank's.

    Attributes:
        flops: per second, of large products.
        trunk_share: of it, in the passes of the models.
        loss_share: of it, between hidden states and losses.
        bandwidth: bytes of weights per second, while text is written.
        launch: seconds of the host for a kernel; 0 where it isn't what one waits for.
        link: bytes per second between two ranks of a machine.
        network: bytes per second of a rank to other machines.
        latency: seconds of one message.
        bus: bytes per second from the machine's memory to the card.
        per_machine: ranks of one.
        source: where the numbers come from.
    """

    flops: float
    trunk_share: float
    loss_share: float
    bandwidth: float
    launch: float
    link: float
    network: float
    latency: float
    bus: float
    per_machine: int
    source: str


EPYC = Machine(
    flops=8.68e11,
    trunk_share=0.60,
    loss_share=0.48,
    bandwidth=11.6e9,
    launch=0.0,
    link=4e9,
    network=1e9,
    latency=1e-4,
    bus=math.inf,
    per_machine=1,
    source="two cores of an AMD EPYC in bf16, measured (benchmarks/results/phases.bf16.json); its "
    "talk is not",
)
H100 = Machine(
    flops=989e12,
    trunk_share=0.43,
    loss_share=0.25,
    bandwidth=2.0e12,
    launch=7e-6,
    link=300e9,
    network=40e9,
    latency=2e-5,
    bus=50e9,
    per_machine=8,
    source="the H100's data sheet and estimated shares of it; not measured",
)


@dataclass(frozen=True)
class Plan:
    """A run as the equations see it.

    Attributes:
        student: its shape.
        teacher: its shape, or None.
        batch: requests of a step, over all ranks.
        micro_batch: tokens of one as the recipe sets them; None where they are measured.
        request: tokens, on average; ``response`` likewise.
        longest: tokens of the longest row, prompt included.
        adapts: whether the teacher learns (a soft prompt, LoRA).
        together: ``teacher_step: with_student``.
        on_policy: whether the student writes.
        vllm_share: of a card's memory, for vLLM; None where it doesn't write.
        vllm_sleeps: whether it gives that back while the models learn.
        lora: whether the student learns by adapters.
        quantization: of the teacher.
        offload: of the teacher.
        checkpointed: the student's graph; ``teacher_checkpointed`` the teacher's.
        sharded: over all ranks, both models; else every rank holds them whole.
        gathered_for_step: whether layers of sharded models stay gathered from their first pass of a
            step to its last.
        ranks: how many.
        memory: bytes of a card.
        device: cuda | cpu.
    """

    student: Shape
    teacher: Shape | None
    batch: int
    request: float
    response: float
    longest: int
    micro_batch: int | None = None
    adapts: bool = True
    together: bool = False
    on_policy: bool = True
    vllm_share: float | None = None
    vllm_sleeps: bool = False
    lora: bool = False
    quantization: str | None = None
    offload: bool = False
    checkpointed: bool = False
    teacher_checkpointed: bool = False
    sharded: bool = False
    gathered_for_step: bool = False
    ranks: int = 1
    memory: float = 80e9
    device: str = "cuda"

    @property
    def vllm(self) -> bool:
        return self.on_policy and self.vllm_share is not None

    @property
    def tokens(self) -> float:
        """Of the step of a rank that has the most, responses and all."""
        return self.rows * (self.request + self.response)

    @property
    def rows(self) -> int:
        """Of a rank that has the most: the others wait for it."""
        return math.ceil(self.batch / self.ranks)


def standing_bytes(plan: Plan) -> dict[str, float]:
    """What a rank holds whatever the micro-batch.

    Of a student of N weights that learns whole: 4 N of fp32 weights, 4 N of gradient, 8 N of
    AdamW, and 2 N that its graph keeps of the weights in bf16, as they were multiplied; of LoRA's
    2 N (its adapters, about a hundredth, count 16 bytes a weight). Of a frozen teacher 2 N, or
    what its linear layers are held in. Sharded, each is divided by the ranks, adapters aside, and
    the graph keeps no weights; see ``_gathered``.
    """
    own, parts = plan.student, plan.ranks if plan.sharded else 1
    trained = own.weights * (0.01 if plan.lora else 1)
    held = {
        "student": 2 * own.weights / parts + 4 * trained if plan.lora else 4 * own.weights / parts,
        "gradients and optimizer": 12 * trained / (1 if plan.lora else parts),
    }
    if plan.teacher:
        bits = 0.0 if plan.offload else BITS[plan.quantization]
        held["teacher"] = (bits / 8 * plan.teacher.trunk + 2 * plan.teacher.ends) / parts
    if not plan.lora and not plan.sharded:
        held["student in bf16"] = 2 * (own.layer if plan.checkpointed else own.trunk)
    if plan.sharded:
        held["gathered"] = _gathered(plan)
    if plan.vllm and not plan.vllm_sleeps:
        held["vLLM"] = (plan.vllm_share or 0.0) * plan.memory
    return held | {"losses": LOSS_BYTES[plan.device], "CUDA": CONTEXT_BYTES[plan.device]}


def _gathered(plan: Plan) -> float:
    """Of sharded models, what is whole when the student's backward pass begins.

    The teacher's ends (embeddings, head), the student's and their gradient, and two layers of each
    in bf16, or all. Ends are gathered as they are stored: 4 bytes of a student that learns whole,
    else 2.
    """
    own, other = plan.student, plan.teacher
    layers = [
        2 * (each.trunk if plan.gathered_for_step else 2 * each.layer)
        for each in (own, other)
        if each
    ]
    ends = (2 if plan.lora else 4 + 4) * own.ends + (2 * other.ends if other else 0)
    return ends + sum(layers)


def writing_bytes(plan: Plan, batch_tokens: int = 32768) -> float:
    """While responses are written, more than what stands.

    By transformers: a copy in bf16, keys and values of a batch of rows, and of the requests that
    are read beside it where some wait for a row; by a vLLM that sleeps meanwhile: its share.
    """
    if plan.vllm:
        return (plan.vllm_share or 0.0) * plan.memory if plan.vllm_sleeps else 0.0
    if not plan.on_policy:
        return 0.0
    own = plan.student
    tokens = plan.rows * plan.longest
    if tokens > batch_tokens:
        tokens = batch_tokens * (1 + plan.request / (plan.request + plan.response))
    return 2 * own.weights * (plan.sharded or not plan.lora) + 4 * own.layers * own.keys * tokens


def kept_per_token(plan: Plan) -> float:
    """Of the larger graph; of both where they are there together."""
    kept = [plan.student.kept_per_token(True, plan.checkpointed)]
    if plan.teacher and plan.adapts:
        kept.append(plan.teacher.kept_per_token(False, plan.teacher_checkpointed))
    return sum(kept) if plan.together else max(kept)


def peak_bytes(plan: Plan, tokens: int) -> dict[str, float]:
    """The most that a rank holds: while it writes, or learns from micro-batches of ``tokens``.

    What only learning needs isn't there while writing. At the end of a sharded student's pass the
    graph gives way to a copy of its ends' gradient, which is being summed.
    """
    held = standing_bytes(plan)
    summed = 4 * plan.student.ends * (plan.sharded and not plan.lora)
    learning = held | {"graphs": max(tokens * kept_per_token(plan), summed)}
    of_learning = {"gathered", "losses", "student in bf16"}
    writing = {name: size for name, size in held.items() if name not in of_learning}
    writing["writing"] = writing_bytes(plan)
    return max(learning, writing, key=lambda parts: sum(parts.values()))


def micro_batch_tokens(plan: Plan) -> int:
    """The most that fit, or fewer than the longest row where nothing does."""
    free = USABLE * plan.memory - sum(standing_bytes(plan).values())
    return max(0, int(free / kept_per_token(plan)))


def pieces(plan: Plan) -> float:
    """Micro-batches of a rank's step."""
    at_once = min(micro_batch_tokens(plan), plan.micro_batch or math.inf)
    return max(1.0, plan.tokens / max(at_once, plan.longest))


def fits(plan: Plan) -> bool:
    return sum(peak_bytes(plan, plan.longest).values()) <= USABLE * plan.memory


def step_seconds(plan: Plan, machine: Machine) -> dict[str, float]:
    """One step of one rank, by phase; products of real tokens with weights, as ``step.Cost``.

    A token costs 2 W in a forward pass, W the trunk's weights: the student's three passes' worth
    (forward, to the input, to the weights), the teacher's one, or, where it learns, three, and
    one more where it moves before the student. Then the student's forward is made again, unless
    both graphs of the whole step fit. Checkpointing makes a graph's forward again. A teacher that
    is offloaded crosses the bus for every pass of every micro-batch, sharded only a rank's part.
    """
    own, other = plan.student, plan.teacher
    both_kept = micro_batch_tokens(replace(plan, together=True))
    again = plan.adapts and not plan.together and plan.tokens > both_kept
    student = 2 * own.trunk * plan.tokens * (3 + plan.checkpointed + again)
    passes = (4 if not plan.together else 3) if plan.adapts else 1
    heads = 3 * own.head + (again + plan.adapts) * own.head * (not plan.together)
    teacher = fetched = 0.0
    if other:
        passes_of_trunk = passes + plan.adapts * plan.teacher_checkpointed
        teacher = 2 * other.trunk * plan.tokens * passes_of_trunk
        heads += passes * other.head
        parts = plan.ranks if plan.sharded else 1
        times = 1 if plan.sharded and plan.gathered_for_step else pieces(plan) * passes_of_trunk
        fetched = plan.offload * times * 2 * other.trunk / parts
    responses = plan.rows * plan.response
    return {
        "writing": _writing_seconds(plan, machine),
        "student": student / (machine.trunk_share * machine.flops),
        "teacher": teacher / (machine.trunk_share * machine.flops),
        "losses": 2 * heads * responses / (machine.loss_share * machine.flops),
        "talk": _talk_seconds(plan, machine),
        **({"fetching": fetched / machine.bus} if fetched else {}),
    }


def _writing_seconds(plan: Plan, machine: Machine, batch_tokens: int = 32768) -> float:
    """Every token reads every weight once, or waits for 40 kernels a layer and 62 more.

    vLLM is taken as twice the reading of weights.
    """
    if not plan.on_policy:
        return 0.0
    own = plan.student
    reading = 2 * (own.trunk + own.head) / machine.bandwidth
    if plan.vllm:
        return plan.response * 2 * reading
    batches = max(1.0, plan.rows * plan.longest / batch_tokens)
    return batches * plan.response * max(reading, (40 * own.layers + 62) * machine.launch)


def _talk_seconds(plan: Plan, machine: Machine) -> float:
    """A ring: every rank sends 2 (n - 1) / n of the fp32 gradient once a step.

    Sharded, the student in bf16 for writing and, once a step, the ends as they are stored and half
    of their gradient; of every micro-batch half of the layers' gradient and, for every pass (the
    student's two), the layers in bf16, which are gathered for the first alone where they stay.
    """
    if plan.ranks == 1:
        return 0.0
    share = (plan.ranks - 1) / plan.ranks
    speed = machine.link if plan.ranks <= machine.per_machine else machine.network
    messages = 2 * (plan.ranks - 1) * machine.latency
    own, other, learns = plan.student, plan.teacher, 0.01 if plan.lora else 1
    if not plan.sharded:
        return 2 * share * 4 * own.weights * learns / speed + messages
    once = 2 * own.weights * plan.on_policy
    once += 4 * own.ends * learns + (2 if plan.lora else 4) * own.ends
    each, layers = 4 * own.trunk * learns, 2 * 2 * own.trunk
    if other:
        passes = (4 - plan.together) if plan.adapts else 1
        once, layers = once + 2 * other.ends, layers + passes * 2 * other.trunk
    if plan.gathered_for_step:
        once, layers = once + 2 * (own.trunk + (other.trunk if other else 0)), 0
    return share * (once + pieces(plan) * (each + layers)) / speed + messages


def weak_scaling(plan: Plan, machine: Machine, ranks: int) -> float:
    """Share of the speed of one rank that each of ``ranks`` keeps, with as many rows each."""
    alone = replace(plan, ranks=1, batch=max(1, round(plan.rows)))
    many = replace(plan, ranks=ranks, batch=alone.batch * ranks)
    seconds = [sum(step_seconds(each, machine).values()) for each in (alone, many)]
    return seconds[0] / seconds[1]
