"""The README.md of a distilled student."""

from promptkd.config import Recipe


def model_card(recipe: Recipe, method: str, step: int, scores: dict[str, float]) -> str:
    """Markdown with Hugging Face's front matter: what was distilled from what, how, how well."""
    teacher = recipe.teacher.model if recipe.teacher else "none"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [promptkd, distillation]",
        "---",
        "",
        f"# Student of {teacher}",
        "",
        f"Distilled with promptkd, method `{recipe.method.name}`, from the start "
        f"`{recipe.student.model}` towards the teacher `{teacher}`; this is step {step}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("student")',
        'tokenizer = AutoTokenizer.from_pretrained("student")',
        "```",
        "",
        f"Requests are written with the template `{recipe.data.template}`.",
        "",
    ]
    if scores:
        sampling = recipe.sampling
        lines += [
            f"Validation ({', '.join(recipe.data.validation)}; one response per request, "
            f"temperature {sampling.temperature}, top-p {sampling.top_p}, top-k {sampling.top_k}, "
            f"at most {recipe.data.longest_response} tokens):",
            "",
            "| score | value |",
            "|---|---|",
            *(f"| {name} | {value:.4g} |" for name, value in scores.items()),
            "",
        ]
    lines += ["## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", "", f"`{method}`", ""]
    return "\n".join(lines)
