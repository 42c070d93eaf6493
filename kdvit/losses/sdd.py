"""SDD: a logit loss at every region of the image, on several scales, where the teacher contradicts itself twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.checks import choice, count, logit_pair, number, same_batch, same_classes
from kdvit.losses.cskd import dense_pair
from kdvit.losses.dkd import decoupled_rows
from kdvit.losses.kd import kl_rows
from kdvit.losses.labels import hard_labels
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.nkd import nkd_rows
from kdvit.signals import ModelInfo


@register("sdd")
class SDD(Loss):
    """Pull the student's prediction for every region towards the teacher's, harder where the teacher disagrees.

    L = mean_ir w_ir * base(student_ir, teacher_ir, label_i) over all images i and regions r = 0 .. R - 1, with
    w_ir = 1 where the teacher is right at region r and for the whole image, or wrong at both (consistent), else
    complementary_weight; r = 0 is the whole image. base, one number per row:

    kd: T^2 * KL(softmax(t / T) || softmax(s / T));  dkd: T^2 * (alpha * target + beta * non-target) as in `DKD`;
    nkd: -softmax(t)_y * log softmax(s)_y + gamma * T^2 * the cross-entropy of the other classes' distributions, as
    in `NKD`.

    A scale of m cuts the image into m x m regions; a region's logits are the mean of the dense ones in it: what a
    linear classifier says of the pooled features. The coarser scales are averaged from the finest, as in the released
    code; bins overlap where a scale does not divide what it is cut from. The whole image has the models' own logits:
    for a CNN of pooling and a linear classifier the mean of the dense ones; a ViT's are its class token's.

    Published: task weight 1 and this loss 1 (kd: 0.1 and 0.9), scales (1, 2) for students like the teacher, else
    (1, 2, 4); dkd and nkd with ``WarmUp(epochs=20)`` (ImageNet: 1) around it.

    Args:
        base: "kd", "dkd" or "nkd".
        scales: regions along a side, ascending from 1, the whole image, and at least one more.
        temperature: T > 0. 4; dkd and nkd on ImageNet: 1.
        alpha: weight >= 0 of dkd's target term. 1.
        beta: weight >= 0 of dkd's non-target term. CIFAR-100: 8 (2 to 8 by pair); ImageNet: 0.5 or 2.
        gamma: weight >= 0 of nkd's other classes. The same as beta.
        complementary_weight: >= 0, weight of a region where the teacher is right or wrong unlike for the image. 2.
        mode: "correct"; "official" keeps the target among nkd's other classes, as the released code does; kd and dkd
            are the same in both.

    Inputs:
        student_logits: (B, C), raw.
        teacher_logits: (B, C), raw.
        student_dense_logits: (B, C, h, w), raw.
        teacher_dense_logits: (B, C, h', w'), raw; the grids may differ.
        labels: (B,) class indices, or (B, C) soft labels, of which the largest counts.

    Returns:
        ``{"consistent": regions of weight 1, "complementary": the others}``, scalars >= 0 in nats * T^2, both divided
        by the number of all regions; kd, dkd: 0 where all distributions are equal.

    Raises:
        ValueError: base or mode is unknown; a number is out of its range; scales do not ascend from 1; a grid has
            fewer patches along a side than the finest scale; the logits differ in B or C, or are neither (B, C) nor
            (B, C, h, w); the labels fit neither (B,) nor (B, C).
        TypeError: an argument is no number; labels of shape (B,) are no integers.

    Source:
        Wei et al., Scaled Decoupled Distillation, CVPR 2024, https://arxiv.org/abs/2403.13512.
        Checked against shicaiwei123/SDD-CVPR2024@e412036; differs in: nkd leaves the target out (mode="official"
        does not); finite for logits of any size (there, NaN becomes 0); the models' own logits for the whole image
        (there, the classifier on the mean of the 4x4 regions).

    Example:
        >>> import torch
        >>> from kdvit.losses import SDD
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()  # 3/4 for class 0: for the image, and for its upper half;
        >>> below = teacher.flip(1)  # 3/4 for class 1 in its lower half
        >>> dense = torch.stack([teacher, below], dim=2)[..., None].expand(1, 2, 2, 2)
        >>> loss, labels = SDD(scales=(1, 2), temperature=1.0), torch.tensor([0])
        >>> terms = loss(torch.zeros(1, 2), teacher, torch.zeros(1, 2, 2, 2), dense, labels)
        >>> round(terms["consistent"].item(), 4)  # three of five: 3/5 * (3/4 ln(3/2) + 1/4 ln(1/2))
        0.0785
        >>> round(terms["complementary"].item(), 4)  # two of five, twice: 4/5 * the same
        0.1046
    """

    mismatch = Mismatch(grid="both are average-pooled to the scales")

    def __init__(
        self,
        base: str = "kd",
        scales: Sequence[int] = (1, 2, 4),
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        gamma: float = 8.0,
        complementary_weight: float = 2.0,
        mode: str = "correct",
    ) -> None:
        super().__init__()
        self.base = choice(self, "base", base, ("kd", "dkd", "nkd"))
        if isinstance(scales, int):
            raise TypeError(f"SDD: scales must be a sequence, got {scales}; write (1, 2, 4).")
        self.scales = tuple(count(self, "scales", scale, "write (1, 2, 4)") for scale in scales)
        if self.scales[:1] != (1,) or len(scales) < 2 or list(self.scales) != sorted(set(self.scales)):
            raise ValueError(
                f"SDD: scales must ascend from 1 to at least one more, got {self.scales}; write (1, 2, 4), or for the "
                "whole image alone take KD, DKD or NKD."
            )
        self.temperature = number(self, "temperature", temperature, "> 0", "1.0 leaves the logits as they are")
        self.alpha = number(self, "alpha", alpha, ">= 0", "0 switches dkd's target term off")
        self.beta = number(self, "beta", beta, ">= 0", "0 switches dkd's non-target term off")
        self.gamma = number(self, "gamma", gamma, ">= 0", "0 switches nkd's other classes off")
        self.complementary_weight = number(
            self, "complementary_weight", complementary_weight, ">= 0", "1.0 counts all regions alike"
        )
        self.mode = choice(self, "mode", mode, ("correct", "official"))

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        same_classes(self, student["logits"].dim, teacher["logits"].dim)
        same_classes(self, student["dense_logits"].dim, teacher["dense_logits"].dim, "student_dense_logits")
        self._check_grids(student["dense_logits"].grid, teacher["dense_logits"].grid)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_dense_logits: Tensor,
        teacher_dense_logits: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        student, teacher = logit_pair(self, student_logits, teacher_logits)
        student_dense, teacher_dense = dense_pair(self, student_dense_logits, teacher_dense_logits)
        same_classes(self, student.shape[1], teacher_dense.shape[1])
        same_batch(self, "student_logits", student, "student_dense_logits", student_dense)
        self._check_grids(student_dense.shape[2:], teacher_dense.shape[2:])
        labels = hard_labels(self, labels, student)
        return self._of_regions(self._regions(student, student_dense), self._regions(teacher, teacher_dense), labels)

    def _check_grids(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        finest = self.scales[-1]
        for side, (height, width) in (("student", student), ("teacher", teacher)):
            if min(height, width) < finest:
                raise ValueError(
                    f"SDD: {side} grid must be at least {finest}x{finest} for scales {self.scales}, "
                    f"got {height}x{width}; leave the finest scale out, or take larger images."
                )

    def _regions(self, logits: Tensor, dense: Tensor) -> Tensor:
        """The logits of every region, the whole image first: (B, C), (B, C, h, w) -> (B, C, R)."""
        finest = F.adaptive_avg_pool2d(dense, self.scales[-1])
        maps = [F.adaptive_avg_pool2d(finest, scale) for scale in self.scales[1:]]
        return torch.cat([logits[:, :, None], *(x.flatten(2) for x in maps)], dim=2)

    def _of_regions(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms for region logits (B, C, R), the whole image first, and class indices (B,)."""
        num_regions = student.shape[2]
        right = teacher.argmax(dim=1) == labels[:, None]  # (B, R)
        consistent = (right == right[:, :1]).flatten()
        student, teacher = (x.transpose(1, 2).flatten(0, 1) for x in (student, teacher))  # (B * R, C)
        rows = self._base_rows(student, teacher, labels.repeat_interleave(num_regions))
        weights = {"consistent": consistent, "complementary": self.complementary_weight * ~consistent}
        return {name: (weight * rows).mean() for name, weight in weights.items()}

    def _base_rows(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        scale = self.temperature**2
        softened = student / self.temperature, teacher / self.temperature
        if self.base == "kd":
            return scale * kl_rows(*softened)
        if self.base == "dkd":
            target, others = decoupled_rows(*softened, labels)
            return scale * (self.alpha * target + self.beta * others)
        target, others = nkd_rows(student, teacher, labels, self.temperature)
        if self.mode == "official":
            others = F.cross_entropy(softened[0], softened[1].softmax(dim=1), reduction="none")
        return target + self.gamma * scale * others
