"""The README.md of a distilled student: metadata that hubs read, a snippet that runs, scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from promptkd.config import Recipe
from promptkd.training.provenance import card_of, hub_id, origin, public_name

REPOSITORY = "REPOSITORY"
"""In the snippet: where the student will be published, or the path of its directory."""
PLACES = ("model", "train", "validation", "output")
"""Keys of a recipe that may hold paths of the machine it ran on."""
SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{repository}"  # this repository's id, or the path of this directory
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
template = {template!r}
text = template.replace({request!r}, "What is knowledge distillation?")
inputs = tokenizer(text, add_special_tokens={special}, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(tokenizer.decode(written[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))"""


@dataclass(frozen=True)
class Frame:
    """How a request is written: ``template`` with ``REQUEST`` where the request stands."""

    template: str
    special_tokens: bool

    REQUEST = "{{request}}"


@dataclass(frozen=True)
class Validated:
    """Scores on the validation data: of this student, and of its start."""

    step: int
    scores: Mapping[str, float]
    start: Mapping[str, float]


def model_card(recipe: Recipe, method: str, frame: Frame, measured: Validated) -> str:
    """Markdown with Hugging Face's front matter: what was distilled from what, how, how well."""
    teacher = recipe.teacher.model if recipe.teacher else None
    start = public_name(recipe.student.model)
    title = f"Student of {public_name(teacher)}" if teacher else f"{start}, fine-tuned"
    towards = f" towards the teacher `{public_name(teacher)}`" if teacher else ""
    metadata = _metadata(recipe, measured)
    lines = [
        "---",
        metadata.to_yaml().rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"Made with promptkd, method `{recipe.method.name}`, from the start `{start}`{towards}; "
        f"this is step {measured.step}.",
        "",
        *_gaps(metadata, recipe),
        "```python",
        SNIPPET.format(
            repository=REPOSITORY,
            template=frame.template,
            request=Frame.REQUEST,
            special=frame.special_tokens,
            tokens=recipe.data.longest_response,
        ),
        "```",
        "",
        *_scores(recipe, measured),
        "## Recipe",
        "",
        "```yaml",
        _public_recipe(recipe).rstrip(),
        "```",
        "",
        f"`{method}`",
        "",
    ]
    return "\n".join(lines)


def _metadata(recipe: Recipe, measured: Validated) -> ModelCardData:
    teacher = recipe.teacher.model if recipe.teacher else None
    card = card_of(teacher) if teacher else {}
    names = [recipe.student.model, *([teacher] if teacher else [])]
    bases: list[Any] = [*dict.fromkeys(known for name in names for known in origin(name))]
    data_ids = [name for source in recipe.data.train if (name := _data_id(source))]
    name = public_name(recipe.output)
    return ModelCardData(
        base_model=bases or None,
        license=card.get("license"),
        language=card.get("language"),
        datasets=data_ids or None,
        library_name="peft" if _is_lora(recipe) else "transformers",
        pipeline_tag="text-generation",
        tags=["promptkd", "distillation", recipe.method.name],
        model_name=name if measured.scores else None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="validation",
                dataset_name="validation requests of the run",
                metric_type=score,
                metric_name=score,
                metric_value=round(value, 4),
            )
            for score, value in measured.scores.items()
        ]
        or None,
    )


def _gaps(metadata: ModelCardData, recipe: Recipe) -> list[str]:
    """What the publisher has to fill in, since nothing on the machine says it."""
    missing = [
        words
        for words, known in (
            ("the teacher's licence (`license`)", metadata.license),
            ("its language (`language`)", metadata.language),
            ("the base model's id (`base_model`)", metadata.base_model),
            ("the data's id (`datasets`)", metadata.datasets),
        )
        if not known
    ]
    lines = []
    if missing:
        listed = ", ".join(missing)
        lines += [f"Not known to the run, to be added above before publishing: {listed}."]
    if _is_lora(recipe) and not hub_id(recipe.student.model):
        lines += [
            "The adapter's base is a directory of the machine that trained it: publish that too, "
            "and write its id into `adapter_config.json`, or train with `student.lora.merge`."
        ]
    return [line for text in lines for line in (text, "")]


def _scores(recipe: Recipe, measured: Validated) -> list[str]:
    if not measured.scores:
        return []
    sampling, data = recipe.sampling, recipe.data
    rows = [
        f"| {name} | {measured.start[name]:.4g} | {value:.4g} |"
        if name in measured.start
        else f"| {name} | – | {value:.4g} |"
        for name, value in measured.scores.items()
    ]
    return [
        "## Scores on the validation data",
        "",
        f"At most {recipe.evaluation.num_examples} requests, one response each, without interval; "
        f"temperature {sampling.temperature}, top-p {sampling.top_p}, top-k {sampling.top_k}, at "
        f"most {data.longest_response} tokens. These requests chose this step, so that held-out "
        "scores, which `promptkd report` writes above where they were measured, count for more.",
        "",
        "| score | start | this student |",
        "|---|---|---|",
        *rows,
        "",
    ]


def _public_recipe(recipe: Recipe) -> str:
    """The recipe with names in place of paths."""

    def public(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: public(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [public(v, key) for v in value]
        return public_name(value) if key in PLACES and isinstance(value, str) else value

    raw = public(yaml.safe_load(recipe.to_yaml()))
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def _data_id(source: str) -> str | None:
    """A hub data set's id; a file, a folder or a pattern has none."""
    local = "*" in source or source.rsplit(".", 1)[-1] in ("jsonl", "json", "csv", "parquet", "gz")
    return None if local else hub_id(source)


def _is_lora(recipe: Recipe) -> bool:
    return bool(recipe.student.lora and not recipe.student.lora.merge)
