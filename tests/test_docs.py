"""What the documentation says is so."""

import ast
import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command

import promptkd as pk
from promptkd.cli import app
from promptkd.config import Recipe, recipe_from_dict
from promptkd.criteria import CRITERIA
from promptkd.distillation.plan import RATES, STEPS
from promptkd.evaluation.metrics import METRICS as TEXT_METRICS
from promptkd.methods import METHODS, build_method
from tiny import save_pair, write_data

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "promptkd"
PAGES = sorted([*ROOT.glob("*.md"), *(p for p in ROOT.glob("docs/*.md") if p.name != "log.md")])
MAP = (ROOT / "docs" / "paper-map.md").read_text()


def module_name(path: Path) -> str:
    """``evaluation.metrics`` for src/promptkd/evaluation/metrics.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


DOCTESTED = sorted(module_name(path) for path in PACKAGE.rglob("*.py") if ">>>" in path.read_text())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text())


def load(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def resolve(dotted: str) -> Any:
    """The object that ``promptkd.module.name`` stands for."""
    value: Any = importlib.import_module("promptkd")
    name = value.__name__
    for part in dotted.split(".")[1:]:
        name = f"{name}.{part}"
        value = sys.modules.get(name) or getattr(value, part, None)
        value = value or importlib.import_module(name)
    return value


def leaves(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of nested sections."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        deeper = leaves(value, f"{prefix}{key}.") if value and isinstance(value, dict) else None
        found |= {f"{prefix}{key}": value} if deeper is None else deeper
    return found


def recipe_defaults(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of the recipe with their defaults; ``...`` where a value is required."""
    found: dict[str, Any] = {}
    for key, field in model.model_fields.items():
        options = getattr(field.annotation, "__args__", (field.annotation,))
        section = next(
            (o for o in options if inspect.isclass(o) and issubclass(o, BaseModel)), None
        )
        if section is not None and not isinstance(field.default, int):
            found |= recipe_defaults(section, f"{prefix}{key}.")
        else:
            found[prefix + key] = ... if field.is_required() else field.default
    return found


# -- generated parts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_generated_parts_are_what_the_code_says(page):
    assert load(ROOT / "docs" / "generate.py").fill(page.read_text()) == page.read_text(), (
        f"{page.name} is stale: run 'make docs'"
    )


def test_a_number_that_a_page_quotes_is_what_the_study_keeps(tmp_path):
    own = {"mean": 21.34, "interval_95": [20.0, 22.71]}
    gap = {"difference": 0.41, "low": -0.26, "high": 1.04}
    record = {
        "over_all": {
            "models": [{"label": "gkd", "scores": {"rouge_l": own}}],
            "differences": [
                {"first": "promptkd", "second": "gkd", "score": "rouge_l", **gap},
                {"first": "promptkd", "second": "gkd", "score": "ended", **gap},
            ],
        },
        "data": {},
    }
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "study.json").write_text(json.dumps(record))
    fill = partial(load(ROOT / "docs" / "generate.py").with_quotes, results=tmp_path)
    page = (
        "It gains <!-- study: main, over_all, promptkd - gkd rouge_l -->3<!-- end --> over "
        "<!-- study: main, over_all, gkd rouge_l --><!-- end -->; "
        "`<!-- study: x --><!-- end -->` is how it is written."
    )
    filled = fill(page)
    assert " rouge_l -->+0.4 [−0.3, 1.0]<!-- end --> over" in filled
    assert "gkd rouge_l -->21.3 [20.0, 22.7]<!-- end -->" in filled
    assert "`<!-- study: x --><!-- end -->`" in filled
    assert fill(filled) == filled


def test_the_methods_table_of_the_readme_names_every_method():
    table = (ROOT / "README.md").read_text().partition("| method |")[2].partition("\n\n")[0]
    assert re.findall(r"(?m)^\| `(\w+)` \|", table) == list(METHODS)


# -- what users copy


def test_every_recipe_in_the_documentation_is_valid():
    recipes = [block for page in PAGES for block in blocks(page, "yaml")]
    assert len(recipes) >= 3
    for block in recipes:
        recipe = recipe_from_dict(yaml.safe_load(block))
        build_method(recipe.method.name, **recipe.method.options)


def test_the_recipe_page_has_every_key_with_its_default():
    (block,) = blocks(ROOT / "docs" / "recipe.md", "yaml")
    written = leaves(yaml.safe_load(block))
    free = {line.split(":")[0].strip() for line in block.splitlines() if "# example" in line}
    expected = recipe_defaults()
    assert written.keys() == expected.keys()
    for key, default in expected.items():
        if default is not ... and key.rpartition(".")[2] not in free:
            value = tuple(written[key]) if isinstance(written[key], list) else written[key]
            assert value == default, key


def test_the_readmes_quickstart_runs(tmp_path, monkeypatch):
    (block,) = blocks(ROOT / "README.md", "python")
    assert indent(block, "    ") in (pk.__doc__ or "")  # the package's own example
    longer = {"max_position_embeddings": 600}
    _, teacher = save_pair(tmp_path, "llama", student_options=longer, teacher_options=longer)
    write_data(tmp_path / "train.jsonl", 32)
    write_data(tmp_path / "test.jsonl", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("promptkd.distillation.plan.STEPS", dict.fromkeys(STEPS, (1, 1)))
    written = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(teacher))
    assert str(teacher) in written
    names: dict[str, Any] = {}
    exec(written.replace("layers=20", "layers=2"), names)
    run = tmp_path / "runs" / "first" / "promptkd"
    assert (run / "student" / "model.safetensors").is_file()
    assert (run / "teacher_adapter" / "adapter_config.json").is_file()
    assert len(names["result"]["scores"]["rouge_l"]["by_seed"]) == 5


def test_the_table_of_defaults_says_what_the_code_does():
    page = (ROOT / "docs" / "defaults.md").read_text()
    for stage, rate in RATES.items():
        assert f"| {rate:.0e} |".replace("e-0", "e-") in page, stage
    for least, most in STEPS.values():
        assert f"{least} to {most}" in page


def test_the_method_of_ones_own_is_a_method_that_a_recipe_can_name(tmp_path, monkeypatch):
    page = ROOT / "docs" / "methods.md"
    (block,) = blocks(page, "python")
    (tmp_path / "my_method.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    assert "method.name=my_method:anchored method.anchor=0.2" in page.read_text()
    method = build_method("my_method:anchored", anchor=0.2)
    assert [term.weight for term in method.terms] == [1.0, 0.2]
    assert method.needs_references
    assert sum(bool(line.strip()) for line in block.partition("\n\n\n")[2].splitlines()) < 10


def test_every_command_that_the_documentation_names_exists():
    commands = set(get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    options = {"recipe.yaml"}
    for page in PAGES:
        named = set(re.findall(r"(?m)(?:^|`)promptkd ([a-z-]+)", page.read_text())) - options
        assert named <= commands, page.name


def test_the_help_lists_every_command_with_a_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "promptkd", "--help"], capture_output=True, text=True, check=True
    )
    for name, command in get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        assert re.search(rf"(?m)^\s+{name}\s+\S", done.stdout), name
        assert command.help, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\[[^\]]*\]\(([^)#:*]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_make_knows_every_target_that_the_documentation_names():
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    for page in PAGES:
        assert set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", page.read_text())) <= targets, page.name


# -- the paper map


def test_every_symbol_of_the_paper_map_exists():
    symbols = set(re.findall(r"`(promptkd\.[\w.]+)`", MAP))
    assert len(symbols) > 10
    for symbol in symbols:
        assert resolve(symbol) is not None


def test_every_test_of_the_paper_map_exists():
    named = set(re.findall(r"`(tests/\w+\.py)::(\w+)`", MAP))
    assert len(named) > 10
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{path}::{name}"


def test_every_key_of_the_paper_map_exists():
    sections = "optimization|data|sampling|method|evaluation|checkpoints"
    keys = set(re.findall(rf"`((?:{sections})\.\w+)", MAP))
    assert len(keys) > 8
    options = {f"method.{name}" for name in inspect.signature(METHODS["promptkd"]).parameters}
    assert keys <= recipe_defaults().keys() | options


# -- docstrings


def test_every_public_name_has_a_docstring():
    for name in pk.__all__:
        assert inspect.getdoc(getattr(pk, name)), name
    for name, method in METHODS.items():
        assert inspect.getdoc(method), name


def test_dir_shows_every_public_name_and_the_version():
    assert {*pk.__all__, "__version__"} <= set(dir(pk))
    assert re.fullmatch(r"\d+\.\d+\.\d+", pk.__version__)
    assert all(callable(getattr(pk, name)) for name in pk.__all__ if name in pk._HOMES)


def test_every_module_says_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__main__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path.name


@pytest.mark.parametrize("name", DOCTESTED)
def test_the_examples_in_docstrings_are_right(name):
    result = doctest.testmod(importlib.import_module(f"promptkd.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_mathematics_has_examples():
    assert {"divergences", "evaluation.metrics", "pruning", "training.schedules"} <= set(DOCTESTED)


# -- size


def test_no_page_for_newcomers_is_longer_than_one_reads():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 100


def test_every_field_of_the_metrics_page_is_written_by_the_trainer():
    page = (ROOT / "docs" / "run-directory.md").read_text()
    table = page.partition("| field | meaning |")[2].partition("\n\n")[0]
    fields = set(re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| (.*?) \|", table))))
    source = "".join(path.read_text() for path in (PACKAGE / "training").glob("*.py"))
    assert len(fields) > 10
    for name in fields:
        assert f'"{name}"' in source or name.startswith(("gradient_norm_", "seconds_")), name


def test_the_parts_of_the_methods_page_exist():
    page = (ROOT / "docs" / "methods.md").read_text().partition("| axis |")[2].partition("\n\n")[0]
    for row in page.splitlines()[2:]:
        _, parts, modules = (cell for cell in row.strip("| ").split(" | "))
        homes = [
            importlib.import_module(name) for name in re.findall(r"`(promptkd\.\w+)`", modules)
        ]
        for name in re.findall(r"`([A-Z]\w+)", parts):
            (home,) = (home for home in homes if name in vars(home))
            assert dataclasses.is_dataclass(getattr(home, name)), name


def test_every_metric_has_its_line_in_the_docs():
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert [name for name in (*TEXT_METRICS, *CRITERIA) if f"| `{name}`" not in text] == []


def test_exposure_bias_over_training_is_what_the_runs_wrote():
    page = (ROOT / "docs" / "exposure-bias.md").read_text().partition("## Over training")[2]
    for arm, column in (("gkd", 2), ("promptkd", 3)):
        file = ROOT / "results" / "exposure-over-training" / f"{arm}.metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for row in (row for row in lines if "exposure_bias" in row):
            excess = row["exposure_bias"]["excess"]
            written = ", ".join(f"{excess[n - 1]:.1f}" for n in (16, 32, 64)).replace("-", "−")
            (line,) = re.findall(rf"(?m)^\| {row['step']} \|.*$", page)
            assert line.split("|")[column].strip() == written
