"""Class by class: what `kdvit evaluate RUN ... --json RUN/evaluation.json` found out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Rows of the table at most: the classes that are furthest below the teacher.
MAX_CLASSES = 12
#: Entry of a fidelity -> what people call it, and its format.
FIGURES = {
    "agreement": ("agreement with the teacher", "{:.2f} %"),
    "kl": ("KL(teacher || model), nats", "{:.3f}"),
    "calibration_error": ("calibration error", "{:.2f} %"),
}


@dataclass(frozen=True)
class ClassGap:
    """Accuracies of one class in percent; ``gap`` is student minus teacher."""

    name: str
    student: float
    teacher: float | None
    baseline: float | None
    gap: float | None


@dataclass(frozen=True)
class Classes:
    """What the page shows: a row for each figure, with a column for each role; the worst classes."""

    roles: Sequence[str]
    figures: Sequence[tuple[str, Sequence[str]]]
    gaps: Sequence[ClassGap]
    num_classes: int


def classes_of(evaluation: Mapping[str, Any]) -> Classes:
    """Read the record of `kdvit evaluate`.

    Raises:
        ValueError, KeyError, TypeError: it is not such a record.
    """
    models = dict(evaluation["models"])
    if models["student"].get("teacher"):
        models["teacher"] = models["student"]["teacher"]
    names = evaluation["classes"]
    for role, model in models.items():
        if len(model["class_accuracy"]) != len(names):
            raise ValueError(f"the accuracies of the {role} do not fit the {len(names)} classes")
    figures = [
        (title, [_cell(model.get(key), form) for model in models.values()]) for key, (title, form) in FIGURES.items()
    ]
    figures = [("top-1", [_cell(model["accuracy"]["top1"], "{:.2f} %") for model in models.values()]), *figures]
    return Classes(tuple(models), figures, _gaps(models, names)[:MAX_CLASSES], len(names))


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _gaps(models: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[ClassGap]:
    """Every class that has images: the furthest below the teacher first, without one the least accurate first."""
    columns = {role: model["class_accuracy"] for role, model in models.items()}
    missing = [None] * len(names)
    found = []
    for name, ours, theirs, base in zip(
        names, columns["student"], columns.get("teacher", missing), columns.get("baseline", missing), strict=True
    ):
        if ours is not None:
            found.append(ClassGap(str(name), ours, theirs, base, None if theirs is None else ours - theirs))
    return sorted(found, key=lambda one: one.student if one.gap is None else one.gap)
