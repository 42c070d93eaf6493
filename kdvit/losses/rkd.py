"""RKD: distances between images, and angles between triples of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.checks import feature_pair, flag, number
from kdvit.losses.gathering import gather_batch
from kdvit.losses.loss import Loss, Mismatch, register

_EPS = 1e-12  # the least mean distance to divide by, so that equal features are finite


@register("rkd")
class RKD(Loss):
    """Pull the distances between images, and the angles at each of them, towards those of the teacher.

    L = distance_weight * mean_ij huber(d_ij(student), d_ij(teacher))
      + angle_weight * mean_ijk huber(c_ijk(student), c_ijk(teacher)),
    d_ij = |x_i - x_j| / mean distance of two images,  c_ijk = cosine of the angle at image j between i and k

    huber is 1/2 (a - b)^2, and |a - b| - 1/2 where they differ by more than 1. The means are over all B^2 and B^3
    entries, also where images repeat; an angle with a side of length 0 counts as cosine 0. The value depends on the
    batch: two images have a distance alone, three have angles. Angles come from the distances, by the law of cosines,
    and take B^3 numbers of memory per model, whatever the width.

    Published: task weight 1 and this loss 1 (the weights are in it): 25 and 50 for classification, 1 and 2 for
    retrieval.

    Args:
        distance_weight: weight >= 0 of the distances. 25; retrieval: 1.
        angle_weight: weight >= 0 of the angles; 0 leaves their memory out. 50; retrieval: 2.
        gather: False: the images of this process's batch are compared, as released; True: those of the batches of all
            processes.

    Inputs:
        student_pooled: (B, D_s), what the classifier sees.
        teacher_pooled: (B, D_t), the same of the teacher; the width may differ.

    Returns:
        ``{"distance", "angle"}``, scalars >= 0, weights included; 0 where one set of features is the other, scaled,
        moved, rotated or mirrored.

    Raises:
        ValueError: a weight is < 0; the inputs are not (B, D) or differ in B.
        TypeError: an argument is of the wrong kind.

    Source:
        Park et al., Relational Knowledge Distillation, CVPR 2019, https://arxiv.org/abs/1904.05068. Checked
        against lenscloth/RKD@0a6c3c0; differs in: images with equal features are at distance 0 (there 1e-6), memory
        (there also B * B * D numbers); with gather, the images are of all processes.

    Example:
        >>> import torch
        >>> from kdvit.losses import RKD
        >>> student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # a right angle; distances 3, 4, 5, mean 4
        >>> teacher = torch.tensor([[0.0], [1.0], [2.0]])  # a line; distances 1, 2, 1, mean 4/3
        >>> terms = RKD(distance_weight=1.0, angle_weight=1.0)(student, teacher)
        >>> round(terms["distance"].item(), 4)  # 2/9 * ((3/4 - 3/4)^2 + (1 - 3/2)^2 + (5/4 - 3/4)^2) / 2
        0.0556
        >>> round(terms["angle"].item(), 4)  # cosines 0, 3/5, 4/5 against 1, -1, 1: 2/27 * (1/2 + 11/10 + 1/50)
        0.12
    """

    mismatch = Mismatch(width="any: images are compared")

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, gather: bool = False) -> None:
        super().__init__()
        self.distance_weight = number(self, "distance_weight", distance_weight, ">= 0", "0 switches distances off")
        self.angle_weight = number(self, "angle_weight", angle_weight, ">= 0", "0 switches angles off")
        self.gather = flag(self, "gather", gather)

    def forward(self, student_pooled: Tensor, teacher_pooled: Tensor) -> dict[str, Tensor]:
        student, teacher = feature_pair(
            self, student_pooled, teacher_pooled, "student_pooled", "teacher_pooled", "B, D"
        )
        if self.gather:
            student, teacher = gather_batch(student), gather_batch(teacher)
        student, teacher = _Distances.apply(student), _Distances.apply(teacher)
        distance = F.smooth_l1_loss(*(_relative(d) for d in (student, teacher)))
        angle = distance.new_zeros(())
        if self.angle_weight > 0:
            angle = F.smooth_l1_loss(*(_cosines(d) for d in (student, teacher)))
        return {"distance": self.distance_weight * distance, "angle": self.angle_weight * angle}


def _relative(distances: Tensor) -> Tensor:
    """Distances (B, B) divided by their mean over pairs of two images."""
    num_pairs = max(len(distances) * (len(distances) - 1), 1)
    return distances / (distances.sum() / num_pairs).clamp_min(_EPS)


def _cosines(distances: Tensor) -> Tensor:
    """Distances (B, B) -> cosines (B, B, B) of the angle at the first image between the second and the third."""
    inverse = _inverse(distances)
    side, other, opposite = distances.unsqueeze(2), distances.unsqueeze(1), distances.unsqueeze(0)
    inverse_side, inverse_other = inverse.unsqueeze(2), inverse.unsqueeze(1)
    # (side^2 + other^2 - opposite^2) / (2 * side * other), where a side of length 0 makes all three terms 0
    return (side * inverse_other + other * inverse_side - opposite.square() * inverse_side * inverse_other) / 2


def _inverse(distances: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0."""
    positive = distances > 0
    return positive / torch.where(positive, distances, 1.0)


class _Distances(torch.autograd.Function):
    """|x_i - x_j| of all rows, (B, D) -> (B, B), by subtraction, as exact for near images as for far ones.

    Backward is a matrix product: neither direction holds B * B * D numbers.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x - x.mean(dim=0)  # a common offset would cost backward's product its digits
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(x, distances)
        return distances

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x, distances = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            pull = (grad + grad.T) * _inverse(distances)
            return pull.sum(dim=1, keepdim=True) * x - pull @ x
