"""lm-evaluation-harness runs on a student, by a task file, and its table stays in the run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import runs
import tiny
from promptkd.errors import UserError
from promptkd.evaluation.lm_harness import lm_eval, table

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="pip install 'promptkd[lm-eval]'"
)
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl")
    return runs.train(tiny.recipe(directory, optimization={"max_steps": 1}))


def write_task(place: Path) -> str:
    rows = [{"question": f"say {i}", "choices": ["yes", "no"], "answer": i % 2} for i in range(6)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "task.yaml").write_text(TASK.format(rows=place / "rows.jsonl"))
    return str(place / "task.yaml")


def test_without_the_harness_a_sentence_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'promptkd\[lm-eval\]'"):
        lm_eval(run, ["hellaswag"])


def test_the_table_has_a_row_per_task_and_metric_and_a_column_per_model():
    own = {"limit": 5, "lm_eval_version": "0.4.13"}
    found = {
        label: own
        | {
            "results": {
                "a": {"alias": "a", "acc,none": value, "acc_stderr,none": 0.1},
                "b": {"alias": "b", "f1,strict": value, "f1_stderr,strict": "N/A"},
            }
        }
        for label, value in (("student", 0.25), ("teacher", 0.5))
    }
    lines = table(found).splitlines()
    assert lines[0] == "| task | metric | student | teacher |"
    assert lines[2] == "| a | acc | 0.2500 ± 0.1000 | 0.5000 ± 0.1000 |"
    assert lines[3] == "| b | f1 | 0.2500 | 0.5000 |"
    assert "0.4.13; the first 5 examples of each" in lines[-1]


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_a_task_file_is_run_on_the_student_and_its_teacher_without_a_hub(run, tmp_path):
    import lm_eval as harness
    from lm_eval.models.huggingface import HFLM

    task = write_task(tmp_path)
    found = lm_eval(run, [task], others=["teacher"], precision="fp32")

    for label, model in (("student", run / "student"), ("teacher", run.parent / "teacher")):
        plain = HFLM(pretrained=str(model), dtype="float32", device="cpu")
        expected = harness.simple_evaluate(model=plain, tasks=[task])["results"]["tiny_choice"]
        assert found[label]["results"]["tiny_choice"]["acc,none"] == expected["acc,none"]
        kept = json.loads((run / "lm_eval" / f"{label}.json").read_text())
        assert kept["results"]["tiny_choice"]["acc,none"] == expected["acc,none"]
        assert kept["n-samples"]["tiny_choice"]["effective"] == 6
    written = (run / "lm_eval" / "table.md").read_text()
    assert written.startswith("| task | metric | student | teacher |")
    assert "| tiny_choice | acc | " in written


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused_with_the_nearest(run):
    with pytest.raises(UserError, match=r"has no task 'hellaswagg'; did you mean 'hellaswag'"):
        lm_eval(run, ["hellaswagg"])
    with pytest.raises(UserError, match=r"none\.yaml doesn't exist"):
        lm_eval(run, ["none.yaml"])
