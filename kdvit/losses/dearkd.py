"""DearKD: early feature maps of a CNN teach the early blocks of a transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import as_many, built_width, choice, feature_pair, not_built, paired
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import BatchNorm2d, Projector
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo

Maps = tuple[Tensor, ...]


@register("dearkd")
class DearKD(Loss):
    """Pull early feature maps of the student, through aligners, towards early feature maps of a CNN teacher.

    L = sum over pairs of stages of the mean over all elements of (A(student) - teacher)^2

    The aligner A: depthwise 3x3 convolution, BatchNorm, ReLU, 1x1 convolution to the teacher's width; one for each
    pair. A ViT's map is its patch tokens on their grid: no class or distillation token takes part.

    Published: stage one with the task loss and the hard distillation token (the loss `deit`), stage two with the task
    loss alone: weights ``Steps({0: 1.0, 250: 0.0})`` of `kdvit.schedules` for this loss and for `deit`, here for 250
    of 300 epochs. The numbers are our choice; the convolutional attention of the paper's student is no loss.

    Args:
        student_stages: early blocks (ViT) or stages of the student, indices or shares of its depth.
        teacher_stages: as many of the teacher, pair by pair; of a CNN with four stages, (0.25, 0.5) are the first two.
        resize: where grids differ: "pool" averages the larger one, usually the CNN's; "bilinear", "bicubic" or
            "nearest" interpolate the student's to the teacher's.

    Inputs:
        student_feature_map: one (B, D_s, h, w) per stage.
        teacher_feature_map: one (B, D_t, h, w) per stage; the grids may differ.

    Returns:
        Scalar >= 0 in squared feature units; 0 where the aligned maps are the teacher's.

    Raises:
        ValueError: the lists of stages differ in length; resize is unknown; the inputs differ in B, or are not those
            above.
        TypeError: stages are no sequence.
        RuntimeError: called before build.

    Source:
        Chen et al., DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers, CVPR 2022,
        https://arxiv.org/abs/2204.12997; no official code; from the paper. Our choice: the aligner's layers, the
        stages, and that the terms count alike. Data-free training is left out.

    Example:
        >>> import torch
        >>> from kdvit.losses import DearKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = (torch.zeros(2, 3, 4, 4),) * 2, (torch.ones(2, 5, 8, 8),) * 2
        >>> def model(maps):
        ...     return ModelInfo.of(feature_map=tuple(SignalInfo.of("feature_map", x) for x in maps))
        >>> loss = DearKD()
        >>> loss.build(model(student), model(teacher))
        >>> for aligner in loss.aligners:
        ...     _ = aligner[-1].bias.data.zero_()
        >>> loss(student, teacher).item()  # zeros stay zeros: two pairs of (0 - 1)^2
        2.0
    """

    mismatch = Mismatch(
        width="the aligner's 1x1 convolution", depth="pairs of stages", grid="the larger is average-pooled"
    )

    def __init__(
        self,
        student_stages: Sequence[Location] = (0.25, 0.5),
        teacher_stages: Sequence[Location] = (0.25, 0.5),
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.student_stages, self.teacher_stages = paired(
            self, "student_stages", student_stages, "teacher_stages", teacher_stages
        )
        self.resize = choice(self, "resize", resize, RESIZES)
        self.aligners: nn.ModuleList | None = None

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages, "teacher_feature_map": self.teacher_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.dims = tuple(info.dim for info in teacher["feature_map"])
        self.aligners = nn.ModuleList(
            _aligner(info.dim, dim) for info, dim in zip(student["feature_map"], self.dims, strict=True)
        )

    def forward(self, student_feature_map: Maps, teacher_feature_map: Maps) -> Tensor:
        if self.aligners is None:
            raise not_built(self)
        as_many(
            self,
            self.student_stages,
            student_feature_map=student_feature_map,
            teacher_feature_map=teacher_feature_map,
        )
        pairs = zip(self.aligners, student_feature_map, teacher_feature_map, self.dims, strict=True)
        return sum(self._term(*pair) for pair in pairs)

    def _term(self, aligner: Projector, student: Tensor, teacher: Tensor, dim: int) -> Tensor:
        student, teacher = feature_pair(self, student, teacher)
        built_width(self, "teacher_feature_map", teacher, dim)
        student, teacher = match_grids(student, teacher, self.resize)
        return F.mse_loss(at_least_float32(aligner(student)), teacher)


def _aligner(dim: int, out_dim: int) -> Projector:
    return Projector(
        nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
        BatchNorm2d(dim),
        nn.ReLU(),
        nn.Conv2d(dim, out_dim, kernel_size=1),  # last, so that the target may be negative
    )
