"""The page for notebooks, cell by cell; what is seen of it on the way."""

import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tqdm.auto
import tqdm.std
from tqdm.notebook import tqdm_notebook

import promptkd as pk
import tiny
from promptkd.bars import Log, progress_bar
from promptkd.models.quiet import quietly
from promptkd.records import Record

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_every_cell_of_the_page_runs_and_shows_what_it_says(tmp_path, monkeypatch, capfd):
    first, *cells = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text())
    _, teacher = tiny.save_pair(tmp_path, chat_template=True)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    assert TEACHER in first
    exec(first.replace(TEACHER, str(teacher)), names)
    capfd.readouterr()
    shown = []
    for cell in cells:
        *lines, last = cell.splitlines()
        exec("\n".join(lines).replace('"max_steps": 20', '"max_steps": 2'), names)
        shown.append(repr(eval(last.replace("(teacher, 20,", "(teacher, 2,"), names)))
    layers, forecast, run, parts, scores, responses = shown
    assert re.match(r"layers dropped: \[\d\] \(greedy\)\ncross-entropy", layers)
    assert "the run: 2 steps of 8 requests" in forecast
    assert "into runs/sums" in forecast
    assert run.startswith("gkd run in runs/sums: kept step ")
    assert "PosixPath('runs/sums/student')" in parts
    assert scores.startswith("8 examples, seeds [10, 20]")
    assert "reverse_kl_to_teacher" in scores
    assert "--- teacher\n" in responses
    assert "--- student\n" in responses
    seen = capfd.readouterr()
    assert not re.search("Loading weights|Writing model shards", seen.err + seen.out)
    assert names["scores"].scores.rouge_l.mean == names["scores"]["scores"]["rouge_l"]["mean"]


def test_the_package_is_imported_and_listed_without_torch():
    asked = "import sys, promptkd as pk; print(dir(pk), pk.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")
    public = [name for name in dir(pk) if not name.startswith("_")]
    assert public == sorted(pk.__all__)
    assert all(name in done.stdout for name in public)


def test_a_results_keys_are_its_attributes_at_every_depth():
    found = Record(scores={"rouge_l": {"mean": 1.0}}, items=[1])
    assert found.scores.rouge_l.mean == 1.0
    assert found == {"scores": {"rouge_l": {"mean": 1.0}}, "items": [1]}
    assert "scores" in dir(found)
    with pytest.raises(AttributeError, match="no 'score'; there are: scores, items"):
        _ = found.score


def test_a_bar_in_a_log_is_a_line_now_and_then():
    written = io.StringIO()
    with tqdm.std.tqdm(total=100, desc="steps", file=Log(written)) as bar:
        for _ in range(100):
            bar.update()
            bar.set_postfix(loss=1.0)
    first, last = written.getvalue().splitlines()
    assert first.startswith("steps:   0%")
    assert last.startswith("steps: 100%")


def test_a_bar_in_a_notebook_is_the_notebooks(monkeypatch):
    class Bar(tqdm_notebook):
        def __init__(self, iterable=None, **options):
            self.iterable, self.disable = iterable, True

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    assert isinstance(progress_bar([1], desc="steps"), Bar)


def test_quiet_loading_leaves_warnings_to_be_heard(caplog):
    loader = logging.getLogger("transformers.modeling_utils")
    loader.addHandler(caplog.handler)
    with quietly():
        loader.error("LlamaForCausalLM LOAD REPORT from: x")
        loader.error("something that matters")
    loader.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"something that matters"}
