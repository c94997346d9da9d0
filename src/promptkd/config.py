"""The recipe: what a user writes in YAML, validated when read. Imports no torch.

Keys follow Hugging Face's names where one exists. Defaults are those of PromptKD's GPT-2 base run
(arXiv:2402.12842, appendix A and the authors' script) unless a field says otherwise.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from promptkd import vllm_options
from promptkd.criteria import CRITERIA
from promptkd.keys import (
    Name,
    Section,
    override,
    read_keys,
    refuse_another_kind,
    refuse_look_alikes,
    refuse_reserved,
    suggest,
    validate,
)

Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]


def known_metric(name: str) -> str:
    """The name itself; a ValueError with a suggestion if it can't choose a student."""
    if name not in CRITERIA and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(f"unknown metric{suggest(name, [*CRITERIA])}")
    return name


def one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[Name, ...], BeforeValidator(one_or_many)]
"""A list of them; one may stand alone."""
TemplateOptions = Annotated[dict[str, Any], AfterValidator(refuse_reserved)]
"""What a chat template is given, beside what it always is."""
THE_STUDENT = "student"
"""As ``teacher.model``: the student itself."""


class LoRASection(Section):
    r: int = Field(default=16, ge=1, le=4096, description="rank of the adapters")
    alpha: int = Field(default=32, ge=1, le=10**6, description="the update is scaled by alpha / r")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        default=(), description="empty: PEFT's choice; all-linear: all but the output layer"
    )
    merge: bool = Field(default=False, description="save whole weights instead of an adapter")


class StudentSection(Section):
    model: Name = Field(
        description="hub id, directory, a .gguf file, or a finished run's directory"
    )
    lora: LoRASection | None = Field(default=None, description="train adapters, not the weights")


class TeacherSection(Section):
    """Who the teacher is, and what it reads that the student doesn't."""

    model: Name = Field(
        description="hub id, directory, a .gguf file, a finished run's directory, or student: the "
        "student itself"
    )
    follow: Literal["frozen", "ema", "live"] = Field(
        default="frozen",
        description="with model: student: as it started, its moving average, or as it is now",
    )
    ema_decay: float = Field(
        default=0.999, ge=0, lt=1, description="what a step leaves of the moving average"
    )
    system: Name | None = Field(
        default=None, description="a system message that only the teacher reads: text or file"
    )
    context: Name | None = Field(
        default=None, description="a column whose text only the teacher reads"
    )
    context_template: Name | None = Field(
        default=None,
        description="how request and context become the teacher's user turn: Jinja text or file",
    )
    template: Name | None = Field(
        default=None, description="the teacher's own, as data.template; not given: the student's"
    )
    template_options: TemplateOptions = Field(
        default={}, description="given to the teacher's chat template, over the student's"
    )
    max_request_tokens: int | None = Field(
        default=None, ge=1, description="of the teacher's request; not given: whatever it takes"
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        default=None, description="8bit | 4bit: how its linear layers are held (bitsandbytes)"
    )
    offload: bool = Field(
        default=False, description="its linear layers stay off the GPU until they are multiplied"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="its activations are made again in the backward pass"
    )

    @model_validator(mode="after")
    def _only_the_student_moves(self) -> "TeacherSection":
        if self.follow != "frozen" and self.model != THE_STUDENT:
            raise ValueError(
                f"follow is {self.follow}, but the model is {self.model}: only model: student moves"
            )
        if self.quantization and self.offload:
            raise ValueError("quantization and offload are both given: choose one")
        keys = [
            k for k in ("quantization", "offload", "gradient_checkpointing") if getattr(self, k)
        ]
        if keys and self.model == THE_STUDENT:
            key = keys[0]
            raise ValueError(f"{key} is for a model of its own, and the model is the student's")
        return self

    @property
    def reads_more(self) -> bool:
        """Whether anything but the template differs from what the student reads."""
        return any(own is not None for own in (self.system, self.context, self.context_template))


class MethodSection(Section):
    """A name of ``promptkd.methods.METHODS`` or ``module:function``; the rest are its options."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: Name = "promptkd"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ColumnsSection(Section):
    """Which column of the data is what, where its name isn't a known one."""

    request: str | None = Field(default=None, description="what is asked")
    context: str | None = Field(default=None, description="a text that belongs to the request")
    response: str | None = Field(default=None, description="the reference, or several")
    system: str | None = Field(default=None, description="a system message")
    history: str | None = Field(default=None, description="turns before the request")
    messages: str | None = Field(default=None, description="a whole conversation")
    tools: str | None = Field(default=None, description="tools that a conversation may call")
    ignore: Annotated[tuple[str, ...], BeforeValidator(one_or_many)] = Field(
        default=(), description="columns that are not to be read"
    )

    @model_validator(mode="after")
    def _one_meaning_each(self) -> "ColumnsSection":
        if self.request is not None and self.messages is not None:
            raise ValueError("request and messages are both given: a row has one of them")
        parts = [getattr(self, part) for part in type(self).model_fields if part != "ignore"]
        names = [*filter(None, parts), *self.ignore]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the column {twice[0]!r} is given two meanings")
        return self


class LengthSchedule(Section):
    """How long responses may be in the first step and in the last one, linear in between."""

    start: int = Field(ge=1)
    end: int = Field(ge=1)


class DataSection(Section):
    train: Names = Field(min_length=1, description="path, glob or hub id, or a list of them")
    validation: Names = Field(default=(), description="held-out data, same formats")
    template: Name = Field(
        default="auto",
        description="auto | chat | alpaca | none | a Jinja file; auto: the tokenizer's chat "
        "template where it has one, else alpaca",
    )
    template_options: TemplateOptions = Field(
        default={}, description="given to the chat template (enable_thinking: false)"
    )
    columns: ColumnsSection = ColumnsSection()
    max_request_tokens: int = Field(default=256, ge=1)
    max_response_tokens: int | LengthSchedule = Field(
        default=256, description="or {start: 64, end: 256}: responses that grow over training"
    )

    @field_validator("max_response_tokens", mode="before")
    @classmethod
    def _number_or_schedule(cls, value: Any) -> int | LengthSchedule:
        kind: Any = LengthSchedule if isinstance(value, dict) else Annotated[int, Field(ge=1)]
        refuse_look_alikes(value, int)
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            fault = error.errors()[0]
            where = "".join(f"{part}: " for part in fault["loc"])
            raise ValueError(
                f"{where}{fault['msg']}; a number, or {{start: 64, end: 256}}"
            ) from None

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response at any step, which evaluations allow."""
        limits = self.max_response_tokens
        return limits if isinstance(limits, int) else max(limits.start, limits.end)


SMALLEST_TEMPERATURE = 1e-6
"""Below it, scores divided by the temperature leave the range of floats."""


class SamplingSection(Section):
    engine: Literal["auto", "transformers", "vllm"] = Field(
        default="auto", description="auto: vLLM on a GPU where it is installed, else transformers"
    )
    vllm: dict[str, Any] = Field(
        default={},
        description="options of vllm.LLM (gpu_memory_utilization, enable_sleep_mode, ...)",
    )
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 is greedy decoding")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0 keeps every token")

    @model_validator(mode="after")
    def _options_that_vllm_may_be_given(self) -> "SamplingSection":
        vllm_options.check(self.engine, self.vllm)
        return self

    @field_validator("temperature")
    @classmethod
    def _greedy_or_warm(cls, value: float) -> float:
        if 0 < value < SMALLEST_TEMPERATURE:
            raise ValueError(f"0 is greedy; any other is at least {SMALLEST_TEMPERATURE:g}")
        return value


class OptimizationSection(Section):
    learning_rate: float = Field(default=5e-5, ge=0)
    teacher_learning_rate: float = Field(default=5e-5, ge=0, description="soft prompt's or LoRA's")
    global_batch_size: int = Field(default=32, ge=1, description="requests a step, over all ranks")
    micro_batch_tokens: int | None = Field(
        default=None, ge=1, description="padded tokens per forward; not given: what fits in memory"
    )
    max_steps: int | None = Field(default=None, ge=1, le=10**9, description="optimizer steps")
    epochs: float | None = Field(None, gt=0, le=10**6, description="if max_steps is not given")
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    teacher_step: Literal["before_student", "with_student"] = "before_student"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _length_of_training(self) -> "OptimizationSection":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"max_steps is {self.max_steps} and epochs is {self.epochs}: give exactly one"
            )
        return self


class EvaluationSection(Section):
    every_steps: int = Field(default=44, ge=0, description="0 evaluates at the end only")
    metric: Annotated[str, AfterValidator(known_metric)] = Field(
        default="rouge_l", description="best by: " + " | ".join([*CRITERIA, "module:function"])
    )
    num_examples: int = Field(default=200, ge=1)
    exposure_bias_every_steps: int = Field(
        default=0, ge=0, description="R(l), E(l), ExAccErr(l) on the validation data; 0: never"
    )


class CheckpointSection(Section):
    every_steps: int = Field(default=44, ge=1)
    keep: int = Field(default=2, ge=1)


class Recipe(Section):
    """Everything that defines a run."""

    student: StudentSection
    teacher: TeacherSection | None = None
    method: MethodSection = MethodSection()
    data: DataSection
    sampling: SamplingSection = SamplingSection()
    optimization: OptimizationSection
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="auto: bf16 where the hardware multiplies it natively"
    )
    attention: Literal["auto", "sdpa", "flash", "eager"] = Field(
        default="auto", description="auto: torch's kernels, rows of different lengths apart"
    )
    kernels: Literal["plain", "compiled"] = Field(
        default="plain", description="compiled: torch fuses layers and losses; CUDA graphs write"
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none", description="fsdp: every process keeps a part of both models' weights"
    )
    gathered_for: Literal["pass", "step"] = Field(
        default="pass", description="step: layers are gathered once, and both models whole then"
    )
    evaluation: EvaluationSection = EvaluationSection()
    checkpoints: CheckpointSection = CheckpointSection()
    tracking: tuple[Tracker, ...] = Field(default=(), description="accelerate's trackers")
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: Name

    @field_validator("output")
    @classmethod
    def _at_home(cls, value: str) -> str:
        return os.path.expanduser(value)

    @model_validator(mode="after")
    def _one_reader_per_column(self) -> "Recipe":
        columns, own = self.data.columns, self.teacher and self.teacher.context
        parts = set(ColumnsSection.model_fields) - {"response", "ignore"}
        if own and own in (*(getattr(columns, part) for part in parts), *columns.ignore):
            raise ValueError(
                f"the column {own!r} is teacher.context and stands in data.columns too: the "
                "teacher's own column is read by nobody else"
            )
        return self

    @model_validator(mode="after")
    def _what_goes_together(self) -> "Recipe":
        others = {
            "teacher.model: student": self.teacher and self.teacher.model == THE_STUDENT,
            "sampling.engine: vllm": self.sampling.engine == "vllm" and self.vllm_cannot_write,
            "attention: flash": self.attention == "flash",
            "kernels: compiled": self.kernels == "compiled",
            "a measured micro_batch_tokens": self.optimization.micro_batch_tokens is None,
            "teacher.quantization": self.teacher and self.teacher.quantization,
        }
        for other, chosen in others.items():
            if self.sharding == "fsdp" and chosen:
                raise ValueError(f"sharding: fsdp and {other} don't go together: change one")
        if self.sharding == "none" and self.gathered_for == "step":
            raise ValueError("gathered_for: step needs sharding: fsdp; nothing is gathered")
        for key in ("quantization", "offload"):
            if self.kernels == "compiled" and self.teacher and getattr(self.teacher, key):
                pair = f"kernels: compiled and teacher.{key}"
                raise ValueError(f"{pair} don't go together: change one")
        return self

    @property
    def vllm_cannot_write(self) -> bool:
        """Whether ``sampling.engine: vllm`` is refused, so that ``auto`` is transformers."""
        return self.sharding == "fsdp"

    def teacher_model(self, run: str | Path | None = None) -> str:
        """The name to load the teacher by, as it starts or as a finished ``run`` left it."""
        assert self.teacher is not None, "asked for where there is one"
        if self.teacher.model != THE_STUDENT:
            return self.teacher.model
        left = {"ema": f"{run}/teacher", "live": f"{run}/student"}
        return left.get(self.teacher.follow, self.student.model) if run else self.student.model

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply ``key=value`` overrides (dotted keys, YAML values).

    Raises:
        UserError: if the file is missing or not YAML, or a key or value is wrong.
    """
    raw = read_keys(path, "Recipe")
    refuse_another_kind(raw, path, "student")
    return recipe_from_dict(override(raw, overrides))


def recipe_from_dict(raw: dict[str, Any]) -> Recipe:
    """Validate a recipe given as nested dictionaries.

    Raises:
        UserError: for an unknown key (with the nearest known one) or a value out of range.
    """
    return validate(Recipe, raw)
