"""What a run leaves behind."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from kdvit import Distiller, Student, Training, create_model
from kdvit.losses import KD, ViTKD
from kdvit.training import Result
from kdvit.training.checkpoints import STRUCTURE, SUMS, TENSORS
from kdvit.training.run_folder import RunFolder
from tests.training.conftest import ARCHITECTURE, MEAN, SIZES, STD, distiller, metrics, newest_state, same_weights


@pytest.fixture
def finished(make_trainer) -> tuple[Result, nn.Module]:
    trainer = make_trainer(distiller([(0.5, KD()), ViTKD()]), epochs=2, lr=3e-3)
    return trainer.fit(), trainer.student


def test_the_folder_holds_this_and_no_more(finished):
    result, _ = finished
    files = {str(path.relative_to(result.folder)) for path in result.folder.rglob("*") if path.is_file()}
    assert files == {
        "run.json", "metrics.jsonl", "student/config.json", "student/model.safetensors", "best/config.json",
        "best/model.safetensors", "timing.jsonl", ".lock",
        *(f"state/step_0000000{step}/{name}" for step in (4, 8) for name in (TENSORS, STRUCTURE, SUMS)),
    }  # fmt: skip


def test_run_json_says_how_it_was_made(finished):
    result, _ = finished
    facts = json.loads((result.folder / "run.json").read_text())
    assert set(facts) == {
        "written", "command", "python", "versions", "commit", "result", "settings", "transform", "data", "student",
        "teacher", "losses", "weights", "device", "num_processes", "trained_images", "second_transform",
        "task_loss",
    }  # fmt: skip
    assert facts["versions"] == {name: metadata.version(name) for name in ("torch", "timm", "accelerate", "datasets")}
    assert facts["result"] == {**asdict(result), "folder": str(result.folder)}
    expected = Training(epochs=2, batch_size=16, log_steps=1, lr=3e-3)
    assert facts["settings"] == json.loads(json.dumps(asdict(expected)))
    assert facts["losses"]["kd"] == "KD(temperature=4.0)" and facts["losses"]["vitkd"].startswith("ViTKD(")
    assert facts["weights"] == {"task": 1.0, "kd": 0.5, "vitkd": 1.0}
    assert (facts["student"], facts["teacher"]) == ("small", ARCHITECTURE)
    assert facts["data"] == "fashion-mnist-sample, 64 images"
    assert facts["transform"]["mean"] == list(MEAN) and facts["transform"]["image_size"] == 28
    assert facts["device"].startswith("cpu") and facts["num_processes"] == 1


def test_the_commit_is_that_of_the_checkout(finished):
    checkout = Path(__file__).parent
    found = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("the tests do not run in a git checkout")
    assert len(json.loads((finished[0].folder / "run.json").read_text())["commit"]) == 40


def test_a_run_that_breaks_has_said_how_it_was_started(make_trainer, tmp_path):
    trainer = make_trainer(distiller(), folder=tmp_path / "run")
    trainer._train = lambda display: (_ for _ in ()).throw(ConnectionError())
    with pytest.raises(ConnectionError):
        trainer.fit()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["result"] is None and facts["settings"]["batch_size"] == 16


def test_every_loss_is_logged_by_its_name(finished):
    result, _ = finished
    steps, evaluations = metrics(result, "step"), metrics(result, "evaluation")
    assert len(steps) == 8 and len(evaluations) == 2
    for record in steps:
        assert set(record) == {"kind", "step", "epoch", "lr", "loss", "losses"}
        assert list(record["losses"]) == ["task", "kd", "vitkd.mimic", "vitkd.generate"]
        parts = record["losses"]
        total = parts["task"] + 0.5 * parts["kd"] + parts["vitkd.mimic"] + parts["vitkd.generate"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    timing = [json.loads(line) for line in (result.folder / "timing.jsonl").read_text().splitlines()]
    speeds = {line["step"]: line["images_per_second"] for line in timing if "images_per_second" in line}
    assert list(speeds) == [record["step"] for record in steps] and min(speeds.values()) > 0
    assert timing[-1] == {"step": 8, "seconds": result.seconds}
    assert set(evaluations[0]) == {"kind", "step", "epoch", "top1", "top5", "loss"}
    best = max(evaluations, key=lambda record: record["top1"])
    assert (result.best_top1, result.best_epoch) == (best["top1"], best["epoch"])
    assert (result.top1, result.top5) == (evaluations[-1]["top1"], evaluations[-1]["top5"])


def test_the_student_loads_in_timm(finished):
    result, student = finished
    images = torch.randn(3, 1, 28, 28)
    expected = student.eval()(images)
    folder = result.folder / "student"
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    by_file = timm.create_model(ARCHITECTURE, checkpoint_path=str(folder / "model.safetensors"), **SIZES)
    by_us = create_model(str(folder))
    for loaded in (by_folder, by_file, by_us):
        assert same_weights(loaded, student)
        torch.testing.assert_close(loaded.eval()(images), expected, rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"][9] == "Ankle boot"
    assert [tuple(by_folder.pretrained_cfg[key]) for key in ("mean", "std")] == [MEAN, STD]
    assert Student(by_folder).normalisation == (MEAN, STD)  # it may teach the next one without being told again


def test_another_model_cannot_take_the_students_weights(finished):
    file = str(finished[0].folder / "student" / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(ARCHITECTURE, checkpoint_path=file, **{**SIZES, "depth": 3})


def test_best_is_the_best_evaluation(make_trainer, monkeypatch):
    trainer = make_trainer(distiller(), epochs=3, lr=1e-2)
    at_epoch, scores = {}, {1: 30.0, 2: 50.0, 3: 40.0}
    evaluate = trainer._evaluate

    def scored(model, predict):
        accuracy = evaluate(model, predict)
        if model is not trainer.student:
            return accuracy
        at_epoch[trainer.epoch] = {name: value.clone() for name, value in model.state_dict().items()}
        return type(accuracy)(scores[trainer.epoch], accuracy.top5, accuracy.loss, accuracy.num_images)

    monkeypatch.setattr(trainer, "_evaluate", scored)
    result = trainer.fit()
    assert (result.top1, result.best_top1, result.best_epoch) == (40.0, 50.0, 2)
    for which, epoch in (("best", 2), ("student", 3)):
        loaded = timm.create_model(f"local-dir:{result.folder}/{which}", pretrained=True).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in at_epoch[epoch].items())


def test_a_model_that_timm_did_not_make_is_saved_as_weights(make_trainer):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    result = make_trainer(Distiller(None, Student(model, input_size=(1, 28, 28)), losses=[])).fit()
    from safetensors.torch import load_file

    assert [path.name for path in (result.folder / "student").iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(result.folder / "student" / "model.safetensors")["1.weight"], model[1].weight)


def test_the_state_holds_this(finished):
    state = newest_state(finished[0].folder)
    assert {"run", "distiller", "optimizer", "ema", "scaler", "step", "epoch", "best"} <= set(state)
    assert not any("teacher" in name for name in state["distiller"])


def test_what_was_logged_after_a_state_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log({"kind": "step", "step": 1})
    folder.save_state(1, {})
    for step in (1, 2):
        folder.log_timing({"step": step, "seconds": 10.0 * step})
    folder.log({"kind": "step", "step": 2})
    with folder.metrics_file.open("a") as file:
        file.write('{"kind": "step", "ste')  # the power went while it was written
    with folder.timing_file.open("a") as file:
        file.write('{"step": 3')
    assert folder.rewind(folder.load_state()[0]["metrics_bytes"], step=1) == 10.0
    assert json.loads(folder.timing_file.read_text()) == {"step": 1, "seconds": 10.0}
    assert [record["step"] for record in folder.metrics()] == [1]


def test_missing_metrics_are_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log({"kind": "step", "step": 1})
    folder.save_state(1, {})
    folder.metrics_file.unlink()
    with pytest.raises(ValueError, match=r"metrics.jsonl must have at least the 28 bytes that it had when .*, got 0;"):
        folder.rewind(folder.load_state()[0]["metrics_bytes"], step=1)


LOCK = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); "


def test_a_folder_serves_one_process_at_a_time(tmp_path):
    command = [sys.executable, "-S", "-c", LOCK + "print(flush=True); input()", str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"run folder '.*' must be used by one process at a time, but another tra"):
            RunFolder(tmp_path)
        other.kill()
    folder = RunFolder(tmp_path)
    RunFolder(tmp_path)  # this process may

    def others_may() -> bool:
        return subprocess.run([sys.executable, "-S", "-c", LOCK, tmp_path / ".lock"], stderr=-3).returncode == 0

    folder.hold()
    assert not others_may()
    folder.release()
    assert others_may()


def test_a_run_lets_go_of_its_folder(make_trainer):
    trainer = make_trainer(distiller())
    assert trainer.folder._lock is not None and pickle.loads(pickle.dumps(trainer.folder))._lock is None
    trainer.fit()
    assert trainer.folder._lock is None


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run folder '.*file' cannot be written \(File exists\); choose another."):
        RunFolder(tmp_path / "file")
