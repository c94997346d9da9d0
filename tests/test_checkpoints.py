"""Checkpoints appear whole or not at all; a damaged one is noticed and the one before is used."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from promptkd.errors import out_of_space
from promptkd.files import recover_replaced, whole_directory
from promptkd.training.checkpoints import (
    Checkpoint,
    load_latest,
    save_checkpoint,
    saved_checkpoints,
)


def checkpoint(step: int, **progress) -> Checkpoint:
    tensors = {
        "student": {"weight": torch.full((3, 4), float(step))},
        "student_optimizer": {"state": {0: {"step": torch.tensor(step)}}, "param_groups": []},
    }
    return Checkpoint(step, tensors, progress)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def damage(path: Path, position: int) -> None:
    """Turn one byte around."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(bytes(content))


def test_what_was_saved_is_loaded_again(tmp_path):
    save_checkpoint(tmp_path, checkpoint(7, best={"step": 5, "value": 0.1}), keep=2)
    found, complaints = load_latest(tmp_path)

    assert complaints == []
    assert (found.step, found.progress) == (7, {"best": {"step": 5, "value": 0.1}})
    assert torch.equal(found.tensors["student"]["weight"], torch.full((3, 4), 7.0))
    assert found.tensors["student_optimizer"]["state"][0]["step"].item() == 7


def test_nothing_saved_is_nothing_loaded(tmp_path):
    assert load_latest(tmp_path) == (None, [])
    assert load_latest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    for step in (2, 4, 6, 8):
        save_checkpoint(tmp_path, checkpoint(step), keep)

    assert names(tmp_path) == ["step-000002", "step-000004", "step-000006", "step-000008"][-keep:]


def test_the_newest_is_the_largest_step_even_beyond_a_million(tmp_path):
    for step in (999_998, 1_000_000):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)

    assert load_latest(tmp_path)[0].step == 1_000_000


def test_an_older_checkpoint_is_removed_only_after_the_new_one_is_whole(tmp_path):
    save_checkpoint(tmp_path, checkpoint(2), keep=1)

    unpicklable = Checkpoint(4, {"student": {"weight": lambda: None}}, {})
    with pytest.raises(AttributeError, match="Can't"):
        save_checkpoint(tmp_path, unpicklable, keep=1)
    assert load_latest(tmp_path)[0].step == 2


def test_no_checkpoint_has_its_name_before_it_is_complete(tmp_path):
    final = tmp_path / "step-000002"
    with whole_directory(final, "checkpoint") as temporary:
        (temporary / "student.pt").write_bytes(b"half")
        assert saved_checkpoints(tmp_path) == []
        assert not final.exists()
    assert saved_checkpoints(tmp_path) == [final]
    assert names(tmp_path) == ["step-000002"]


@pytest.mark.parametrize("position", [0, 100, -1])
@pytest.mark.parametrize("name", ["student.pt", "student_optimizer.pt"])
def test_one_wrong_byte_is_noticed_and_the_checkpoint_before_is_used(tmp_path, name, position):
    for step in (2, 4):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    damage(tmp_path / "step-000004" / name, position)
    found, complaints = load_latest(tmp_path)

    assert found.step == 2
    assert complaints == [
        f"Checkpoint {tmp_path}/step-000004 is damaged ({name} is not as it was written); "
        "using the one before."
    ]


@pytest.mark.parametrize("name", ["progress.json", "manifest.json"])
@pytest.mark.parametrize("position", range(0, 80, 8))
def test_a_wrong_byte_anywhere_in_the_small_files_is_noticed_too(tmp_path, name, position):
    for step in (2, 4):
        save_checkpoint(tmp_path, checkpoint(step, best={}, sources=[{"share": 0.25}] * 4), keep=2)
    damage(tmp_path / "step-000004" / name, position)
    found, complaints = load_latest(tmp_path)

    assert found.step == 2
    assert len(complaints) == 1


@pytest.mark.parametrize("name", ["student.pt", "progress.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_a_file_that_is_missing_or_cut_is_noticed(tmp_path, name, how):
    for step in (2, 4):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    path = tmp_path / "step-000004" / name
    match how:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
    found, complaints = load_latest(tmp_path)

    assert found.step == 2
    assert len(complaints) == 1


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "{}"])
def test_a_manifest_that_lists_nothing_is_damage(tmp_path, content):
    save_checkpoint(tmp_path, checkpoint(2), keep=1)
    (tmp_path / "step-000002" / "manifest.json").write_text(content)

    found, complaints = load_latest(tmp_path)
    assert found is None
    assert len(complaints) == 1


def test_two_damaged_checkpoints_leave_the_third(tmp_path):
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, checkpoint(step), keep=3)
    for step in (4, 6):
        damage(tmp_path / f"step-00000{step}" / "student.pt", 50)
    found, complaints = load_latest(tmp_path)

    assert found.step == 2
    assert ["step-000006" in complaints[0], "step-000004" in complaints[1]] == [True, True]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(tmp_path):
    for step in (2, 4):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    damage(tmp_path / "step-000004" / "student.pt", 50)
    save_checkpoint(tmp_path, checkpoint(4), keep=2)

    found, complaints = load_latest(tmp_path)
    assert (found.step, complaints) == (4, [])
    assert names(tmp_path) == ["step-000002", "step-000004"]


def test_writing_replaces_a_directory_whole(tmp_path):
    final = tmp_path / "student"
    with whole_directory(final, "student") as temporary:
        (temporary / "old").write_text("old")
    with whole_directory(final, "student") as temporary:
        (temporary / "new").write_text("new")
        assert (final / "old").exists()

    assert names(final) == ["new"]
    assert names(tmp_path) == ["student"]


def test_what_a_killed_process_left_half_written_is_not_taken_over(tmp_path):
    (tmp_path / ".writing-student").mkdir()
    (tmp_path / ".writing-student" / "stale").write_text("stale")
    with whole_directory(tmp_path / "student", "student") as temporary:
        (temporary / "new").write_text("new")

    assert names(tmp_path / "student") == ["new"]


def test_a_replacement_cut_off_between_its_renames_is_undone(tmp_path):
    old, final = tmp_path / ".replaced-student", tmp_path / "student"
    old.mkdir()
    (old / "model").write_text("old")
    recover_replaced(final)
    assert (final / "model").read_text() == "old"
    assert names(tmp_path) == ["student"]

    old.mkdir()
    (old / "model").write_text("older")
    recover_replaced(final)
    assert (final / "model").read_text() == "old"


def test_every_way_of_saying_that_the_disk_is_full_is_understood():
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert out_of_space(OSError(code, os.strerror(code)))
        assert out_of_space(RuntimeError(f"I/O error: {os.strerror(code)} (os error {code})"))
    assert not out_of_space(OSError(errno.EACCES, os.strerror(errno.EACCES)))
    assert not out_of_space(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_manifest_names_every_other_file(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(2), keep=1)

    listed = json.loads((path / "manifest.json").read_text())
    assert sorted([*listed, "manifest.json"]) == names(path)
