"""PKT: how likely one image is a neighbour of another."""

from __future__ import annotations

import torch
from torch import Tensor

from kdvit.losses.checks import feature_pair, flag, number
from kdvit.losses.gathering import gather_batch
from kdvit.losses.inner_products import inner_products
from kdvit.losses.loss import Loss, Mismatch, register


@register("pkt")
class PKT(Loss):
    """Pull the student's probabilities that images of a batch are neighbours towards the teacher's.

    L = 1 / B^2 * sum_ij t_ij * log((t_ij + eps) / (s_ij + eps)),  s_ij = K_ij / sum_j K_ij,
    K_ij = (cos(x_i, x_j) + 1) / 2 of the student's features x; t the same of the teacher

    The value depends on the batch, and is 0 for one image: each row is a distribution over the images of the batch,
    itself included.

    Published: task weight 1 and this loss 30000, batches of 64 (CIFAR-100).

    Args:
        eps: > 0, keeps the logarithm and the length of zero features finite.
        gather: False: the images of this process's batch are compared, as released; True: those of the batches of all
            processes.

    Inputs:
        student_pooled: (B, D_s), what the classifier sees.
        teacher_pooled: (B, D_t), the same of the teacher; the width may differ.

    Returns:
        Scalar >= 0 (but for eps) in nats / B; 0 where all angles between images are equal.

    Raises:
        ValueError: eps is not > 0; the inputs are not (B, D) or differ in B.
        TypeError: an argument is of the wrong kind.

    Source:
        Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018,
        https://arxiv.org/abs/1803.10837. Checked against HobbitLong/RepDistiller@b84f547; differs in: nothing (with
        gather, the images are of all processes; opposite features stay finite).

    Example:
        >>> import torch
        >>> from kdvit.losses import PKT
        >>> student = torch.tensor([[1.0], [3.0]])  # the same direction: every s is 1/2
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # a right angle, K = 1 and 1/2: rows 2/3 and 1/3
        >>> round(PKT()(student, teacher).item(), 4)  # 1/2 * (2/3 ln(4/3) + 1/3 ln(2/3))
        0.0283
    """

    mismatch = Mismatch(width="any: images are compared")

    def __init__(self, eps: float = 1e-7, gather: bool = False) -> None:
        super().__init__()
        self.eps = number(self, "eps", eps, "> 0", "it keeps the logarithm finite")
        self.gather = flag(self, "gather", gather)

    def forward(self, student_pooled: Tensor, teacher_pooled: Tensor) -> Tensor:
        student, teacher = feature_pair(
            self, student_pooled, teacher_pooled, "student_pooled", "teacher_pooled", "B, D"
        )
        if self.gather:
            student, teacher = gather_batch(student), gather_batch(teacher)
        student, teacher = self._neighbours(student), self._neighbours(teacher)
        return (teacher * torch.log((teacher + self.eps) / (student + self.eps))).mean()

    def _neighbours(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, B), rows that sum to 1."""
        x = x / (x.norm(dim=1, keepdim=True) + self.eps)
        # Of opposite features the cosine may round to less than -1, where the logarithm would have no value.
        kernel = ((inner_products(x) + 1) / 2).clamp_min(0)
        return kernel / kernel.sum(dim=1, keepdim=True)
