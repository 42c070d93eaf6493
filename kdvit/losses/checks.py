"""Checks that losses share: numbers and choices of a constructor, shapes of what ``forward`` is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import TypeVar

from torch import Tensor, nn

from kdvit.losses.loss import Loss
from kdvit.losses.precision import at_least_float32
from kdvit.signals import Location, SignalInfo, nearest

T = TypeVar("T")

_RULES: dict[str, Callable[[float], bool]] = {
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    "in (0, 1)": lambda x: 0 < x < 1,
}


def number(owner: Loss, name: str, value: float, rule: str, advice: str) -> float:
    """The finite number as a float; ``rule`` is a key of `_RULES` and part of the sentence that refuses it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{type(owner).__name__}: {name} must be a number {rule}, got {value!r}; {advice}.")
    if not (math.isfinite(value) and _RULES[rule](value)):
        raise ValueError(f"{type(owner).__name__}: {name} must be {rule}, got {value}; {advice}.")
    return float(value)


def count(owner: Loss, name: str, value: int, advice: str) -> int:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{type(owner).__name__}: {name} must be an integer > 0, got {value!r}; {advice}.")
    if value <= 0:
        raise ValueError(f"{type(owner).__name__}: {name} must be > 0, got {value}; {advice}.")
    return value


def flag(owner: Loss, name: str, value: bool) -> bool:
    """True or False, and nothing that only counts as one: "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{type(owner).__name__}: {name} must be True or False, got {value!r}; write one of them.")
    return value


def choice(owner: Loss, name: str, value: T, known: Iterable[T]) -> T:
    """The value, if it is one of the known ones."""
    known = list(known)
    if value not in known:
        hint = nearest(str(value), known) or ";"
        raise ValueError(
            f"{type(owner).__name__}: {name} must be a known one, got '{value}'{hint} Known: {', '.join(known)}."
        )
    return value


def several(owner: Loss, name: str, locations: Iterable[Location]) -> tuple[Location, ...]:
    """Blocks or stages as a tuple; a single one is refused, because a path would be read letter by letter."""
    if locations is None or isinstance(locations, (int, float, str)):
        one = -1 if locations is None else locations
        raise TypeError(
            f"{type(owner).__name__}: {name} must be a sequence, got {locations!r}; write ({one!r},) for one."
        )
    locations = tuple(locations)
    if not locations:
        raise ValueError(f"{type(owner).__name__}: {name} must name at least one location, got none; name the blocks.")
    return locations


def paired(
    owner: Loss,
    student_name: str,
    student: Iterable[Location],
    teacher_name: str,
    teacher: Iterable[Location],
) -> tuple[tuple[Location, ...], tuple[Location, ...]]:
    """Blocks or stages of both models, as many of each: they are paired in order."""
    student, teacher = several(owner, student_name, student), several(owner, teacher_name, teacher)
    if len(student) != len(teacher):
        raise ValueError(
            f"{type(owner).__name__}: {teacher_name} must be as many as {student_name}, got {len(teacher)} for "
            f"{len(student)}; they are paired in order."
        )
    return student, teacher


def same_classes(
    owner: Loss,
    student: int,
    teacher: int,
    student_name: str = "student_logits",
    teacher_name: str = "teacher_logits",
) -> None:
    """Refuse logits over different classes, or over a single one."""
    if student != teacher:
        raise ValueError(
            f"{type(owner).__name__}: {teacher_name} has C={teacher} but {student_name} has C={student}; "
            "align the heads or pass class_map."
        )
    if student < 2:
        raise ValueError(
            f"{type(owner).__name__}: {student_name} must have C >= 2 classes, got C={student}; "
            "for a single score use a regression loss."
        )


def logit_pair(
    owner: Loss,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_name: str = "student_logits",
    teacher_name: str = "teacher_logits",
) -> tuple[Tensor, Tensor]:
    """Both logits, checked and in float32 at least; the teacher's are detached."""
    for name, logits in ((student_name, student_logits), (teacher_name, teacher_logits)):
        if logits.ndim != 2:
            raise ValueError(
                f"{type(owner).__name__}: {name} must have shape (B, C), got {tuple(logits.shape)}; "
                "pool tokens or positions first."
            )
    same_classes(owner, student_logits.shape[1], teacher_logits.shape[1], student_name, teacher_name)
    same_batch(owner, student_name, student_logits, teacher_name, teacher_logits)
    return at_least_float32(student_logits), at_least_float32(teacher_logits.detach())


def feature_pair(
    owner: Loss,
    student: Tensor,
    teacher: Tensor,
    student_name: str = "student_feature_map",
    teacher_name: str = "teacher_feature_map",
    axes: str = "B, D, h, w",
) -> tuple[Tensor, Tensor]:
    """Features of both models, checked and in float32 at least; the teacher's are detached. Widths may differ."""
    for name, x in ((student_name, student), (teacher_name, teacher)):
        if x.ndim != axes.count(",") + 1:
            raise ValueError(
                f"{type(owner).__name__}: {name} must have shape ({axes}), got {tuple(x.shape)}; "
                "give the signal of that name."
            )
    same_batch(owner, student_name, student, teacher_name, teacher)
    return at_least_float32(student), at_least_float32(teacher.detach())


def as_many(owner: Loss, locations: Iterable[Location], **inputs: Iterable[Tensor]) -> None:
    """Refuse a tuple of tensors that has not one for each location."""
    wanted = len(tuple(locations))
    for name, values in inputs.items():
        if not isinstance(values, (tuple, list)) or len(values) != wanted:
            got = len(values) if isinstance(values, (tuple, list)) else type(values).__name__
            raise ValueError(
                f"{type(owner).__name__}: {name} must be a tuple of {wanted} tensors, got {got}; give one for each "
                "location."
            )


def same_batch(owner: Loss, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two inputs of different batches."""
    if x.shape[0] != other.shape[0]:
        raise ValueError(
            f"{type(owner).__name__}: {other_name} has B={other.shape[0]} but {name} has B={x.shape[0]}; "
            "give both the same batch."
        )


def built_width(owner: Loss, name: str, x: Tensor, dim: int, axis: int = 1) -> None:
    """Refuse a signal whose width on ``axis`` is not ``dim``, that of build."""
    if x.shape[axis] != dim:
        raise ValueError(
            f"{type(owner).__name__}: {name} must have D={dim} as in build, got D={x.shape[axis]}; "
            "build the loss for these models."
        )


def several_positions(owner: Loss, grids: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Refuse pairs of grids that all have a single position in common: such a loss is 0 whatever the student does."""
    if all(min(s[0], t[0]) * min(s[1], t[1]) == 1 for s, t in grids):
        got = " and ".join(f"{height}x{width}" for height, width in grids[-1])
        raise ValueError(
            f"{type(owner).__name__}: grids must have more than one position in common, got {got}; "
            "choose earlier stages or larger images."
        )


def same_grid(owner: Loss, student: SignalInfo, teacher: SignalInfo) -> None:
    """Refuse patch tokens whose grid is not known, or differs."""
    for side, info in (("student", student), ("teacher", teacher)):
        if info.grid is None:
            raise ValueError(
                f"{type(owner).__name__}: {side} must have a patch grid, got none for {info.signal} of '{info.model}' "
                f"at '{info.location}'; choose a model of patch tokens, or pass grid=."
            )
    if student.grid != teacher.grid:
        got = " and ".join(f"{height}x{width}" for height, width in (student.grid, teacher.grid))
        raise ValueError(
            f"{type(owner).__name__}: student grid must equal teacher grid, got {got}; "
            "choose image and patch sizes that give both the same."
        )


def not_built(owner: Loss) -> RuntimeError:
    """The error of a loss with projectors that is called before `Loss.build`."""
    return RuntimeError(
        f"{type(owner).__name__}: build must be called before forward; put the loss into a kdvit.Distiller, "
        "or call build(student_info, teacher_info) yourself."
    )


def adopted_head(owner: Loss) -> nn.Linear:
    """The copy of the teacher's classifier that `Loss.adopt_head` gave, for `Loss.predict`."""
    if owner.head is None:
        raise RuntimeError(
            f"{type(owner).__name__}: adopt_head must be called before predict; put the loss into a kdvit.Distiller, "
            "or give it the teacher's linear classifier yourself."
        )
    return owner.head
