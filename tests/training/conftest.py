"""A training run of a second: 64 images, two ViTs of a few thousand weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from kdvit import Distiller, Student, Trainer, Training
from kdvit.data import ImageData, open_data
from kdvit.losses import KD
from kdvit.training import Result
from kdvit.training.checkpoints import Checkpoints

ARCHITECTURE = "vit_tiny_patch16_224"
SIZES = {
    "img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 2, "num_heads": 2,
}  # fmt: skip
MEAN, STD = (0.286,), (0.353,)


def vit(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(ARCHITECTURE, **{**SIZES, **options})


def distiller(
    losses: Sequence = (KD(),), teacher: Any = "vit", task_loss: Any = "cross_entropy", **options
) -> Distiller:
    """A new student with the same weights each time; a teacher that is wider than it."""
    torch.manual_seed(1)
    teacher = vit(7, embed_dim=32) if teacher == "vit" else teacher
    return Distiller(teacher, Student(vit(**options), mean=MEAN, std=STD, name="small"), losses, task_loss=task_loss)


def metrics(result_or_folder: Result | Path, kind: str) -> list[dict[str, Any]]:
    folder = getattr(result_or_folder, "folder", result_or_folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def newest_state(folder: Path) -> dict[str, Any]:
    """The last resumable state of a run."""
    return Checkpoints(folder / "state").load()[0]


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Bit for bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="session")
def tiny_data() -> ImageData:
    return open_data("fashion-mnist-sample").subset(64, 32)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than such a run; test_curves.py and test_insight.py draw."""
    monkeypatch.setattr("kdvit.training.trainer.draw_curves", lambda *arguments: False)
    monkeypatch.setattr("kdvit.training.trainer.write_insight", lambda *arguments, **options: None)


@pytest.fixture
def make_trainer(tiny_data: ImageData, tmp_path: Path, no_curves: None) -> Callable[..., Trainer]:
    """make_trainer(distiller, epochs=2, ...) -> a quiet Trainer; Trainer's own arguments keep their names."""
    count = 0

    def make(subject: Distiller, *, folder: Path | None = None, data: ImageData = tiny_data, **options: Any) -> Trainer:
        nonlocal count
        count += 1
        own = {
            name: options.pop(name) for name in ("transform", "second_transform", "resume", "title") if name in options
        }
        quiet = options.pop("quiet", True)
        if "steps" in options:
            options["epochs"] = None
        settings = Training(**{"epochs": 1, "batch_size": 16, "log_steps": 1, **options})
        return Trainer(subject, data, settings, folder or tmp_path / f"run{count}", quiet=quiet, **own)

    return make
