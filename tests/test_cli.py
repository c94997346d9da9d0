"""Every command says what it did and where, or what is wrong, in one sentence."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import runs
import tiny
from promptkd.cli import app, main
from promptkd.errors import UserError

COMMANDS = (
    "init-student",
    "check",
    "train",
    "evaluate",
    "rescore",
    "compare",
    "exposure-bias",
    "analyse-prompt",
    "judge",
    "study",
    "report",
    "generate",
    "distill",
    "demo",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl", 6)
    raw = tiny.recipe(directory, optimization={"max_steps": 1}, data={"max_response_tokens": 6})
    return runs.train(raw)


@pytest.fixture
def command(capfd):
    def run(*arguments: object, status: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert end.value.code == status, captured.err
        assert "Traceback" not in captured.err
        return captured.err if status else captured.out

    return run


def test_help_names_every_command(command):
    text = command("--help")
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_says_what_it_does(command, name):
    text = command(name, "--help")
    registered = {c.name or c.callback.__name__: c.callback for c in app.registered_commands}
    assert registered[name].__doc__.splitlines()[0].split(";")[0] in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("trian",), "No such command 'trian'"),
        (("train",), "Missing argument 'recipe'"),
        (("evaluate", "m", "--data", "d", "--tempreature", "1"), "--tempreature"),
        (("evaluate", "m", "--data", "d", "--num-examples", "0"), "'--num-examples'"),
        (("evaluate", "m", "--data", "d", "--seeds", "1", "-2"), "-2"),
        (
            ("init-student", "--teacher", "t", "--layers", "x", "--output", "o"),
            "Invalid value for '--layers'",
        ),
    ],
)
def test_a_wrong_command_or_flag_is_refused_with_status_2(command, arguments, complaint):
    assert complaint in command(*arguments, status=2)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("train", "none.yaml"), "Recipe none.yaml: No such file or directory"),
        (("study", "none.yaml"), "Study none.yaml: No such file or directory"),
        (("evaluate", "/nowhere/run", "--data", "d.jsonl"), "/nowhere/run is not a "),
        (("generate", "/nowhere/run", "Why?"), "/nowhere/run is not a finished run"),
        (("exposure-bias", "/nowhere/run"), "/nowhere/run is not a finished run"),
        (
            ("init-student", "--teacher", "/nowhere/t", "--layers", 1, "--output", "/nowhere/o"),
            "/nowhere/t is not a model",
        ),
        (
            ("init-student", "--teacher=t", "--layers=1", "--output=o", "--search=best"),
            "--search is 'best'; known: single, greedy",
        ),
    ],
)
def test_what_is_not_there_is_refused_with_status_1(command, arguments, complaint):
    assert f"promptkd: {complaint}" in command(*arguments, status=1)


def test_an_output_below_a_file_is_refused(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    tiny.model("llama", num_layers=3).save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    options = ("--teacher", tmp_path / "teacher", "--layers", 1)
    text = command("init-student", *options, "--output", tmp_path / "file" / "s", status=1)
    assert f"{tmp_path}/file is a file, no directory. Choose another output." in text


def test_train_ends_with_the_place_of_its_run(command, finished, tmp_path):
    recipe = finished / "recipe.yaml"
    text = command("train", recipe, f"output={tmp_path / 'run'}", "optimization.max_steps=2")

    assert text.splitlines()[-1] == f"run: {tmp_path / 'run'}"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2


def test_evaluate_takes_several_seeds_and_files_after_one_flag(command, finished, tmp_path):
    first = tiny.write_data(tmp_path / "first.jsonl", 3)
    second = tiny.write_data(tmp_path / "second.jsonl", 2)
    text = command("evaluate", finished, "--data", first, second, "--seeds", 1, 2)

    assert "first: 3 examples, seeds [1, 2]" in text
    assert "second: 2 examples, seeds [1, 2]" in text
    assert "rouge_l" in text
    assert text.splitlines()[-1] == f"scores: {finished / 'evaluation'}"
    for name in ("first", "second"):
        scores = json.loads((finished / "evaluation" / f"{name}.json").read_text())
        assert scores["seeds"] == [1, 2]


def test_check_takes_the_first_steps_of_the_run_and_leaves_nothing(command, tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl", 6)
    tiny.write_data(tmp_path / "valid.jsonl", 3)
    raw = tiny.recipe(tmp_path, optimization={"max_steps": 2})
    raw["data"] |= {"validation": str(tmp_path / "valid.jsonl")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    before = runs.everything(tmp_path)
    text = command("check", tmp_path / "recipe.yaml")
    assert runs.everything(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"student", "teacher"}
    assert "ranks 1, device cpu, threads 1, precision float32, template none, " in text
    assert "the first request: 'say 0'; its response, by tokens: '|i|t| |i|s| |0|!|<eos>|'" in text
    assert "of 3 held-out requests 3 are in the training data (PK109)" in text

    command("train", tmp_path / "recipe.yaml")
    first = runs.json_lines(tmp_path / "run" / "metrics.jsonl")[1]
    assert f"one step: loss {first['loss']:.3f} nats per token" in text
    assert "the run: 2 steps of 4 requests (1.3 epochs), about " in text
    assert text.splitlines()[-1].endswith(f"into {raw['output']}")
    assert "is finished" in command("check", tmp_path / "recipe.yaml", status=1)


def test_a_suite_is_evaluated_rescored_and_compared(command, finished, tmp_path):
    data = tiny.write_data(tmp_path / "first.jsonl", 3)
    (tmp_path / "suite.yaml").write_text(f"held out: {data}\n")
    for place in ("a", "b"):
        command(
            *("evaluate", finished, "--suite", tmp_path / "suite.yaml"),
            *("--seeds", 1, "--output", tmp_path / place),
        )
    assert "held out: 3 examples" in command("rescore", tmp_path / "a")
    text = command("compare", tmp_path / "a", tmp_path / "b")
    assert "+0.000, 95% [+0.000, +0.000] (not clear, 3 requests)" in text
    assert "--data FILE ... or --suite" in command("evaluate", finished, status=1)


def test_generate_shows_teacher_adapted_teacher_and_student(command, finished):
    text = command("generate", finished, "say 3", "--temperature", 0)
    authors = [line[4:] for line in text.splitlines() if line.startswith("--- ")]

    assert authors == ["teacher", "adapted teacher", "student"]
    assert text == command("generate", finished, "say 3", "--temperature", 0, "--seed", 9)


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ("x" * 100, "The request has 100 tokens, and this run was made for at most 24"),
        (" ", "The request is empty. Say what the models are asked."),
    ],
    ids=["too long", "empty"],
)
def test_a_request_that_cannot_be_asked_is_refused(command, finished, request_, complaint):
    assert f"promptkd: {complaint}" in command("generate", finished, request_, status=1)


def test_a_place_for_scores_is_looked_at_before_any_work(command, finished, tmp_path):
    (tmp_path / "file").write_text("mine")
    data = finished.parent / "train.jsonl"
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        text = command("evaluate", finished, "--data", data, "--output", output, status=1)
        assert f"{tmp_path}/file is a file, no directory. Choose another output." in text
        assert "responses to" not in text


def test_init_student_says_what_it_dropped_and_where_the_student_is(command, tmp_path):
    tiny.model("llama", num_layers=4).save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    data = tiny.write_data(tmp_path / "d.jsonl", 4)
    text = command(
        *("init-student", "--teacher", tmp_path / "teacher", "--layers", 3),
        *("--output", tmp_path / "s", "--calibration", data, "--template", "none"),
    )

    record = json.loads((tmp_path / "s" / "pruning.json").read_text())
    assert f"layers dropped: {record['dropped']} (greedy)" in text
    assert f"teacher {record['loss_whole']:.3f}, student {record['loss_pruned']:.3f}" in text
    assert text.splitlines()[-1] == f"student: {tmp_path / 's'}"


@pytest.fixture
def failing():
    """Adds a command that raises what it is given, for as long as the test lasts."""

    def add(error: BaseException) -> None:
        @app.command("fail")
        def fail() -> None:
            """Fail."""
            raise error

    yield add
    app.registered_commands = [c for c in app.registered_commands if c.name != "fail"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: Read-only file system. Na"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/a"), "/a: File name too long. Name a"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Free some"),
        (OSError("nobody/x is not cached,\nsays the hub"), "nobody/x is not cached, says the hub"),
        (MemoryError(), "The memory is used up. Use a smaller optimization.micro_batch_tokens"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed"), "No space left on a disk. Fre"),
        (UserError("The row is empty.", "PK999"), "The row is empty. (PK999)"),
    ],
)
def test_an_error_of_the_system_is_a_sentence(command, failing, error, sentence):
    failing(error)
    assert command("fail", status=1).startswith(f"promptkd: {sentence}")


def test_ctrl_c_ends_with_130_and_a_sentence(command, failing):
    failing(KeyboardInterrupt())
    assert "promptkd: interrupted. What was saved is intact" in command("fail", status=130)


def test_a_defect_is_one_line_and_its_traceback_a_file(command, failing, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    failing(KeyError("lost"))
    text = command("fail", status=70)
    (place,) = tmp_path.iterdir()
    file = place / "traceback.txt"
    assert text.count("\n") == 1
    assert f"(KeyError: 'lost'). Please report it with {file}" in text
    assert "in fail" in file.read_text()
    assert place.stat().st_mode & 0o077 == 0


def test_the_module_can_be_run_as_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "promptkd", "train", "none.yaml"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "promptkd: Recipe none.yaml: No such file or directory. Name an existing YAML file.\n"
    )


def test_a_defect_on_a_full_disk_shows_its_traceback(failing, monkeypatch, capfd):
    def full(**_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    failing(KeyError("lost"))
    with pytest.raises(SystemExit) as end:
        main(["fail"])
    said = capfd.readouterr().err
    assert end.value.code == 70
    assert "in fail" in said
    assert "Please report it with the traceback above." in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_what_batch_systems_send_ends_a_command_with_a_sentence(command, number):
    @app.command("fail")
    def fail() -> None:
        """Fail."""
        signal.raise_signal(number)

    try:
        assert "promptkd: interrupted." in command("fail", status=128 + number)
    finally:
        app.registered_commands = [c for c in app.registered_commands if c.name != "fail"]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_terminal_that_cannot_show_a_character_shows_its_number():
    command = "from promptkd.cli import app, main\napp.command('say')(lambda: print('\\u2192'))\n"
    result = subprocess.run(
        [sys.executable, "-c", command + "main(['say'])"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (result.returncode, result.stdout) == (0, "\\u2192\n"), result.stderr


def test_a_seed_is_scored_once(command, finished):
    data = finished.parent / "train.jsonl"
    text = command("evaluate", finished, "--data", data, "--seeds", "1", "1", status=1)
    assert "The seeds are [1, 1]: give at least one, and each once" in text


@pytest.mark.parametrize("value", ["inf", "1e9"])
def test_a_temperature_beyond_all_bounds_is_refused(command, finished, value):
    text = command("generate", finished, "Hi", "--temperature", value, status=1)
    assert "it has to be 0, or 1e-06 to 100" in text
