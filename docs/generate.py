"""Write the generated parts of README.md and docs/ anew, from the code itself (``make docs``).

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end of NAME -->``, a number
of a study between ``<!-- study: ... -->`` and ``<!-- end -->`` (docs/study.md), on every page.
tests/test_docs.py fails when one of them is not what this script would write.
"""

import ast
import csv
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import typer
from typer.main import get_command

from promptkd.cli import app
from promptkd.composition import TEACHERS, Method
from promptkd.config import TeacherSection, load_recipe
from promptkd.divergences import DIVERGENCES
from promptkd.findings import CHECKS
from promptkd.methods import METHODS, build_method
from promptkd.objectives import Divergence, Weighted
from promptkd.report.comparisons import NATS
from promptkd.training.planned import Cluster, plan_for, plan_lines
from promptkd.training.sizing import H100, Plan, Shape, weak_scaling

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "promptkd"


def methods_table() -> str:
    """One row per method, read off the composition that its defaults give."""
    lines = [
        "| method | responses written by | minimised at each token | teacher | which reads |",
        "|---|---|---|---|---|",
    ]
    for name, function in METHODS.items():
        method = function()
        generators = dict.fromkeys(describe(term.rollouts) for term in method.terms)
        objectives = dict.fromkeys(describe_term(term) for term in method.terms)
        cells = [f"`{name}`", "; ".join(generators), "; ".join(objectives), teacher_of(method)]
        cells.append(reading_of(method))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def method_pages() -> str:
    """Every method with its docstring and its options."""
    parts = []
    for name, function in METHODS.items():
        options = [str(option) for option in inspect.signature(function).parameters.values()]
        lines = [f"{name}({', '.join(options)})"]
        if len(lines[0]) > 90:
            lines = [f"{name}(", *(f"    {option}," for option in options), ")"]
        code = "\n".join(lines).replace("'", '"')
        text = as_markdown(inspect.getdoc(function) or "")
        parts.append(f"### {name}\n\n```\n{code}\n```\n\n{text}")
    return "\n\n".join(parts)


def option_table() -> str:
    """What ``teacher_options`` takes for each teacher, and the options of each divergence."""
    rows = ["| | name | options |", "|---|---|---|"]
    for name, teacher in TEACHERS.items():
        fields: Any = dataclasses.fields(teacher)  # pyright: ignore
        shown = [f"`{field.name}` ({field.default!r})" for field in fields]
        rows.append(f"| teacher | `{name}` | {', '.join(shown) or '–'} |")
    for name, function in DIVERGENCES.items():
        options = list(inspect.signature(function).parameters.values())[2:]
        shown = [f"`{option.name}` ({option.default!r})" for option in options]
        rows.append(f"| divergence | `{name}` | {', '.join(shown) or '–'} |")
    return "\n".join(rows)


def findings() -> str:
    """Every check with its code, its meaning and its remedy."""
    rows = ["| code | | found | what to do |", "|---|---|---|---|"]
    rows += [f"| {c.code} | {c.outcome} | {c.meaning} | {c.remedy} |" for c in CHECKS]
    return "\n".join(rows)


def as_markdown(docstring: str) -> str:
    """Indented formulas become code blocks; the rest is Markdown already."""
    text = docstring.replace("``", "`")
    return re.sub(
        r"(?m)((?:^ {4,}\S.*\n?)+)", lambda m: f"```\n{inspect.cleandoc(m[1])}\n```\n", text
    )


def describe(part: Any) -> str:
    """A part in words: its name, and its fields where they are not the defaults."""
    if isinstance(part, Divergence):
        return " ".join([f"`{part.name}`", *(f"{key} {value}" for key, value in part.options)])
    if isinstance(part, Weighted):
        return " + ".join(f"{weight:g} {describe(objective)}" for weight, objective in part.parts)
    options = []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if value == field.default:
            continue
        shown = describe(value) if dataclasses.is_dataclass(value) else f"{value}"
        options.append(f"{field.name} {shown}")
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(part).__name__).lower()
    return f"{words} ({', '.join(options)})" if options else words


def describe_term(term: Any) -> str:
    weight = "" if term.weight == 1 else f"{term.weight:g} × "
    return weight + describe(term.objective)


def teacher_of(method: Method) -> str:
    if method.teacher is None:
        return "–"
    words, adaptation = describe(method.teacher), method.adaptation
    if adaptation is None:
        return words
    towards, back = describe(adaptation.towards_student), describe(adaptation.towards_itself)
    return f"{words}, moved by {towards} to the student and {back} to itself"


def reading_of(method: Method) -> str:
    if method.teacher is None:
        return "–"
    return "more than the student" if method.needs_context else "the same, or more"


def teacher_keys() -> str:
    """The recipe's keys on who the teacher is and what it reads."""
    rows = ["| key | default | |", "|---|---|---|"]
    for name, field in TeacherSection.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        kinds = [f"`{kind}`" for kind in get_args(field.annotation) if isinstance(kind, str)]
        choices = f"{', '.join(kinds)}: " if kinds else ""
        rows.append(f"| `teacher.{name}` | {default} | {choices}{field.description} |")
    return "\n".join(rows)


def commands() -> str:
    """Every command with the first sentence of its help."""
    group: Any = get_command(app)
    width = max(len(name) for name in group.commands)
    rows = [
        f"promptkd {name:{width}}  {(command.help or '').strip().splitlines()[0]}"
        for name, command in group.commands.items()
    ]
    return "```\n" + "\n".join(rows) + "\n```"


def command_pages() -> str:
    """The whole --help of every command."""
    group: Any = get_command(app)
    parts = []
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=f"promptkd {name}", terminal_width=90)
        parts.append(f"## promptkd {name}\n\n```\n{command.get_help(context).strip()}\n```")
    return "\n\n".join(parts)


def all_files() -> str:
    """Every file with the first line of its docstring, folder by folder."""
    rows = [f"  {path.name:22} {summary(path)}" for path in modules(PACKAGE)]
    for folder in folders():
        rows.append(f"  {folder.name + '/':22} {summary(folder / '__init__.py')}")
        rows += [f"    {path.name:20} {summary(path)}" for path in modules(folder)]
    return "```\nsrc/promptkd/\n" + "\n".join(rows) + "\n```"


def rooms() -> str:
    """The folders, and in one line the files beside them."""
    flat = ", ".join(path.stem for path in modules(PACKAGE))
    rows = [f"  {folder.name + '/':12} {summary(folder / '__init__.py')}" for folder in folders()]
    return f"```\nsrc/promptkd/\n  {flat}\n" + "\n".join(rows) + "\n```"


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.stem.startswith("__"))


def folders() -> list[Path]:
    return sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.splitlines()[0].replace("``", "")


FACTORS = {"times_faster", "against_generate", "against_gkd"}
SHARES = {
    "share_of_peak",
    "against_authors_order",
    "against_trl",
    "against_whole_logits",
    "of_forecast",
}
PRECISIONS = ("bf16", "fp32")


def targets() -> str:
    """What ``make bench`` is for: the rows that benchmarks/targets.csv names, and their bounds."""
    rows = ["| | should be | bf16 | fp32 |", "|---|---|---|---|"]
    known, text = compared(), (ROOT / "benchmarks" / "targets.csv").read_text()
    for target in csv.DictReader(text.splitlines()):
        numbers = []
        for precision in PRECISIONS:
            compared_here = target["compared"].format(precision=precision)
            found = known[target["benchmark"], compared_here, target["kind"]]
            numbers.append(found.get(precision, "").partition(" (")[0])
        rows.append(f"| {target['what']} | {target['should be']} | {' | '.join(numbers)} |")
    return "\n".join(rows)


def benchmarks() -> str:
    """A row per number that is compared, a column per CPU, each with its commit."""
    rows = ["| benchmark | compared | | bf16 | fp32 |", "|---|---|---|---|---|"]
    for row, numbers in compared().items():
        cells = (*row, *(numbers.get(precision, "") for precision in PRECISIONS))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def compared() -> dict[tuple[str, str, str], dict[str, str]]:
    """(benchmark, what, kind) -> precision -> the number and its commit."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        name, precision = path.stem.split(".")
        result = json.loads(path.read_text())
        commit = result.pop("machine")["commit"]
        for keys, value in leaves(result):
            factor = FACTORS & set(keys)
            share = SHARES & set(keys)
            if factor or share:
                what = ", ".join(key for key in keys if key not in factor | share)
                kind = min(factor or share).replace("_", " ")
                number = f"{value:.2f} ×" if factor else f"{100 * value:.0f} %"
                rows.setdefault((name, what, kind), {})[precision] = f"{number} ({commit})"
    return rows


def cards() -> str:
    """What benchmarks/gpu.py measured, a table for each card."""
    files = sorted((ROOT / "benchmarks" / "results" / "gpu").glob("*.json"))
    if not files:
        return "Not measured: no card was at hand. `python benchmarks/gpu.py` measures one."
    tables = []
    for path in files:
        found = json.loads(path.read_text())
        machine = found.pop("machine")
        said = f"{machine['card']}, torch {machine['torch']}, {machine['commit']}"
        rows = [f"**{said}**", "", "| section | | |", "|---|---|---|"]
        for keys, value in leaves(found):
            rows.append(f"| {keys[0]} | {', '.join(keys[1:])} | {value:.4g} |")
        rows += [
            f"| {name} | failed | {own['failed']} |"
            for name, own in found.items()
            if "failed" in own
        ]
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


def qwen_pair() -> Plan:
    """Qwen3-8B and -0.6B, as published, with the lengths of recipes/qwen3-8b-eight-gpus.yaml."""
    common: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
    large = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    large |= {"num_attention_heads": 32, "tie_word_embeddings": False}
    small = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    small |= {"num_attention_heads": 16, "tie_word_embeddings": True}
    student, teacher = (SimpleNamespace(**common, **own) for own in (small, large))
    return plan_for(
        load_recipe(ROOT / "recipes" / "qwen3-8b-eight-gpus.yaml"),
        build_method("promptkd"),
        (Shape.of_config(student), Shape.of_config(teacher)),
        Cluster(gpus=8, memory_gb=80),
    )


def eight_gpus() -> str:
    return "\n".join(["```", *plan_lines(qwen_pair(), 500), "```"])


def weak_scaling_table() -> str:
    counts = (1, 8, 16, 64, 512)
    rows = [f"| ranks | {' | '.join(map(str, counts))} |", f"|---|{len(counts) * '---|'}"]
    for name in ("replicas", "sharded", "sharded, `gathered_for: step`"):
        step, parts = "step" in name, name != "replicas"  # vLLM writes for no student in parts
        plan = replace(qwen_pair(), vllm_share=None, sharded=parts, gathered_for_step=step)
        shares = [f"{weak_scaling(plan, H100, ranks):.0%}" for ranks in counts]
        rows.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(rows)


def measured_ranks() -> str:
    """What benchmarks/ranks.py measured, beside the same runs by the equations."""
    found = json.loads((ROOT / "benchmarks" / "results" / "ranks.bf16.json").read_text())
    machine, faster = found["machine"], found["times_faster"]
    rows = [
        f"Measured on {machine['processor']}, {machine['precision']}, {machine['commit']}:\n",
        "| processes of one thread | s a step | by the model | times faster | by the model |",
        "|---|---|---|---|---|",
    ]
    for name, own in found["seconds"].items():
        said, twice = sum(found["seconds_by_model"][name].values()), found["times_faster_by_model"]
        cells = own["whole"], said, faster[name], twice[name]
        rows.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    kept = f"{found['weak_scaling']:.0%}, by the model {found['weak_scaling_by_model']:.0%}"
    rows.append(f"\nWith as many rows each, two replicas keep of one's speed {kept}.")
    return "\n".join(rows)


def leaves(tree: dict[str, Any], keys: tuple[str, ...] = ()) -> Iterable[tuple[Any, float]]:
    """Every number in nested dictionaries, after the keys that lead to it."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*keys, key))
        elif isinstance(value, int | float):
            yield (*keys, key), value


PARTS: dict[str, Callable[[], str]] = {
    "methods table": methods_table,
    "methods": method_pages,
    "options": option_table,
    "teacher keys": teacher_keys,
    "findings": findings,
    "commands": commands,
    "command line": command_pages,
    "rooms": rooms,
    "all files": all_files,
    "targets": targets,
    "benchmarks": benchmarks,
    "cards": cards,
    "eight gpus": eight_gpus,
    "weak scaling": weak_scaling_table,
    "ranks": measured_ranks,
}


QUOTED = re.compile(r"(<!-- study: ([^>]*?) -->)(.*?)(<!-- end -->)", re.DOTALL)


def quote(asked: str, results: Path = ROOT / "results" / "study") -> str:
    """One number of a study, with its interval, from what it keeps.

    Args:
        asked: ``STUDY, DATA, METHOD SCORE`` or ``STUDY, DATA, METHOD - BASELINE SCORE``, where
            DATA is a data set, ``over_all`` or ``exposure_bias``.
    """
    study, data, what = (part.strip() for part in asked.split(","))
    record = json.loads((results / study / "study.json").read_text())
    found = record[data] if data in ("over_all", "exposure_bias") else record["data"][data]
    who, _, score = what.rpartition(" ")
    first, minus, second = who.partition(" - ")
    if minus:
        asked_for = {"first": first, "second": second, "score": score}
        (row,) = (row for row in found["differences"] if asked_for.items() <= row.items())
        number, low, high = row["difference"], row["low"], row["high"]
    else:
        (model,) = (model for model in found["models"] if model["label"] == first)
        own = model["scores"][score]
        number, (low, high) = own["mean"], own["interval_95"]
    places = 3 if score in NATS else 1
    sign = "+" if minus else "-"
    written = f"{number:{sign}.{places}f} [{low:.{places}f}, {high:.{places}f}]"
    return written.replace("-", "−")


def with_quotes(page: str, results: Path = ROOT / "results" / "study") -> str:
    """The page with its studies' numbers; those shown as code are left alone."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", page, flags=re.DOTALL)
    return "".join(
        part
        if part.startswith("`")
        else QUOTED.sub(lambda m: m[1] + quote(m[2], results) + m[4], part)
        for part in parts
    )


def fill(page: str) -> str:
    """The page with every generated part as the code has it now."""
    page = with_quotes(page)
    for name, write in PARTS.items():
        start, end = f"<!-- generated: {name} -->\n", f"<!-- end of {name} -->"
        if start in page:
            before, _, rest = page.partition(start)
            page = before + start + write() + "\n" + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        path.write_text(fill(path.read_text()))
