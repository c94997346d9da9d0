"""The study file: one base recipe, methods that change it, seeds. All checked when read. No torch.

A method is a partial recipe merged over the base, so that it may have a learning rate of its own.
All start from the base's student and have its teacher, and all are scored alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from promptkd.config import Recipe, known_metric
from promptkd.errors import UserError
from promptkd.evaluation.metrics import is_text_metric
from promptkd.evaluation.suites import PAPER_SEEDS, read_suite, suite_of_mapping
from promptkd.keys import Name, Section, read_keys, refuse_another_kind, suggest, validate

DECIDED = {"method": "methods", "seed": "seeds", "output": "output"}
"""Keys of a recipe that the study decides, and its own keys for them."""
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
OTHERS = ("start", "teacher")
"""Who stands in the table beside the methods."""
TAKEN = (
    *(*OTHERS, "figures", "tables", "report.html"),
    *("study.yaml", "study.json", "table.md", "table.tex"),
)
"""Names in the study's directory that are no method's."""


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a seed stands there twice")
    return values


Seed = Annotated[int, Field(ge=0, strict=True)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)]


class ExposureSection(Section):
    """Exposure bias of every run's student against the plain teacher, on requests of the suite."""

    data: str = Field(description="a name in the suite")
    num_examples: int = Field(default=64, ge=2, description="the first ones; at most what is there")
    seeds: Seeds = Field(default=(10, 20, 30), description="of the sampling")
    precision: Literal["auto", "bf16", "fp32"] = "fp32"

    def allows(self, dtype: str) -> bool:
        """Whether what was measured in this type answers it."""
        return self.precision == "auto" or DTYPES[self.precision] == dtype


class ScoringSection(Section):
    """On what everything is scored; template and decoding are the base's, limits unless given."""

    suite: dict[str, list[str]] = Field(description="names with their data, or a suite file")
    seeds: Seeds = Field(default=PAPER_SEEDS, description="decoding seeds")
    num_examples: int | None = Field(default=None, ge=1, description="only the first ones of each")
    max_request_tokens: int | None = Field(default=None, ge=1, description="the base's without it")
    max_response_tokens: int | None = Field(default=None, ge=1, description="the base's without it")
    no_repeat_ngram_size: int = Field(default=0, ge=0, description="6: the authors' test script")
    metric: str | None = Field(default=None, description="the score that decides, as in a recipe")
    exposure_bias: ExposureSection | None = Field(default=None, description="not measured without")

    @field_validator("suite", mode="before")
    @classmethod
    def _file_or_mapping(cls, value: Any) -> dict[str, list[str]]:
        if isinstance(value, str):
            return read_suite(value)
        return suite_of_mapping(value, "'evaluation.suite'")

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str | None) -> str | None:
        return value if value is None else known_metric(value)

    @model_validator(mode="after")
    def _known_data(self) -> "ScoringSection":
        if self.exposure_bias and (name := self.exposure_bias.data) not in self.suite:
            raise ValueError(f"exposure_bias.data is '{name}'{suggest(name, list(self.suite))}")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """What responses are scored by beside what always is."""
        decides = [self.metric] if self.metric and is_text_metric(self.metric) else []
        return tuple(dict.fromkeys([*decides, "repeated_4_grams"]))


class Study(Section):
    """What a study file says; ``planned_runs`` are the recipes that follow from it."""

    base: dict[str, Any] = Field(description="a recipe's keys, or its file")
    methods: dict[str, dict[str, Any]] = Field(min_length=1, description="label -> partial recipe")
    seeds: Seeds = Field(default=(0, 1, 2), description="training seeds")
    evaluation: ScoringSection
    baseline: str = Field(default="start", description="whom everything is compared with")
    output: Name
    results: Name | None = Field(
        default=None, description="keeps scores, responses, tables, no weights"
    )

    @field_validator("base", mode="before")
    @classmethod
    def _file_or_keys(cls, value: Any) -> Any:
        if isinstance(value, str):
            raw = read_keys(value, "Recipe")
            return {key: section for key, section in raw.items() if key not in DECIDED}
        return value

    @property
    def place(self) -> Path:
        """Where scores are read from, and tables and figures written to."""
        return Path(self.results or self.output)

    @property
    def base_recipe(self) -> Recipe:
        """The base with the default method: student, teacher, template, limits, decoding."""
        return validate(Recipe, {**self.base, "output": self.output}, prefix="base.")


@dataclass(frozen=True)
class PlannedRun:
    """One method with one training seed."""

    label: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"


def load_study(path: str | Path) -> Study:
    """Read a study file and validate every recipe that follows from it.

    Raises:
        UserError: for an unknown key (with the nearest known one) or a value out of range.
    """
    raw = read_keys(path, "Study")
    refuse_another_kind(raw, path, "base")
    return study_from_dict(raw)


def study_from_dict(raw: dict[str, Any]) -> Study:
    """Validate a study given as nested dictionaries; see ``load_study``."""
    study = validate(Study, raw, what="study file")
    _refuse_decided("base", study.base, DECIDED)
    base = study.base_recipe
    for label, changes in study.methods.items():
        if label in TAKEN or label[:1] in ("", ".") or not _is_a_name(label):
            raise UserError(
                f"The method '{label}' can't have this label: it names a directory of the study, "
                f"where {', '.join(TAKEN)} are taken. Choose another one."
            )
        _refuse_decided(f"methods.{label}", changes, ("seed", "output"))
        if "method" not in changes:
            raise UserError(
                f"'methods.{label}.method' is missing. A method is a partial recipe, as in "
                f"{label}: {{method: {{name: gkd}}, optimization: {{learning_rate: 1e-5}}}}."
            )
        recipe = _recipe(study, label, study.seeds[0])
        for key in ("student", "teacher"):
            own, shared = getattr(recipe, key), getattr(base, key)
            if own and (shared is None or own.model != shared.model):
                raise UserError(
                    f"'methods.{label}.{key}.model' is '{own.model}', the base's is "
                    f"'{shared and shared.model}'. All methods of a study share both, or their "
                    "scores could not be compared: set it in the base, or make another study."
                )
    known = [*study.methods, OTHERS[0], *OTHERS[1 : 1 + bool(base.teacher)]]
    if study.baseline not in known:
        raise UserError(f"baseline is '{study.baseline}'{suggest(study.baseline, known)}")
    return study


def planned_runs(study: Study) -> list[PlannedRun]:
    """Every run of the study; all methods with one seed before any with the next."""
    return [
        PlannedRun(label, seed, _recipe(study, label, seed))
        for seed in study.seeds
        for label in study.methods
    ]


def _is_a_name(label: str) -> bool:
    return label.isprintable() and not set(label) & set('/\\:*?"<>|')


def _refuse_decided(where: str, keys: dict[str, Any], decided: Iterable[str]) -> None:
    for key in decided:
        if key in keys:
            raise UserError(f"'{where}.{key}': the study decides it, by its '{DECIDED[key]}'.")


def _recipe(study: Study, label: str, seed: int) -> Recipe:
    output = Path(study.output) / label / f"seed-{seed}"
    raw = _merged(study.base, study.methods[label]) | {"seed": seed, "output": str(output)}
    return validate(Recipe, raw, prefix=f"methods.{label}.")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    whole = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        whole[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return whole
