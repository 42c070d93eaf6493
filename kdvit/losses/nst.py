"""NST: the selectivity patterns of channels, as a distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.checks import choice, paired, several_positions
from kdvit.losses.inner_products import inner_products
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.map_pairs import map_pairs
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo

Maps = tuple[Tensor, ...]


@register("nst")
class NST(Loss):
    """Pull the distribution of the student's channels, each a pattern over positions, towards the teacher's.

    L = sum over pairs of stages of mean_i (k(s, s) + k(t, t) - 2 * k(s, t)),
    k(s, t) = mean over channels c and d of <s_c, t_d>^2,  s_c = channel c of image i over positions, of length 1

    This is the maximum mean discrepancy with a polynomial kernel of degree 2, and equals the squared distance of
    s^T s / D_s and t^T t / D_t, position by position: whichever of the two forms has the smaller matrices is computed.
    The order, sign and number of channels do not matter, nor does the scale of a channel. A pair on a single position
    adds nothing.

    Published: task weight 1 and this loss 50.

    Args:
        student_stages: blocks or stages, or shares of the depth: each quarter; released: all three of a CIFAR ResNet.
        teacher_stages: as many of the teacher, pair by pair.
        resize: where grids differ, "pool" average-pools the larger map, as published; "bilinear", "bicubic" and
            "nearest" interpolate the student's.

    Inputs:
        student_feature_map: one (B, D_s, h, w) per stage; of a ViT its patch tokens on their grid.
        teacher_feature_map: one (B, D_t, h, w) per stage; widths and grids may differ.

    Returns:
        Scalar >= 0 (but for rounding), at most 2 per pair; 0 where the channels differ by order and scale alone.

    Raises:
        ValueError: resize is unknown; the lists of stages differ in length or from the inputs; the inputs are no maps
            or differ in B; no pair has more than one position in common.
        TypeError: the stages are no sequence.

    Source:
        Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017,
        https://arxiv.org/abs/1707.01219. Checked against HobbitLong/RepDistiller@b84f547; differs in: nothing but
        memory (there B * D_s * D_t * h * w numbers are held).

    Example:
        >>> import torch
        >>> from kdvit.losses import NST
        >>> student = torch.tensor([5.0, 0.0]).view(1, 1, 1, 2)  # one channel, at the first position
        >>> teacher = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
        >>> loss = NST(student_stages=(-1,), teacher_stages=(-1,))
        >>> round(loss((student,), (teacher,)).item(), 4)  # 1 + 1 - 2 * (3/5)^2
        1.28
    """

    mismatch = Mismatch(
        width="any: a mean over pairs of channels",
        depth="pairs of stages",
        grid="the larger is average-pooled, or resize=",
    )

    def __init__(
        self,
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.student_stages, self.teacher_stages = paired(
            self, "student_stages", student_stages, "teacher_stages", teacher_stages
        )
        self.resize = choice(self, "resize", resize, RESIZES)

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages, "teacher_feature_map": self.teacher_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        infos = zip(student["feature_map"], teacher["feature_map"], strict=True)
        several_positions(self, [(s.grid, t.grid) for s, t in infos])

    def forward(self, student_feature_map: Maps, teacher_feature_map: Maps) -> Tensor:
        pairs = map_pairs(self, self.student_stages, student_feature_map, teacher_feature_map)
        several_positions(self, [(s.shape[2:], t.shape[2:]) for s, t in pairs])
        return torch.stack([self._pair(*pair) for pair in pairs]).sum()

    def _pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = match_grids(student, teacher, self.resize)
        student, teacher = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))  # (B, D, N)
        (_, dim, num_positions), teacher_dim = student.shape, teacher.shape[1]
        by_position = 2 * num_positions**2 <= dim**2 + teacher_dim**2 + dim * teacher_dim
        return between_positions(student, teacher) if by_position else between_channels(student, teacher)


def between_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """The discrepancy of channels (B, D, N), from D x D matrices."""
    pairs = (student, student), (teacher, teacher), (student, teacher)
    own, teachers, cross = (inner_products(x, y).square().mean() for x, y in pairs)
    return own + teachers - 2 * cross


def between_positions(student: Tensor, teacher: Tensor) -> Tensor:
    """The same number, from N x N matrices."""
    own, teachers = (inner_products(x.transpose(1, 2)) / x.shape[1] for x in (student, teacher))
    return (own - teachers).square().sum(dim=(1, 2)).mean()
