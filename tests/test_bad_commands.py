"""Every command on damaged files and senseless flags: one sentence and no traceback."""

import json
import shutil

import pytest

import runs
import tiny
from promptkd.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, with the pair and the data beside it."""
    place = tmp_path_factory.mktemp("finished")
    tiny.save_pair(place)
    tiny.write_data(place / "train.jsonl")
    raw = tiny.recipe(place, optimization={"max_steps": 2})
    raw["data"] |= {"validation": str(place / "train.jsonl")}
    runs.train(raw)
    return place


@pytest.fixture
def said(finished, tmp_path, capfd):
    """Damage a copy of the run, then type a command on it; returns exit code and last sentence."""

    def end(damage, *command):
        run = tmp_path / "run"
        shutil.copytree(finished / "run", run)
        damage(run)
        words = {"RUN": str(run), "DATA": str(finished / "train.jsonl")}
        with pytest.raises(SystemExit) as ended:
            main([words.get(word, word) for word in command])
        stderr = capfd.readouterr().err
        assert "Traceback" not in stderr
        return ended.value.code, stderr

    return end


def overwrite(name, content):
    def damage(run):
        path = run / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def nothing(_run):
    pass


GENERATE, REPORT = ("generate", "RUN", "Hi"), ("report", "RUN")
EVALUATE = ("evaluate", "RUN", "--data", "DATA", "--seeds", "1")
ADAPTER = "teacher_adapter/adapter_model.safetensors"
OTHER_DATE = json.dumps({"identity": {"recipe": {}, "method": ""}, "date": "soon"})


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b"a: [", b"a: 1"], ids=repr)
def test_a_damaged_recipe(said, content):
    code, sentence = said(overwrite("recipe.yaml", content), *GENERATE)
    assert code == 1
    assert "promptkd: " in sentence


def test_a_recipe_that_is_no_text_has_no_report(said):
    code, sentence = said(overwrite("recipe.yaml", b"\xff\x00"), *REPORT)
    assert code == 1
    assert "recipe.yaml is not valid YAML" in sentence


def test_a_damaged_soft_prompt(said):
    code, sentence = said(overwrite(ADAPTER, b"\0" * 100), *GENERATE)
    assert code == 1
    assert "teacher_adapter is damaged" in sentence


def test_a_damaged_adapter_config(said):
    code, sentence = said(overwrite("teacher_adapter/adapter_config.json", "{"), *GENERATE)
    assert code == 1
    assert "adapter_config.json can't be read" in sentence


@pytest.mark.parametrize("command", [GENERATE, EVALUATE], ids=lambda c: c[0])
def test_a_record_with_a_date_that_is_none(said, command):
    code, sentence = said(overwrite("environment.json", OTHER_DATE), *command)
    assert code == 1
    assert "has the date 'soon'" in sentence


@pytest.mark.parametrize(
    "flags",
    [
        ("exposure-bias", "RUN", "--num-examples", "-1"),
        ("exposure-bias", "RUN", "--num-samples", "0"),
        ("exposure-bias", "RUN", "--max-response-tokens", "0"),
        ("analyse-prompt", "RUN", "--num-examples", "0"),
        ("analyse-prompt", "RUN", "--seed", "-1"),
        (*EVALUATE, "--top-p", "0"),
        (*EVALUATE, "--no-repeat-ngram-size", "-1"),
        (*EVALUATE, "--num-examples", "0"),
    ],
    ids=lambda flags: " ".join(flags[2:]),
)
def test_a_number_out_of_range(said, flags):
    code, sentence = said(nothing, *flags)
    assert code == 2
    assert "Invalid value for" in sentence


def test_an_unknown_precision(said):
    code, sentence = said(nothing, "exposure-bias", "RUN", "--precision", "fp64")
    assert code == 1
    assert "known: auto, bf16, fp32" in sentence


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_lines_about_no_step_are_left_out_of_the_report(finished, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    with open(run / name, "a") as file:
        file.write('{"a": 1}\n{"step": "x", "loss": 1}\n')
    main_of_report(run)
    assert "2 damaged lines are left out" in (run / "report.html").read_text()


def main_of_report(run):
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run)])
    assert ended.value.code == 0


ROWS = {
    "a tool call without an object": (
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"function": "f"}]},
                {"role": "tool", "content": "1"},
            ]
        },
        "a tool call has the function 'f'",
    ),
    "a tool without an object": (
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"function": "f"}]},
        "not a list of objects",
    ),
    "references that are empty": (
        {"instruction": "x", "output": ["", ""]},
        "train.jsonl:1 has none",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_that_no_model_can_learn_from(finished, tmp_path, capfd, kind):
    row, complaint = ROWS[kind]
    (tmp_path / "train.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    sentence = refused(finished, tmp_path, capfd, method={"name": "kd"})
    assert complaint in sentence


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "never reads 'instruction'"),
        ("Hello", "never reads 'instruction'"),
        ("{% if false %}{{ instruction }}{% endif %}", "makes no token of the row"),
    ],
)
def test_a_template_file_without_the_request(finished, tmp_path, capfd, text, complaint):
    (tmp_path / "own.jinja").write_text(text)
    tiny.write_data(tmp_path / "train.jsonl")
    template = {"template": str(tmp_path / "own.jinja")}
    assert complaint in refused(finished, tmp_path, capfd, data=template)


def refused(pair, place, capfd, **changes):
    """Train with a changed recipe on ``place``'s data; returns the sentence."""
    raw = tiny.recipe(pair, output=str(place / "run"))
    raw["data"] |= {"train": str(place / "train.jsonl")}
    for key, value in changes.items():
        raw[key] = value if key == "method" else raw.get(key, {}) | value
    with pytest.raises(SystemExit) as ended:
        main(["train", runs.write_recipe(place, raw)])
    assert ended.value.code == 1
    return capfd.readouterr().err.rpartition("promptkd: ")[2]
