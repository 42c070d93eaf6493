"""VID: the teacher's maps under a Gaussian whose mean the student predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import built_width, choice, not_built, number, paired
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.map_pairs import map_pairs
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo


@register("vid")
class VID(Loss):
    """Make the teacher's feature maps likely under a Gaussian whose mean is regressed from the student's.

    L = sum over stages of mean over all elements of 1/2 * ((r(student) - teacher)^2 / v_c + ln v_c)

    r is three 1x1 convolutions without bias, with ReLU between, in the teacher's width; v_c = softplus(rho_c) + eps is
    a trained variance per channel: channels that the student cannot predict count less. Minus the loss is, up to a
    constant, a lower bound of the maps' mutual information. A ViT's map is its patch tokens on their grid.

    Published: task weight 1 and this loss 1, stages between stem and pooling; also beside KD.

    Args:
        init_variance: > eps, v at the start. 5.
        eps: > 0, the smallest variance. 1e-5.
        student_stages: stages or blocks of the student; an index, a share of the depth, or a module path.
        teacher_stages: as many of the teacher, pair by pair.
        resize: where the grids differ, "pool": the larger is average-pooled to the smaller, as released; "bilinear",
            "bicubic", "nearest": the student's map is interpolated to the teacher's grid.

    Inputs:
        student_feature_map: one (B, D_s, h, w) per stage.
        teacher_feature_map: one (B, D_t, h, w) per stage.

    Returns:
        Scalar in nats per element, per stage at least ln(eps) / 2, and at the start ln(5) / 2 = 0.80; negative
        where the teacher's maps are predicted well.

    Raises:
        ValueError: a number is out of its range; resize is unknown; the lists of stages differ in length; inputs
            differ in B, or the teacher's have another width than in build.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019, section 2,
        https://arxiv.org/abs/1904.05835. Checked against HobbitLong/RepDistiller@b84f547; differs in: grids that are
        not square are pooled too.

    Example:
        >>> import torch
        >>> from kdvit.losses import VID
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.zeros(2, 8, 4, 4), torch.ones(2, 16, 4, 4)
        >>> loss = VID(student_stages=(-1,), teacher_stages=(-1,))
        >>> loss.build(ModelInfo.of(feature_map=(SignalInfo.of("feature_map", student),)),
        ...            ModelInfo.of(feature_map=(SignalInfo.of("feature_map", teacher),)))
        >>> round(loss((student,), (teacher,)).item(), 4)  # r(0) = 0: ((0 - 1)^2 / 5 + ln 5) / 2
        0.9047
    """

    mismatch = Mismatch(
        width="the regressor ends in the teacher's", depth="pairs of stages", grid="the larger is average-pooled"
    )
    fixed_options = ("init_variance",)

    def __init__(
        self,
        init_variance: float = 5.0,
        eps: float = 1e-5,
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.init_variance = number(self, "init_variance", init_variance, "> 0", "the published value is 5")
        self.eps = number(self, "eps", eps, "> 0", "it is the smallest variance")
        if self.init_variance <= self.eps:
            raise ValueError(f"VID: init_variance must be > eps={self.eps}, got {self.init_variance}; raise it.")
        self.student_stages, self.teacher_stages = paired(
            self, "student_stages", student_stages, "teacher_stages", teacher_stages
        )
        self.resize = choice(self, "resize", resize, RESIZES)
        self.regressors: nn.ModuleList | None = None

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages, "teacher_feature_map": self.teacher_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        pairs = list(zip(student["feature_map"], teacher["feature_map"], strict=True))
        excess = self.init_variance - self.eps
        raw = excess + math.log(-math.expm1(-excess))  # softplus of it is the excess over eps
        self.regressors = nn.ModuleList(_regressor(s.dim, t.dim) for s, t in pairs)
        self.raw_variances = nn.ParameterList(torch.full((t.dim,), raw) for _, t in pairs)

    def forward(self, student_feature_map: tuple[Tensor, ...], teacher_feature_map: tuple[Tensor, ...]) -> Tensor:
        if self.regressors is None:
            raise not_built(self)
        terms = []
        maps = map_pairs(self, self.student_stages, student_feature_map, teacher_feature_map)
        for regressor, raw, pair in zip(self.regressors, self.raw_variances, maps, strict=True):
            student, teacher = match_grids(*pair, self.resize)
            mean = at_least_float32(regressor(student))
            built_width(self, "teacher_feature_map", teacher, mean.shape[1])
            variance = F.softplus(raw) + self.eps
            terms.append(((mean - teacher).square() / variance[:, None, None]).mean() + variance.log().mean())
        return torch.stack(terms).sum() / 2


def _regressor(dim: int, out_dim: int) -> Projector:
    widths = (dim, out_dim), (out_dim, out_dim), (out_dim, out_dim)
    first, second, third = (nn.Conv2d(*pair, kernel_size=1, bias=False) for pair in widths)
    return Projector(first, nn.ReLU(), second, nn.ReLU(), third)
