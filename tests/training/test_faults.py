"""The fault table of a run: what happens, in which words, and what is left.

NaN at a step is in test_refusals.py; the rows of stored teachers are in tests/cache.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from kdvit import cli
from kdvit.data import open_data
from kdvit.losses import KD, Loss
from kdvit.training.checkpoints import STRUCTURE, SUMS, TENSORS, Checkpoints
from kdvit.training.interruption import Interrupted, Interruption
from tests.processes import REPOSITORY
from tests.training.conftest import distiller, newest_state, same_weights
from tests.training.test_checkpoints import cut, flip


class At(Loss):
    """Calls something at one step of the training, and adds nothing to the loss."""

    def __init__(self, step: int, action=lambda: None) -> None:
        super().__init__()
        self.step, self.action = step, action

    def forward(self, student_logits: Tensor, progress) -> Tensor:
        if self.training and progress.step == self.step:
            self.action()
        return 0 * student_logits.sum()

    def __repr__(self) -> str:
        return "At()"


# Damaged states


@pytest.mark.parametrize(("damage", "name"), [(cut, TENSORS), (flip, STRUCTURE), (Path.unlink, SUMS)])
def test_a_damaged_state_is_named_and_the_run_ends_as_it_would_have(make_trainer, tmp_path, capsys, damage, name):
    whole = make_trainer(distiller(), folder=tmp_path / "whole", epochs=2)
    whole.fit()
    make_trainer(distiller(), folder=tmp_path / "run", epochs=2).fit()
    damage(tmp_path / "run" / "state" / "step_00000008" / name)
    resumed = make_trainer(distiller(), folder=tmp_path / "run", epochs=2, resume=True, quiet=False)
    assert resumed.step == 4
    resumed.fit()
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{name}' " in shown and "; the state of step 4 is used." in shown
    assert same_weights(resumed.plain, whole.plain)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_states_that_are_all_damaged_are_refused(make_trainer, tmp_path):
    make_trainer(distiller(), folder=tmp_path / "run").fit()
    for generation in Checkpoints(tmp_path / "run" / "state").generations:
        flip(generation / TENSORS)
    with pytest.raises(ValueError, match=r"state: '.*' must hold a sound state, but '.*step_00000004.*' was altered"):
        make_trainer(distiller(), folder=tmp_path / "run", resume=True)


# The disk


def in_small_file_system(folder: Path, mount: str, *worker: str) -> str:
    """What a worker prints that trains in ``folder``, on a file system of its own that nobody else sees."""
    folder.mkdir()
    script = f"mount -t tmpfs {mount} && {sys.executable} -W error -m tests.training.disk_worker {' '.join(worker)}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    if "Operation not permitted" in result.stderr or "unshare failed" in result.stderr:
        pytest.skip("this machine lets nobody mount a file system in a namespace of its own")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_full_disk_stops_the_run_and_the_last_state_is_intact(tmp_path):
    folder = tmp_path / "disk"
    # Room for two generations of state, but not for a third beside them, which is written before the oldest goes.
    mount = f"-o size=500k tmpfs {folder}"
    script = f"adamw; {sys.executable} -m tests.training.disk_worker {folder}/run adamw; ls {folder}/run/state"
    first, second, *states = in_small_file_system(folder, mount, f"{folder}/run", script).splitlines()
    assert states == ["step_00000000", "step_00000001"]
    assert first == (
        f"state: '{folder}/run/state' could not be written at step 2 (No space left on device); the state of step 1 is "
        "intact: make room or give it write permission, then resume."
    )
    assert second == first  # resumed from step 1, and as full as before


def test_a_folder_that_is_read_only_is_refused_before_training(tmp_path):
    folder = tmp_path / "disk"
    shown = in_small_file_system(folder, f"-o size=1m,ro tmpfs {folder}", f"{folder}/run", "adamw")
    assert shown == f"run folder '{folder}/run' cannot be written (Read-only file system); choose another."


def test_a_disk_that_becomes_full_with_the_metrics_is_named(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(
        distiller([KD(), At(2, lambda: monkeypatch.setattr(Path, "open", full))]), folder=tmp_path / "run"
    )

    def full(path, *arguments):
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError) as caught:
        trainer.fit()
    assert str(caught.value) == (
        f"run folder: '{tmp_path}/run/metrics.jsonl' could not be written (No space left on device); the state of step "
        "0 is intact: make room or give it write permission, then resume."
    )


# Images and loader processes


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """40 images to train on and 10 to test with."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 1)):
        for label in range(10):
            for number in range(count):
                path = tmp_path / "images" / split / f"class{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.randint(0, 256, (28, 28), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_in_the_middle_of_an_epoch_is_named(make_trainer, tmp_path, pictures, num_workers):
    options = {"epochs": 3, "batch_size": 8, "save_steps": 1, "num_workers": num_workers}
    whole = make_trainer(distiller(), data=open_data(pictures), **options)
    whole.fit()
    trainer = make_trainer(distiller([KD()]), data=open_data(pictures), folder=tmp_path / "run", **options)
    trainer.train_loader.dataset.cache_mib = 0  # so that every epoch reads the files
    bad = pictures / "train" / "class3" / "2.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:60])
    with pytest.raises(RuntimeError) as caught:
        trainer.fit()
    sentence = str(caught.value)
    assert sentence.startswith("Trainer: images could not be loaded after step ") and "\n" not in sentence
    assert f": data: {bad} must be a readable image, got " in sentence
    kept = newest_state(tmp_path / "run")["step"]
    assert sentence.endswith(f"; replace or remove it; the state of step {kept} is intact: mend this, then resume.")
    bad.write_bytes(content)
    resumed = make_trainer(distiller(), data=open_data(pictures), folder=tmp_path / "run", resume=True, **options)
    resumed.fit()
    assert same_weights(resumed.plain, whole.plain)


def test_a_killed_loader_process_is_a_sentence(make_trainer, tmp_path):
    def kill() -> None:
        os.kill(trainer.train_loader.base_dataloader._iterator._workers[0].pid, signal.SIGKILL)

    options = {"epochs": 2, "save_steps": 1, "num_workers": 2, "folder": tmp_path / "run"}
    trainer = make_trainer(distiller([KD(), At(5, kill)]), **options)
    with pytest.raises(RuntimeError) as caught:
        trainer.fit()
    assert str(caught.value).startswith("Trainer: images could not be loaded after step ")
    assert "DataLoader worker (pid" in str(caught.value) and "mend this, then resume." in str(caught.value)
    resumed = make_trainer(distiller([KD(), At(-1)]), resume=True, **options)
    assert resumed.fit().num_steps == 8


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("step", [2, 3, 7], ids=["within an epoch", "at its end", "at the run's end"])
def test_a_signal_saves_and_stops(make_trainer, tmp_path, number, step):
    whole = make_trainer(distiller([KD(), At(-1)]), folder=tmp_path / "whole", epochs=2)
    whole.fit()
    before = signal.getsignal(number)
    subject = distiller([KD(), At(step, lambda: os.kill(os.getpid(), number))])
    with pytest.raises(Interrupted) as caught:
        make_trainer(subject, folder=tmp_path / "run", epochs=2).fit()
    assert signal.getsignal(number) is before
    assert caught.value.number == number
    assert str(caught.value) == (
        f"stopped at step {step + 1} of 8, and its state is saved in '{tmp_path / 'run'}'; resume to go on."
    )
    resumed = make_trainer(distiller([KD(), At(-1)]), folder=tmp_path / "run", epochs=2, resume=True)
    assert resumed.step == step + 1
    resumed.fit()
    assert same_weights(resumed.plain, whole.plain)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_signal_to_all_processes_of_a_job_saves_and_stops_too(make_trainer, tmp_path):
    """As schedulers and service managers send it: the loader processes, asked as well, bring what the step needs."""
    options = {"epochs": 2, "batch_size": 4, "accumulation_steps": 8, "num_workers": 2}
    whole = make_trainer(distiller([KD(), At(-1)]), folder=tmp_path / "whole", **options)
    whole.fit()

    def ask() -> None:
        if trainer.interruption.number:
            return  # once is enough
        loaders = trainer.train_loader.base_dataloader._iterator._workers
        subprocess.run(["kill", "-TERM", *(str(each.pid) for each in loaders)], check=True)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(distiller([KD(), At(0, ask)]), folder=tmp_path / "run", **options)
    with pytest.raises(Interrupted, match="stopped at step 1 of 4, and its state is saved"):
        trainer.fit()
    resumed = make_trainer(distiller([KD(), At(-1)]), folder=tmp_path / "run", resume=True, **options)
    resumed.fit()
    assert same_weights(resumed.plain, whole.plain)


@pytest.mark.parametrize("options", [{"epochs": 2}, {"steps": 6}], ids=str)
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(make_trainer, tmp_path, options):
    options |= {"keep_states": 1, "batch_size": 8, "ema_decay": 0.9}
    make_trainer(distiller(), folder=tmp_path / "whole", **options).fit()
    trainer = make_trainer(distiller(), folder=tmp_path / "run", **options)
    seen = []

    def ask(module, inputs) -> None:
        if trainer.in_evaluation and trainer.step == trainer.total_steps:
            seen.append(len(inputs[0]))
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.student.register_forward_pre_hook(ask)
    with pytest.raises(Interrupted, match=f"stopped at step {trainer.total_steps} of "):
        trainer.fit()
    assert seen == [8]  # of 32 test images
    resumed = make_trainer(distiller(), folder=tmp_path / "run", resume=True, **options)
    assert resumed.in_evaluation
    resumed.fit()
    for file in ("student/model.safetensors", "best/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_a_trainer_that_was_stopped_can_go_on(make_trainer, tmp_path):
    """In a notebook, after Ctrl-C."""
    make_trainer(distiller([KD(), At(-1)]), folder=tmp_path / "whole", epochs=2).fit()
    subject = distiller([KD(), At(1, lambda: os.kill(os.getpid(), signal.SIGINT))])
    trainer = make_trainer(subject, folder=tmp_path / "run", epochs=2)
    with pytest.raises(Interrupted):
        trainer.fit()
    try:
        assert trainer.fit().num_steps == 8
    except Interrupted as again:
        pytest.fail(str(again))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_second_signal_stops_at_once(make_trainer):
    def twice() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)  # in this thread: two that come at once would be one

    # A shell lets what it starts in the background ignore SIGINT, and so these tests perhaps.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            make_trainer(distiller([At(1, twice)])).fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(caught.value, Interrupted)


def test_signals_are_left_alone_outside_of_the_main_thread():
    import threading

    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_command_says_that_it_stopped_and_exits_as_killed(monkeypatch, capsys):
    def stop(argv) -> None:
        raise Interrupted(signal.SIGTERM, "stopped at step 3 of 8, and its state is saved in 'x'; resume to go on.")

    monkeypatch.setattr("kdvit.cli.listing.main", stop)
    assert cli.main(["list"]) == 128 + 15
    assert capsys.readouterr().err == "kdvit: stopped at step 3 of 8, and its state is saved in 'x'; resume to go on.\n"
