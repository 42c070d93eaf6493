"""What must be equal for a resumed run to be the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from kdvit.cache.fingerprint import leaves, of_bridge, of_job, of_teacher
from kdvit.cache.teacher import StoredTeacher
from kdvit.data import ImageData, ImageSplit, TransformSettings
from kdvit.distiller import Distiller, cross_entropy
from kdvit.models import uncompiled
from kdvit.schedules import Schedule
from kdvit.training.settings import Training
from kdvit.wrappers import Teacher

#: Settings that change how a run is looked at, not what comes of it.
FREE = ("evaluate_epochs", "log_steps", "save_steps", "keep_states", "gradient_share_steps", "num_workers", "trackers")


def summary_of(distiller: Distiller) -> dict[str, Any]:
    """Models, losses and weights, as `run.json` tells them."""
    return {
        "student": distiller.student.name,
        "teacher": " + ".join(map(_described, distiller.teachers)) or None,
        "losses": {name: repr(loss) for name, loss in distiller.losses.items()},
        "task_loss": _task_loss(distiller),
        "weights": {
            name: repr(weight) if isinstance(weight, Schedule) else "function" if callable(weight) else weight
            for name, weight in distiller.weights.items()
        },
    }


def identity_of(
    distiller: Distiller,
    data: ImageData,
    trained: ImageSplit,
    settings: Training,
    *,
    transform: TransformSettings,
    second_transform: TransformSettings | None,
    num_processes: int,
) -> dict[str, Any]:
    """All that decides what comes of a run, and can be compared.

    The data by its labels and some of its pixels, not by its place; a teacher by its weights. What cannot be told: the
    inside of functions (a weight, a task loss), and how a student's own module computes.
    """
    return {
        **{name: value for name, value in vars(settings).items() if name not in FREE},
        "num_processes": num_processes,
        "trained_images": len(trained),
        "train": of_job(data.train, transform, settings, holds_out=False)["data"],
        "test": of_job(data.test, transform, settings, holds_out=False)["data"],
        "transform": asdict(transform),
        "second_transform": repr(second_transform),
        **summary_of(distiller),
        "teachers": {str(number): _facts(teacher) for number, teacher in enumerate(distiller.teachers)},
        "dropout": _dropout(distiller.student.model),
    }


def check_same(stored: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume another run.

    Raises:
        ValueError: names the first thing that differs.
    """
    stored, found = dict(leaves(stored)), dict(leaves(found))
    for name in {**stored, **found}:
        if stored.get(name) != found.get(name):
            raise ValueError(
                f"Trainer: {name} must be {stored.get(name)!r} as in the run in '{folder}', got {found.get(name)!r}; "
                "resume it as it was started, or start another run in another folder."
            )


def _described(teacher: Teacher | StoredTeacher) -> str:
    return f"{teacher.name}, stored: {teacher.describe()}" if isinstance(teacher, StoredTeacher) else teacher.name


def _facts(teacher: Teacher | StoredTeacher) -> dict[str, Any]:
    """What a teacher's signals depend on. That a stored one's rows are of this job is checked elsewhere."""
    if isinstance(teacher, StoredTeacher):
        return teacher.manifest.fingerprint["teacher"]
    return {**of_teacher(teacher), **of_bridge(teacher.bridge, teacher.input_size)}


def _task_loss(distiller: Distiller) -> str | None:
    task_loss = distiller.task_loss
    if task_loss is None or isinstance(task_loss, nn.Module):
        return task_loss and repr(task_loss)
    return "cross_entropy" if task_loss is cross_entropy else getattr(task_loss, "__qualname__", "function")


def _dropout(model: nn.Module) -> dict[str, float]:
    """The rates that are not zero, by module: weights of models with and without dropout are alike."""
    rates = {}
    for name, module in uncompiled(model).named_modules():
        # Of nn.Dropout and its kind; of timm's and transformers' DropPath.
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "drop_prob", None)
        if rate:
            rates[name] = rate
    return rates
