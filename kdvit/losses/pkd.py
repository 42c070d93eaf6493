"""PKD: the correlation of feature maps, channel by channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import built_width, choice, flag, not_built, number, paired
from kdvit.losses.gathering import gather_batch
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.map_pairs import map_pairs
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import conv1x1
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo


def standardized_channels(feature_map: Tensor, eps: float, gather: bool = False) -> Tensor:
    """Channels of (B, D, h, w) with mean 0 and standard deviation 1 over images and positions: (D, B * h * w).

    The deviation is the unbiased one. With ``gather``, both are those of the images of all processes, of which two
    numbers per channel are exchanged and not the maps.
    """
    everywhere = gather_batch if gather else _here
    rows = feature_map.transpose(0, 1).flatten(1)
    rows = rows - everywhere(rows.mean(dim=1)[None]).mean(dim=0)[:, None]
    norms = everywhere(rows.norm(dim=1)[None])  # (processes, D)
    num_values = len(norms) * rows.shape[1]
    # The norm, unlike a root of a variance, has a finite gradient for a constant channel: 0.
    deviation = norms.norm(dim=0) / max(num_values - 1, 1) ** 0.5
    return rows / (deviation[:, None] + eps)


@register("pkd")
class PKD(Loss):
    """Pull feature maps of the student towards the teacher's, after each channel is standardised.

    L = sum over stages of 1/2 * mean over all elements of (z(a(student)) - z(teacher))^2,
    z(x) = (x - mean_c) / (std_c + eps), over the images and positions of the batch

    But for eps it is (n - 1) / n times the mean over channels of 1 - r, with r the Pearson correlation of a channel's
    n values: scale and offset of a channel do not matter. a is a 1x1 convolution where the widths differ. A ViT's map
    is its patch tokens on their grid.

    Published: task weight 1 and this loss 6 (10 between two RetinaNets), on the four finest levels of the feature
    pyramids of two detectors, equally wide. Its use for classification is our choice.

    Args:
        student_stages: stages or blocks of the student; an index, a share of the depth, or a module path.
        teacher_stages: as many of the teacher, pair by pair.
        eps: > 0, added to the standard deviations. 1e-6.
        resize: where the grids differ, "pool": the larger is average-pooled to the smaller; "bilinear", "bicubic",
            "nearest": the student's map is interpolated to the teacher's grid.
        gather: False: mean and deviation over this process's batch, as released; True: over the batches of all
            processes, while every process returns the mean over its own images.

    Inputs:
        student_feature_map: one (B, D_s, h, w) per stage.
        teacher_feature_map: one (B, D_t, h, w) per stage.

    Returns:
        Scalar in [0, 2] per stage; 0 where the (projected) channels are equal up to a positive factor and an offset;
        with a single image on a 1x1 grid, 0.

    Raises:
        ValueError: eps is not positive; resize is unknown; the lists of stages differ in length; inputs differ in B,
            or the teacher's have another width than in build.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient,
        NeurIPS 2022, section 3, https://arxiv.org/abs/2207.02039. Checked against jbwang1997/CrossKD@87e156a; differs
        in: other widths and grids.

    Example:
        >>> import torch
        >>> from kdvit.losses import PKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)
        >>> model = ModelInfo.of(feature_map=(SignalInfo.of("feature_map", x),))
        >>> loss = PKD(student_stages=(-1,), teacher_stages=(-1,))
        >>> loss.build(model, model)
        >>> round(loss((x,), (5 * x + 3,)).item(), 4), round(loss((x,), (-x,)).item(), 4)  # 3/4 * (1 - (-1))
        (0.0, 1.5)
    """

    mismatch = Mismatch(
        width="1x1 convolution where they differ", depth="pairs of stages", grid="the larger is average-pooled"
    )

    def __init__(
        self,
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        eps: float = 1e-6,
        resize: str = "pool",
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.student_stages, self.teacher_stages = paired(
            self, "student_stages", student_stages, "teacher_stages", teacher_stages
        )
        self.eps = number(self, "eps", eps, "> 0", "it keeps constant channels finite")
        self.resize = choice(self, "resize", resize, RESIZES)
        self.gather = flag(self, "gather", gather)
        self.projectors: nn.ModuleList | None = None

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages, "teacher_feature_map": self.teacher_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        pairs = zip(student["feature_map"], teacher["feature_map"], strict=True)
        self.projectors = nn.ModuleList(conv1x1(s.dim, t.dim) for s, t in pairs)

    def forward(self, student_feature_map: tuple[Tensor, ...], teacher_feature_map: tuple[Tensor, ...]) -> Tensor:
        if self.projectors is None:
            raise not_built(self)
        terms = []
        maps = map_pairs(self, self.student_stages, student_feature_map, teacher_feature_map)
        for projector, pair in zip(self.projectors, maps, strict=True):
            student, teacher = match_grids(*pair, self.resize)
            student = at_least_float32(projector(student))
            built_width(self, "teacher_feature_map", teacher, student.shape[1])
            student, teacher = (standardized_channels(x, self.eps, self.gather) for x in (student, teacher))
            terms.append(F.mse_loss(student, teacher) / 2)
        return torch.stack(terms).sum()


def _here(x: Tensor) -> Tensor:
    return x
