"""Generations of state: exact, whole, checked."""

from __future__ import annotations

import math
import subprocess

import pytest
import torch

from kdvit.files import sha256
from kdvit.training.checkpoints import STRUCTURE, SUMS, TENSORS, Checkpoints


def state(step: int = 0) -> dict:
    weight = torch.arange(6.0).reshape(2, 3)
    return {
        "weights": {"a": weight, "tied": weight, "turned": weight.t(), "row": weight[1], "empty": torch.zeros(0, 3)},
        "kinds": [torch.tensor(step), torch.tensor(True), torch.ones(2, dtype=torch.bfloat16), torch.tensor(2**60)],
        "numbers": (0.1, 1e-300, math.inf, 2**70, -0.0, True, None, "text é"),
        3: {"int key": [], "betas": (0.9, 0.999), ("a", 1): {}},
    }


def same(ours, theirs) -> bool:
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and repr(ours) == repr(theirs)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    Checkpoints(tmp_path).save(7, state())
    loaded, note = Checkpoints(tmp_path).load()
    assert note == "" and same(loaded, state())


def test_same_tells_states_apart():
    assert not same(state(1), state(0))
    assert not same({**state(), 3: {"betas": [0.9]}}, state())


def test_equal_states_are_equal_files(tmp_path):
    for name in ("a", "b"):
        Checkpoints(tmp_path / name).save(1, state())
    for file in (TENSORS, STRUCTURE, SUMS):
        first, second = ((tmp_path / name / "step_00000001" / file).read_bytes() for name in ("a", "b"))
        assert first == second


def test_the_newest_generations_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 11):
        checkpoints.save(step, state(step))
    assert [folder.name for folder in checkpoints.generations] == ["step_00000011", "step_00000010"]
    assert checkpoints.load()[0]["kinds"][0] == 11


def test_a_user_can_check_it(tmp_path):
    Checkpoints(tmp_path).save(1, state())
    result = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path / "step_00000001", capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{TENSORS}: OK\n{STRUCTURE}: OK\n")


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (cut, TENSORS, "'{}' was altered or cut short (its checksum differs)"),
        (flip, TENSORS, "'{}' was altered or cut short (its checksum differs)"),
        (flip, STRUCTURE, "'{}' was altered or cut short (its checksum differs)"),
        (lambda path: path.write_bytes(b""), SUMS, "'{0}/tensors.safetensors' was altered or cut short (its checksum"),
        (lambda path: path.write_bytes(b"\xff\xfe"), SUMS, "'{}' was altered"),
        (lambda path: path.unlink(), SUMS, "'{}' cannot be read (No such file or directory)"),
        (lambda path: path.unlink(), TENSORS, "'{}' cannot be read (No such file or directory)"),
        (lambda path: path.unlink(), STRUCTURE, "'{}' cannot be read (No such file or directory)"),
    ],
)
def test_a_damaged_generation_is_named_and_the_one_before_is_used(tmp_path, damage, name, words):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    damage(tmp_path / "step_00000002" / name)
    loaded, note = checkpoints.load()
    assert same(loaded, state(1))
    place = tmp_path / "step_00000002"
    assert note.startswith(words.format(place if "{0}" in words else place / name))
    assert note.endswith("; the state of step 1 is used.")
    checkpoints.save(2, state(2))  # and is replaced by a sound one
    assert checkpoints.load()[1] == ""


def test_no_sound_generation_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state())
    flip(tmp_path / "step_00000001" / TENSORS)
    with pytest.raises(
        ValueError, match=r"state: '.*' must hold a sound state, but '.*tensors.safetensors' was alter.*"
    ):
        checkpoints.load()
    with pytest.raises(ValueError, match=r"but it is empty; start the run again in another folder."):
        Checkpoints(tmp_path / "none").load()


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".step_00000003.tmp").mkdir()
    (tmp_path / ".step_00000003.tmp" / TENSORS).write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.generations == []
    checkpoints.save(4, state())
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_nothing_that_could_execute_is_written(tmp_path):
    with pytest.raises(TypeError, match="state: a value must be a tensor, number, string or None, or hold such, got"):
        Checkpoints(tmp_path).save(1, {"function": print})
    assert Checkpoints(tmp_path).generations == []


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RuntimeError, match="at step 1 .No space left on device.; there is no state yet: make room"):
            checkpoints.save(1, state())
    checkpoints.save(1, state())
    before = sha256(tmp_path / "step_00000001" / TENSORS)
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(RuntimeError, match="at step 2 .Input/output error.; the state of step 1 is intact: make room"):
        checkpoints.save(2, state())
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert sha256(tmp_path / "step_00000001" / TENSORS) == before
