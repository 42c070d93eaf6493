"""Several teachers by a loss of one: with each of them, and the weighted mean."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdvit.losses.checks import number
from kdvit.losses.loss import SECOND_VIEW, Loss, reads_teacher, reads_teachers
from kdvit.losses.wrapper import LossWrapper
from kdvit.signals import Location, ModelInfo

META = "has meta-parameters of its own"


class EachTeacher(LossWrapper):
    """Let each of several teachers teach by a loss of one teacher, all alike or with a weight each.

    L = sum_t w_t loss_t(student, teacher_t),  w_t = 1 / T by default, else weights / sum of weights

    A `kdvit.Distiller` with a list of teachers puts it around every loss of one teacher: that is uniform weighting. For
    weights that depend on the image see `CAMKD` and `MMKD`. Every teacher has a loss of its own, with own projectors.

    Published: uniform weights are the baseline of every paper on several teachers.

    Args:
        loss: any loss that reads ``teacher_*``; it is copied for each teacher.
        weights: one >= 0 for each teacher, in their order, not all 0; they are scaled to sum 1. None: all alike.

    Inputs:
        those of ``loss``, with ``teachers_*``, a tuple with one value per teacher, in place of ``teacher_*``.

    Returns:
        What ``loss`` returns: each term's weighted mean over the teachers.

    Raises:
        ValueError: loss reads no teacher, or reads several already; it is calibrated, has meta-parameters, or the
            student is deployed with it; weights do not fit the teachers.
        TypeError: loss is no `Loss`; weights are no list of numbers.
        RuntimeError: called before build.

    Source:
        You et al., Learning from Multiple Teacher Networks, KDD 2017, https://doi.org/10.1145/3097983.3098135: no
        official code; from the paper. Our choice: losses are averaged, not the teachers' logits.

    Example:
        >>> import torch
        >>> from kdvit.losses import FitNet
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> zeros, ones = torch.zeros(2, 8, 4, 4), torch.ones(2, 8, 4, 4)
        >>> info = ModelInfo.of(feature_map=SignalInfo.of("feature_map", zeros))
        >>> loss = EachTeacher(FitNet(), weights=(3, 1))
        >>> loss.build(info, (info, info))
        >>> loss(zeros, (zeros, ones)).item()  # 3/4 * (0 - 0)^2 + 1/4 * (0 - 1)^2
        0.25
    """

    def __init__(self, loss: Loss, weights: Sequence[float] | None = None) -> None:
        super().__init__(loss)
        self._refuse(not reads_teacher(loss), "reads no teacher")
        self._refuse(reads_teachers(loss), "reads all teachers already")
        self._refuse(loss.calibrate is not None, "is fitted before training to one teacher")
        self._refuse(loss.meta_optimizer() is not None, META)
        self._refuse(loss.predict is not None, "deploys the student with one teacher's classifier")
        self.weights = weights
        if weights is not None:
            if not isinstance(weights, (list, tuple)):
                raise TypeError(
                    f"EachTeacher: weights must be a list of numbers, got {weights!r}; write one for each teacher."
                )
            self.weights = tuple(number(self, "weights", weight, ">= 0", "one for each teacher") for weight in weights)
            if not sum(self.weights) > 0:
                raise ValueError(f"EachTeacher: weights must not all be 0, got {weights}; give one teacher a say.")
        self.losses: nn.ModuleList | None = None

    @property
    def name(self) -> str:
        """The name of the loss: it is the same method."""
        return self.loss.name or type(self.loss).__name__.lower()

    def inputs(self) -> tuple[str, ...]:
        return tuple(map(_of_all, self.loss.inputs()))

    def locations(self) -> Mapping[str, Location | Sequence[Location]]:
        return {_of_all(name): where for name, where in self.loss.locations().items()}

    def build(self, student: ModelInfo, teacher: Sequence[ModelInfo]) -> None:
        if self.weights is not None and len(self.weights) != len(teacher):
            raise ValueError(
                f"EachTeacher: weights must be one for each of the {len(teacher)} teachers, got {len(self.weights)}; "
                "write them in the order of the teachers."
            )
        self.losses = nn.ModuleList(copy.deepcopy(self.loss) for _ in teacher)
        for loss, info in zip(self.losses, teacher, strict=True):
            loss.build(student, info)
            self._refuse(loss.meta_optimizer() is not None, META)  # of those that build makes

    def allocate(self, num_samples: int) -> None:
        for loss in self.losses or ():
            loss.allocate(num_samples)

    def forward(self, *signals: Any, **named: Any) -> Tensor | dict[str, Tensor]:
        if self.losses is None:
            raise RuntimeError(
                "EachTeacher: build must be called before forward; put the loss into a kdvit.Distiller with a list of "
                "teachers, or call build(student_info, teacher_infos) yourself."
            )
        given = dict(zip(self.inputs(), signals)) | named
        weights = self.weights or (1.0,) * len(self.losses)
        results = []
        for number_, loss in enumerate(self.losses):
            inputs = {name: self._of_one(name, given[_of_all(name)], number_) for name in loss.inputs()}
            results.append(loss(**inputs))
        if isinstance(results[0], Mapping):
            return {term: _mean([result[term] for result in results], weights) for term in results[0]}
        return _mean(results, weights)

    def _refuse(self, fault: bool, what: str) -> None:
        if fault:
            raise ValueError(
                "EachTeacher: loss must be one of a single teacher that can be repeated, got "
                f"{type(self.loss).__name__}, which {what}; choose another loss, or give one teacher."
            )

    def _of_one(self, name: str, value: Any, teacher: int) -> Any:
        if _of_all(name) == name:
            return value
        if len(value) != len(self.losses):
            raise ValueError(
                f"EachTeacher: {_of_all(name)} must have one value for each of the {len(self.losses)} teachers, got "
                f"{len(value)}; give a tuple in their order."
            )
        return value[teacher]


def _of_all(name: str) -> str:
    """``teacher_logits`` -> ``teachers_logits``, in either view; other inputs as they are."""
    view = SECOND_VIEW if name.startswith(SECOND_VIEW) else ""
    rest = name.removeprefix(view)
    return f"{view}teachers_{rest.removeprefix('teacher_')}" if rest.startswith("teacher_") else name


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    stacked = torch.stack(list(values))
    return (stacked * stacked.new_tensor(weights)).sum() / sum(weights)
