"""A tiny training job, and caches of its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kdvit import Distiller, Student, Teacher, Training
from kdvit.cache import StoredTeacher, build
from kdvit.data import ImageData, open_data
from tests.training.conftest import MEAN, STD, no_curves, vit  # noqa: F401 - a fixture

#: What one shard holds here: two batches of most losses.
SHARD_MIB = 0.02


def teacher(seed: int = 7, **options: Any) -> Teacher:
    """A ViT that is wider than the student, of another normalisation."""
    return Teacher(vit(seed, **{"embed_dim": 32, **options}), name="wide")


def distiller(taught_by: Any, losses: Sequence = ("kd",), **options: Any) -> Distiller:
    """A student and projectors with the same weights each time."""
    torch.manual_seed(1)
    return Distiller(taught_by, Student(vit(), mean=MEAN, std=STD, name="small"), losses, **options)


def settings(**options: Any) -> Training:
    return Training(**{"epochs": 2, "batch_size": 8, "log_steps": 1, **options})


@pytest.fixture(scope="session")
def data() -> ImageData:
    return open_data("fashion-mnist-sample").subset(36, 12)  # the last batch is half


@pytest.fixture
def store(data: ImageData, tmp_path: Path) -> Callable[..., StoredTeacher]:
    """store(losses, form=..., epochs=...) -> what the teacher says, stored in a new folder."""
    count = 0

    def make(
        losses: Sequence = ("kd",), *, folder: Path | None = None, live: Any = None, form: Any = "fp16",
        augmentation_epochs: int | None = None, images: ImageData = data, **changed: Any,
    ) -> StoredTeacher:  # fmt: skip
        nonlocal count
        count += 1
        made = build(
            folder or tmp_path / f"cache{count}", distiller(live or teacher(), losses), images, settings(**changed),
            form=form, augmentation_epochs=augmentation_epochs, shard_mib=SHARD_MIB, quiet=True,
        )  # fmt: skip
        return StoredTeacher(made[0])

    return make
