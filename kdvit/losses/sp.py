"""SP: which images of a batch activate a model alike."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.checks import feature_pair, flag
from kdvit.losses.gathering import gather_batch
from kdvit.losses.inner_products import inner_products
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.signals import Location


@register("sp")
class SP(Loss):
    """Pull the similarities between the images of a batch, in a feature map, towards those of the teacher.

    L = 1 / B^2 * sum_ij (g_ij(student) - g_ij(teacher))^2,  g_i = G_i / |G_i|,  G_ij = <x_i, x_j>

    x_i is the whole feature map of image i as one vector. The value depends on the batch, and is 0 for one image.

    Published: task weight 1 and this loss 3000, batches of 64 (CIFAR-100).

    Args:
        student_stage: stage (CNN, hierarchical) or block (ViT) of the student; negative counts from the end; or a
            share of the depth; or a module path. Last. For several pairs, as the paper allows, use the loss twice.
        teacher_stage: the same of the teacher. Last.
        gather: False: the images of this process's batch are compared, as released; True: those of the batches of all
            processes.

    Inputs:
        student_feature_map: (B, D_s, h_s, w_s); of a ViT its patch tokens on their grid, un-normed.
        teacher_feature_map: (B, D_t, h_t, w_t); width and grid may differ.

    Returns:
        Scalar >= 0, at most 2 / B where no inner product is negative, else 4 / B; 0 where the similarities are equal.

    Raises:
        ValueError: the inputs are no maps or differ in B.
        TypeError: gather is no bool.

    Source:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, Eq. 4,
        https://arxiv.org/abs/1907.09682. Checked against HobbitLong/RepDistiller@b84f547; differs in: nothing (with
        gather, the images are of all processes).

    Example:
        >>> import torch
        >>> from kdvit.losses import SP
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 2, 1, 1)  # two images, unlike: (1, 0), (0, 1)
        >>> teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0]]).view(2, 1, 2, 1)  # alike: rows (1, 1) / sqrt(2)
        >>> round(SP()(student, teacher).item(), 4)  # 1/4 * 2 * ((1 - 0.7071)^2 + 0.7071^2)
        0.2929
    """

    mismatch = Mismatch(width="any: images are compared", depth="one stage of each", grid="any: images are compared")

    def __init__(self, student_stage: Location = -1, teacher_stage: Location = -1, gather: bool = False) -> None:
        super().__init__()
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.gather = flag(self, "gather", gather)

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}

    def forward(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        student, teacher = feature_pair(self, student_feature_map, teacher_feature_map)
        if self.gather:
            student, teacher = gather_batch(student), gather_batch(teacher)
        student, teacher = (F.normalize(inner_products(x.flatten(1)), dim=1) for x in (student, teacher))
        return F.mse_loss(student, teacher)
