"""How well a model does, and how closely it follows its teacher, on all processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.training.evaluation import Accuracy, accuracy_of, accuracy_rows
from kdvit.wrappers import Teacher

Predict = Callable[[Tensor], Tensor]


class Figure(NamedTuple):
    """What tables call a number, and with how many digits they show it."""

    title: str
    digits: int


#: The numbers of a `Fidelity`; cross-entropy and KL are in nats, agreement and KL are with the teacher.
FIGURES = {
    "top1": Figure("top-1, %", 2),
    "top5": Figure("top-5, %", 2),
    "loss": Figure("cross-entropy", 3),
    "agreement": Figure("agreement, %", 2),
    "kl": Figure("KL(teacher||model)", 3),
    "reverse_kl": Figure("KL(model||teacher)", 3),
    "calibration_error": Figure("calibration error, %", 2),
}
#: Bins of the calibration error.
NUM_BINS = 15


@dataclass(frozen=True)
class Fidelity:
    """What a model's predictions are worth, and how close they are to a teacher's.

    Args:
        accuracy: top-1, top-5, cross-entropy, and over how many images.
        calibration_error: expected calibration error (ECE) in percent, in [0, 100]: images are sorted into 15 equally
            wide bins of the largest probability, (0, 1/15], (1/15, 2/15], ...; it is the mean over images of
            |share of right answers - mean largest probability| of their bin. Guo et al., On Calibration of Modern
            Neural Networks, ICML 2017, https://arxiv.org/abs/1706.04599.
        class_accuracy: top-1 in percent of the images of each class; None for a class without images.
        agreement: share of the images, in percent, that the model and the teacher give the same class.
        kl: mean KL(teacher || model) in nats, at temperature 1.
        reverse_kl: mean KL(model || teacher) in nats.
        teacher: the same of the teacher itself. It and the three before it are None without a teacher.
    """

    accuracy: Accuracy
    calibration_error: float
    class_accuracy: tuple[float | None, ...]
    agreement: float | None = None
    kl: float | None = None
    reverse_kl: float | None = None
    teacher: Fidelity | None = None

    def figures(self) -> dict[str, float | None]:
        """The numbers by the names of `FIGURES`."""
        return {name: getattr(self.accuracy if hasattr(self.accuracy, name) else self, name) for name in FIGURES}

    def worst_classes(self, count: int = 5) -> tuple[int, ...]:
        """The classes that are furthest below the teacher, or without one, of the lowest accuracy; worst first."""
        theirs = self.teacher.class_accuracy if self.teacher is not None else (0.0,) * len(self.class_accuracy)
        gaps = [
            (ours - other, index)
            for index, (ours, other) in enumerate(zip(self.class_accuracy, theirs, strict=True))
            if ours is not None
        ]
        return tuple(index for _, index in sorted(gaps)[:count])


@torch.no_grad()
def fidelity(
    student_predict: Predict,
    teacher_predict: Predict | None,
    loader: Iterable[dict],
    num_classes: int,
    accelerator: Accelerator,
) -> Fidelity:
    """Compare predictions with the labels and with a teacher's, in one pass over the images.

    Args:
        student_predict: images -> logits (B, num_classes); a model in eval mode.
        teacher_predict: `Teacher.predict`, for the same images; None for no teacher.
        loader: prepared by ``accelerator``; gives ``image`` and ``label``.
        num_classes: of the data.
        accelerator: gathers what each image adds; the images that even out the last batch are not counted twice.

    Raises:
        ValueError: predictions of another number of classes.
    """
    predicts = {"student_predict": student_predict, "teacher_predict": teacher_predict}
    tallies = {name: _Tally(num_classes) for name, predict in predicts.items() if predict is not None}
    relations = torch.zeros(3, dtype=torch.float64)
    for batch in loader:
        scores = {name: _checked(name, predicts[name](batch["image"]), num_classes) for name in tallies}
        labels, *gathered = accelerator.gather_for_metrics((batch["label"], *scores.values()))
        for tally, logits in zip(tallies.values(), gathered, strict=True):
            tally.add(logits, labels)
        if teacher_predict is not None:
            relations += _relations(*gathered)
    ours = tallies["student_predict"]
    if teacher_predict is None:
        return ours.result()
    agreement, kl, reverse_kl = (relations / ours.num_images).tolist()
    teacher = tallies["teacher_predict"].result()
    return ours.result(agreement=100 * agreement, kl=kl, reverse_kl=reverse_kl, teacher=teacher)


def teacher_prediction(teacher: nn.Module | None, loader: Iterable[dict], num_classes: int) -> Predict | None:
    """`Teacher.predict` where a teacher predicts the classes of the data.

    None for no teacher, a backbone without a classifier, other classes, or a stored teacher, which cannot run.
    """
    if not isinstance(teacher, Teacher):
        return None
    images = next(iter(loader))["image"][:1]
    try:
        return teacher.predict if teacher.predict(images).shape[1] == num_classes else None
    except TypeError:  # a backbone without a classifier
        return None


class _Tally:
    """Sums over images for one model."""

    def __init__(self, num_classes: int) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64)
        self.classes = torch.zeros(num_classes, 2, dtype=torch.float64)  # right answers, images
        self.bins = torch.zeros(NUM_BINS, dtype=torch.float64)  # right answers minus probability

    @property
    def num_images(self) -> float:
        return float(self.totals[-1])

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """One batch of all processes: (B, C) float32 and (B,)."""
        rows = accuracy_rows(logits, labels).cpu().double()
        right, probability = rows[:, 0], logits.softmax(1).amax(1).cpu().double()
        self.totals += rows.sum(0)
        self.classes.index_add_(0, labels.cpu(), rows[:, [0, -1]])
        upper = (probability * NUM_BINS).ceil().long().clamp(1, NUM_BINS)
        self.bins.index_add_(0, upper - 1, right - probability)

    def result(self, **relations: Any) -> Fidelity:
        shares = [100 * right / count if count else None for right, count in self.classes.tolist()]
        error = 100 * float(self.bins.abs().sum()) / self.num_images
        return Fidelity(accuracy_of(self.totals), error, tuple(shares), **relations)


def _relations(student: Tensor, teacher: Tensor) -> Tensor:
    """(3,): sums over images of equal classes, KL(teacher || student) and KL(student || teacher)."""
    ours, theirs = student.log_softmax(1), teacher.log_softmax(1)
    sums = (
        (student.argmax(1) == teacher.argmax(1)).sum(),
        F.kl_div(ours, theirs, reduction="sum", log_target=True),
        F.kl_div(theirs, ours, reduction="sum", log_target=True),
    )
    return torch.stack([value.cpu().double() for value in sums])


def _checked(name: str, logits: Tensor, num_classes: int) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise ValueError(
            f"fidelity: {name} must give logits (B, {num_classes}), as the data has classes, got "
            f"{tuple(logits.shape)}; give a model of these classes, or a Teacher with a class_map."
        )
    return logits.float()
