"""Generations of state: exact, whole, checked."""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from kdvit.files import sha256
from kdvit.training.checkpoints import STRUCTURE, SUMS, TENSORS, Checkpoints


def state(step: int = 0) -> dict:
    weight = torch.arange(6.0).reshape(2, 3)
    return {
        "weights": {"a": weight, "tied": weight, "turned": weight.t(), "row": weight[1], "empty": torch.zeros(0, 3)},
        "kinds": [torch.tensor(step), torch.tensor(True), torch.ones(2, dtype=torch.bfloat16), torch.tensor(2**60)],
        "numbers": (0.1, 1e-300, math.inf, 2**70, -0.0, True, None, "text é", torch.bfloat16),
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


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [2, 3], ids=["written again", "new"])
def test_a_kill_between_any_two_file_operations_leaves_a_sound_state_and_no_litter(tmp_path, step):
    counts = itertools.count()
    for count in counts:
        checkpoints = Checkpoints(tmp_path / str(count))
        for earlier in (1, 2):
            checkpoints.save(earlier, state(earlier))
        left = count

        def call(*arguments, real, **options):
            nonlocal left
            left -= 1
            if left < 0:  # and so it goes on: no tidying up either
                raise Killed
            return real(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "fsync", "mkdir", "rmdir", "unlink", "chmod"):
                patch.setattr(os, name, functools.partial(call, real=getattr(os, name)))
            try:
                checkpoints.save(step, state(step))
                ended = True
            except Killed:
                ended = False
        loaded, note = checkpoints.load()
        assert note == "" and loaded["kinds"][0] in (step - 1, 2, step)
        for again in (step, step + 1):
            checkpoints.save(again, state(again))
        names = [f"step_{number:08d}" for number in (step, step + 1)]
        assert sorted(path.name for path in checkpoints.folder.iterdir()) == names, count
        if ended:
            break
    assert count > 10


def test_damaged_generations_do_not_push_sound_ones_out(tmp_path):
    for step in (4, 8):
        Checkpoints(tmp_path).save(step, state(step))
    flip(tmp_path / "step_00000008" / TENSORS)
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.load()[0]["kinds"][0] == 4
    checkpoints.save(5, state(5))  # the run goes on from step 4
    assert checkpoints.kept() == "the state of step 5 is intact"
    assert checkpoints.load()[0]["kinds"][0] == 5


def test_what_is_loaded_does_not_live_in_the_file(tmp_path):
    """Which will be removed: a file that is still in use keeps its room on the disk, and its folder on NFS."""
    Checkpoints(tmp_path).save(1, state())
    loaded = Checkpoints(tmp_path).load()[0]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not say which files are mapped")
    assert str(tmp_path) not in maps.read_text() and loaded


def test_other_names_are_left_alone(tmp_path):
    Checkpoints(tmp_path).save(1, state())
    (tmp_path / "step_00000009 (copy)").mkdir()
    assert Checkpoints(tmp_path).kept() == "the state of step 1 is intact"


def test_a_file_system_without_permissions_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chmod", lambda *arguments, **options: (_ for _ in ()).throw(PermissionError(1, "no")))
    Checkpoints(tmp_path).save(1, state())
    assert Checkpoints(tmp_path).load()[1] == ""


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
