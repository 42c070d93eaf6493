"""A tiny training job, and caches of its teacher."""

from __future__ import annotations

import shutil
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


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """built(of what) -> a folder for what any test may ask for; it is made once, and tests get copies."""
    parent = tmp_path_factory.mktemp("built")
    names: dict[str, str] = {}
    return lambda key: parent / names.setdefault(key, str(len(names)))


@pytest.fixture
def store(data: ImageData, tmp_path: Path, built: Callable[[str], Path]) -> Callable[..., StoredTeacher]:
    """store(losses, form=..., epochs=...) -> what the teacher says, stored in a new folder."""
    count = 0

    def make(
        losses: Sequence = ("kd",), *, folder: Path | None = None, live: Any = None, form: Any = "fp16",
        augmentation_epochs: int | None = None, images: ImageData = data, **changed: Any,
    ) -> StoredTeacher:  # fmt: skip
        nonlocal count

        def build_in(place: Path) -> Path:
            return build(
                place, distiller(live or teacher(), losses), images, settings(**changed), form=form,
                augmentation_epochs=augmentation_epochs, shard_mib=SHARD_MIB, quiet=True,
            )[0]  # fmt: skip

        count += 1
        new = tmp_path / f"cache{count}"
        if folder is not None or live is not None or images is not data:
            return StoredTeacher(build_in(folder or new))
        common = built(repr((losses, form, augmentation_epochs, sorted(changed.items()))))
        if not common.exists():
            build_in(common)
        return StoredTeacher(shutil.copytree(common, new))

    return make
