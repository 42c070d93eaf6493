"""ReviewKD: stages of the student, fused with all deeper ones, against the teacher's at several sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import built_width, count, feature_pair, flag, not_built, paired
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.map_pairs import map_pairs
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, conv_norm
from kdvit.losses.resizing import resize
from kdvit.signals import Grid, Location, ModelInfo

#: Grids that maps are pooled to, beside their own.
_LEVELS = (4, 2, 1)


@register("reviewkd")
class ReviewKD(Loss):
    """Pull each stage of the student, fused with all deeper ones, towards the same stage of the teacher.

    L = sum over stages of HCL(y_k, teacher_k),
    x_k = BN(Conv1x1(student_k)), f_k = a_k * x_k + b_k * nearest(f_{k+1}) (deepest: x_k), y_k = BN(Conv3x3(f_k)),
    (a_k, b_k) = sigmoid(Conv1x1([x_k, nearest(f_{k+1})])) per position,
    HCL(y, t) = (mse(y, t) + sum_l 2^-l * mse(pool_l(y), pool_l(t))) / (1 + sum_l 2^-l)

    mse is a mean over all elements; pool_l is adaptive average pooling to the l-th of 4x4, 2x2 and 1x1, counting only
    those that are smaller than the map. f_k is brought to the teacher's grid by the nearest neighbour before Conv3x3.
    The stages of a plain ViT share one grid, so that nothing is resized between them; its maps are patch tokens on
    their grid.

    Published: task weight 1 and this loss 0.6 to 8 (ImageNet: ResNet34 to 18: 1, ResNet50 to MobileNet: 8), on
    CIFAR-100 faded in over 20 epochs: ``losses=[(WarmUp(5.0, epochs=20), ReviewKD())]``; all stages and the pooled one.

    Args:
        pooled: whether what the classifier sees is a last stage of 1x1, as released.
        mid_dim: width of the fused maps; None: that of the student's deepest stage, at most 512, as on CIFAR-100.
            ImageNet: 512 for ResNet18, 256 for MobileNet.
        student_stages: stages or blocks of the student, from shallow to deep; an index, a share of the depth, or a
            module path.
        teacher_stages: as many of the teacher, pair by pair.

    Inputs:
        student_feature_map: one (B, D_s, h, w) per stage.
        teacher_feature_map: one (B, D_t, h, w) per stage.
        student_pooled: (B, D_s), read only with pooled.
        teacher_pooled: (B, D_t), read only with pooled.

    Returns:
        Scalar >= 0 in squared feature units, a sum over stages; 0 where all y_k equal the teacher's maps.

    Raises:
        ValueError: mid_dim is not positive; the lists of stages differ in length; inputs differ in B, or the
            teacher's have another width than in build.
        TypeError: an argument is of the wrong kind; a pooled input is missing.
        RuntimeError: called before build.

    Source:
        Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, section 3, https://arxiv.org/abs/2104.09044.
        Checked against dvlab-research/ReviewKD@cede6ea; differs in: any grids, not square ones of a list.

    Example:
        >>> import torch
        >>> from kdvit.losses import ReviewKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = (torch.zeros(2, 8, 4, 4),) * 2, (torch.ones(2, 6, 4, 4),) * 2
        >>> loss = ReviewKD(pooled=False, student_stages=(0.5, 1.0), teacher_stages=(0.5, 1.0))
        >>> infos = (tuple(SignalInfo.of("feature_map", x) for x in maps) for maps in (student, teacher))
        >>> loss.build(*(ModelInfo.of(feature_map=info) for info in infos))
        >>> loss(student, teacher).item()  # zeros stay zeros: (0 - 1)^2 at every size, in both stages
        2.0
    """

    mismatch = Mismatch(
        width="the convolutions end in the teacher's",
        depth="pairs of stages",
        grid="nearest neighbour, to the teacher's",
    )

    def __init__(
        self,
        pooled: bool = True,
        mid_dim: int | None = None,
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
    ) -> None:
        super().__init__()
        self.pooled = flag(self, "pooled", pooled)
        self.mid_dim = mid_dim if mid_dim is None else count(self, "mid_dim", mid_dim, "None takes the student's width")
        self.student_stages, self.teacher_stages = paired(
            self, "student_stages", student_stages, "teacher_stages", teacher_stages
        )
        self.fusions: nn.ModuleList | None = None

    def inputs(self) -> tuple[str, ...]:
        maps = ("student_feature_map", "teacher_feature_map")
        return (*maps, "student_pooled", "teacher_pooled") if self.pooled else maps

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages, "teacher_feature_map": self.teacher_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        pairs = list(zip(student["feature_map"], teacher["feature_map"], strict=True))
        if self.pooled:
            pairs.append((student["pooled"], teacher["pooled"]))
        mid_dim = min(512, pairs[-1][0].dim) if self.mid_dim is None else self.mid_dim
        # From deep to shallow, the order in which they run; the deepest has nothing to be fused with.
        self.fusions = nn.ModuleList(
            _Fusion(s.dim, mid_dim, t.dim, fuses=k > 0) for k, (s, t) in enumerate(reversed(pairs))
        )

    def forward(
        self,
        student_feature_map: tuple[Tensor, ...],
        teacher_feature_map: tuple[Tensor, ...],
        student_pooled: Tensor | None = None,
        teacher_pooled: Tensor | None = None,
    ) -> Tensor:
        if self.fusions is None:
            raise not_built(self)
        maps = map_pairs(self, self.student_stages, student_feature_map, teacher_feature_map)
        names = ["teacher_feature_map"] * len(maps)
        if self.pooled:
            if student_pooled is None or teacher_pooled is None:
                raise TypeError("ReviewKD: student_pooled and teacher_pooled must be given with pooled; pass both.")
            pair = feature_pair(self, student_pooled, teacher_pooled, "student_pooled", "teacher_pooled", "B, D")
            maps.append(tuple(x[:, :, None, None] for x in pair))
            names.append("teacher_pooled")
        terms, deeper = [], None
        for fusion, (student, teacher), name in zip(self.fusions, maps[::-1], names[::-1], strict=True):
            output, deeper = fusion(student, deeper, tuple(teacher.shape[2:]))
            built_width(self, name, teacher, output.shape[1])
            terms.append(hierarchical_context(at_least_float32(output), teacher))
        return torch.stack(terms).sum()


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two maps (B, D, h, w), and of both pooled to grids that are smaller, as a weighted mean."""
    loss, total, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for size in _LEVELS:
        if size < min(student.shape[2:]):
            weight /= 2
            pooled = (F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
            loss, total = loss + weight * F.mse_loss(*pooled), total + weight
    return loss / total


class _Fusion(nn.Module):
    """One stage of the student, fused with the deeper ones.

    (stage (B, D, h, w), fused deeper ones (B, mid_dim, ...) or None, grid) -> (B, out_dim, *grid) for the teacher, and
    the fused map (B, mid_dim, *grid) for the next stage.
    """

    def __init__(self, dim: int, mid_dim: int, out_dim: int, fuses: bool) -> None:
        super().__init__()
        self.reduce = conv_norm(dim, mid_dim, 1, relu=False)
        self.expand = conv_norm(mid_dim, out_dim, 3, relu=False)
        self.attention = Projector(nn.Conv2d(2 * mid_dim, 2, 1), nn.Sigmoid()) if fuses else None
        for projector in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(projector[0].weight, a=1)  # as released

    def forward(self, stage: Tensor, deeper: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        fused = self.reduce(stage)
        if self.attention is not None:
            deeper = resize(deeper, tuple(fused.shape[2:]), "nearest")
            own, other = self.attention(torch.cat([fused, deeper], dim=1)).split(1, dim=1)
            fused = own * fused + other * deeper
        fused = resize(fused, grid, "nearest")
        return self.expand(fused), fused
