"""AT: where a model is active, in maps of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.activity import activity, as_direction
from kdvit.losses.checks import choice, count, paired, several_positions
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.map_pairs import map_pairs
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo

Maps = tuple[Tensor, ...]


@register("at")
class AT(Loss):
    """Pull the energy of every position, in each stage of the student, towards that in a stage of the teacher.

    L = sum over pairs of stages of mean over B and positions of (a(student) - a(teacher))^2,
    a(x) = e / |e|,  e = mean over channels of |x|^power at each position,  |e| over the positions of an image

    Of a ViT the maps are patch tokens after a block, un-normed: tokens behind a LayerNorm have nearly equal energy.
    A pair on a single position adds nothing. The mean over positions makes the loss smaller the finer the grids are:
    the published weight is for 32x32 to 8x8.

    Published: task weight 1 and this loss 1000 (CIFAR-100, all three stages); ImageNet: the four stages of a ResNet.

    Args:
        power: what activations are raised to, an integer > 0. 2.
        student_stages: blocks or stages, or shares of the depth: each quarter.
        teacher_stages: as many of the teacher, pair by pair.
        resize: where grids differ, "pool" average-pools the larger map, as published; "bilinear", "bicubic" and
            "nearest" interpolate the student's.

    Inputs:
        student_feature_map: one (B, D_s, h, w) per stage; of a ViT its patch tokens on their grid.
        teacher_feature_map: one (B, D_t, h, w) per stage; widths and grids may differ.

    Returns:
        Scalar >= 0, at most 2 / (h * w) per pair; 0 where the energies are proportional.

    Raises:
        ValueError: power is not > 0; resize is unknown; the lists of stages differ in length or from the inputs; the
            inputs are no maps or differ in B; no pair has more than one position in common.
        TypeError: an argument is of the wrong kind.

    Source:
        Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, Eq. 2,
        https://arxiv.org/abs/1612.03928. Checked against HobbitLong/RepDistiller@b84f547; differs in: nothing (there,
        grids are square). The paper's equation has the distance of the maps, the code its mean square.

    Example:
        >>> import torch
        >>> from kdvit.losses import AT
        >>> student = torch.tensor([2.0, 0.0]).view(1, 1, 1, 2)  # all energy at the first of two positions
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0]]).view(1, 2, 1, 2)  # 1 and 2, so the direction (1, 2)
        >>> round(AT(student_stages=(-1,), teacher_stages=(-1,))((student,), (teacher,)).item(), 4)  # 1 - 1 / sqrt(5)
        0.5528
    """

    mismatch = Mismatch(
        width="any: channels are averaged", depth="pairs of stages", grid="the larger is average-pooled, or resize="
    )

    def __init__(
        self,
        power: int = 2,
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.power = count(self, "power", power, "the published value is 2")
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
        return F.mse_loss(*(as_direction(activity(x, self.power)) for x in (student, teacher)))
