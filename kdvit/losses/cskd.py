"""CSKD: the teacher's decision at every place of the image, more and more mixed with its decision for the whole."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.checks import choice, logit_pair, number, same_batch, same_classes
from kdvit.losses.kd import kl_rows
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.signals import ModelInfo, Progress

_HEADS = {"dist": "dense_dist_logits", "class": "dense_logits"}
_DECAYS = {
    "linear": lambda share: 1 - share,
    "quadratic": lambda share: (1 - share) ** 2,
    "cosine": lambda share: math.cos(math.pi / 2 * share),
}


def dense_pair(
    owner: Loss, student: Tensor, teacher: Tensor, student_name: str = "student_dense_logits"
) -> tuple[Tensor, Tensor]:
    """Both maps of logits (B, C, h, w), checked and in float32 at least; the teacher's are detached."""
    for name, dense in ((student_name, student), ("teacher_dense_logits", teacher)):
        if dense.ndim != 4:
            raise ValueError(
                f"{type(owner).__name__}: {name} must have shape (B, C, h, w), got {tuple(dense.shape)}; "
                "lay the patches out on their grid."
            )
    same_classes(owner, student.shape[1], teacher.shape[1], student_name)
    same_batch(owner, student_name, student, "teacher_dense_logits", teacher)
    return at_least_float32(student), at_least_float32(teacher.detach())


@register("cskd")
class CSKD(Loss):
    """Pull the student's prediction at every patch towards the teacher's there, early in training, and overall, late.

    hard: L = mean_in cross_entropy(student_in, argmax_c m_inc)
    soft: L = T^2 * sum_in KL(softmax(m_in / T) || softmax(student_in / T)) / B
    with m_in = r * teacher_in + (1 - r) * teacher_i at position n of image i, and r = 1 - e / E ("linear"),
    (1 - e / E)^2 ("quadratic") or cos(pi/2 * e / E) ("cosine") in epoch e = 0, 1, ... of E.

    This is the spatial term alone; the paper's total has DeiT's two terms beside it. Both maps are averaged to
    the coarser grid first (14x14 patches to a teacher's 7x7: their 2x2 mean), axis by axis; bins overlap where one
    grid does not divide the other. The soft form sums over positions, so it is h * w times stronger than `KD`.

    Published: ``losses=[(0.5, "deit"), (1.0, "cskd")]``, task weight 0.5; hard, linear, 300 epochs, RegNetY-16GF.
    At inference the authors average three outputs: class head, distillation head, mean of the dense logits.

    Args:
        kind: "hard" (the paper's) or "soft".
        decay: how r falls: "linear" (the paper's), "quadratic" or "cosine".
        temperature: T > 0 of the soft form. 1. The hard form does not depend on it.
        head: the student's head that is applied to its patches: "dist" (the paper's), the distillation head;
            "class", the class head, for a student without a distillation head.

    Inputs:
        student_dense_dist_logits: (B, C, h, w), raw; read with head="dist".
        student_dense_logits: (B, C, h, w), raw; read with head="class".
        teacher_dense_logits: (B, C, h', w'), raw.
        teacher_logits: (B, C), raw; the mean of the dense ones for a CNN of pooling and a linear classifier.
        progress: where the training stands; whole epochs count.

    Returns:
        Scalar >= 0 in nats (soft: nats * T^2); soft: 0 where student and mix have equal distributions everywhere.

    Raises:
        ValueError: kind, decay or head is unknown; temperature is not positive; the logits differ in B or C, or are
            neither (B, C) nor (B, C, h, w).
        TypeError: temperature is no number; the student's input of this head is missing.

    Source:
        Zhao et al., Cumulative Spatial Knowledge Distillation for Vision Transformers, ICCV 2023,
        https://arxiv.org/abs/2307.08500. Checked against Zzzzz1/CSKD@fa0d8b8; differs in: any grids (there, 14x14
        and 7x7); the teacher's own logits (there, the mean of its dense ones). The coarser grid where the teacher's
        is finer and the class head are our choice.

    Example:
        >>> import torch
        >>> from kdvit.losses import CSKD
        >>> from kdvit.signals import Progress
        >>> student = torch.tensor([3.0, 1.0]).log().reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
        >>> teacher = torch.tensor([0.0, 9.0]).reshape(1, 2, 1, 1)  # class 1, to which the student gives 1/4
        >>> overall = torch.tensor([[9.0, 0.0]])
        >>> loss, inputs = CSKD(), {"student_dense_dist_logits": student, "teacher_dense_logits": teacher}
        >>> round(loss(teacher_logits=overall, progress=Progress(epoch=0.0), **inputs).item(), 4)  # ln 4
        1.3863
        >>> late = Progress(epoch=9.0, total_epochs=10.0)  # overall the teacher says class 0
        >>> round(loss(teacher_logits=overall, progress=late, **inputs).item(), 4)  # ln 4/3
        0.2877
    """

    mismatch = Mismatch(grid="the finer is average-pooled, axis by axis")

    def __init__(self, kind: str = "hard", decay: str = "linear", temperature: float = 1.0, head: str = "dist") -> None:
        super().__init__()
        self.kind = choice(self, "kind", kind, ("hard", "soft"))
        self.decay = choice(self, "decay", decay, _DECAYS)
        self.temperature = number(self, "temperature", temperature, "> 0", "1.0 leaves the logits as they are")
        self.head = choice(self, "head", head, _HEADS)

    def inputs(self) -> tuple[str, ...]:
        return (f"student_{_HEADS[self.head]}", "teacher_dense_logits", "teacher_logits", "progress")

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        signal = _HEADS[self.head]
        same_classes(self, student[signal].dim, teacher["dense_logits"].dim, f"student_{signal}")

    def forward(
        self,
        *,
        student_dense_dist_logits: Tensor | None = None,
        student_dense_logits: Tensor | None = None,
        teacher_dense_logits: Tensor,
        teacher_logits: Tensor,
        progress: Progress,
    ) -> Tensor:
        name = f"student_{_HEADS[self.head]}"
        dense = student_dense_dist_logits if self.head == "dist" else student_dense_logits
        if dense is None:
            raise TypeError(f"CSKD: {name} must be given where head='{self.head}'; pass {name}.")
        student, local = dense_pair(self, dense, teacher_dense_logits, name)
        _, overall = logit_pair(self, student.mean(dim=(2, 3)), teacher_logits, name)
        grid = [min(sizes) for sizes in zip(student.shape[2:], local.shape[2:])]
        student, local = F.adaptive_avg_pool2d(student, grid), F.adaptive_avg_pool2d(local, grid)
        ratio = _DECAYS[self.decay](min(math.floor(progress.epoch) / progress.total_epochs, 1.0))
        teacher = ratio * local + (1 - ratio) * overall[:, :, None, None]
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        kl = kl_rows(student / self.temperature, teacher / self.temperature)
        return self.temperature**2 * kl.sum() / len(student)
