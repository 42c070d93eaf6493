"""Accelerate's experiment trackers, by name."""

from __future__ import annotations

import json

import pytest

from kdvit import Training
from kdvit.training.trackers import check_trackers
from tests.training.conftest import distiller, metrics


def test_tensorboard_gets_the_metrics(make_trainer, tmp_path):
    make_trainer(distiller(), folder=tmp_path / "run", epochs=2, trackers=("tensorboard",)).fit()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "run" / "trackers").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    steps, evaluations = metrics(tmp_path / "run", "step"), metrics(tmp_path / "run", "evaluation")
    for name, expected in (
        ("loss", {record["step"]: record["loss"] for record in steps}),
        ("lr", {record["step"]: record["lr"] for record in steps}),
        ("losses/kd", {record["step"]: record["losses"]["kd"] for record in steps}),
        ("test/top1", {record["step"]: record["top1"] for record in evaluations}),
    ):
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(expected, rel=1e-6), name


def test_runs_with_and_without_a_tracker_are_one_run(make_trainer, tmp_path):
    make_trainer(distiller(), folder=tmp_path / "with", trackers=("tensorboard",)).fit()
    make_trainer(distiller(), folder=tmp_path / "without").fit()
    for name in ("metrics.jsonl", "student/model.safetensors", "state/step_00000004/tensors.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    resumed = make_trainer(distiller(), folder=tmp_path / "with", resume=True)
    assert resumed.step == 4
    assert json.loads((tmp_path / "with" / "run.json").read_text())["settings"]["trackers"] == ["tensorboard"]


def test_what_is_not_known_or_not_installed_is_refused(monkeypatch):
    with pytest.raises(
        ValueError, match="Training: unknown tracker 'tensorbord'; did you mean 'tensorboard'\\? Known: "
    ):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("kdvit.training.trackers.get_available_trackers", list)
    with pytest.raises(ValueError, match="Training: tracker 'comet_ml' must be installed; pip install comet-ml."):
        check_trackers(Training(trackers=("comet_ml",)).trackers)
