"""DMKD: generate the teacher's map from a student map without what matters most, by position and by channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import built_width, choice, feature_pair, not_built, number
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.mgd import generation_block
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import conv1x1
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo


@register("dmkd")
class DMKD(Loss):
    """Generate the teacher's map twice, from the student's without its important positions or channels, and fuse both.

    L = mean over all elements of (w_1 * G_1(x * [a <= threshold]) + w_2 * G_2(x * [c <= threshold]) - teacher)^2,
    x = Conv1x1(student),  a = h * w * softmax over positions of mean_channels |teacher| / T,
    c = D_t * softmax over channels of mean_positions |teacher| / T

    a and c say how important a position or channel is to the teacher: 1 on average. Where one is above the threshold,
    the student's is set to 0, and must be made up from the others. G is Conv3x3, ReLU, Conv3x3; the convolutions and
    the weights w are learnt. The 1x1 convolution exists only where the widths differ. Nothing is drawn at random.

    Published: task weight 1; the paper's weight of this loss, T and threshold are not known to us. 1 is our choice.

    Args:
        temperature: T > 0; the smaller, the fewer positions and channels stand out. 0.5, as in FGD.
        threshold: > 0, in units of the mean importance. 1: what is above the mean is hidden.
        student_stage: block, stage, share of the depth or module path; negative counts from the end.
        teacher_stage: the same of the teacher.
        resize: where the grids differ: "pool" averages the larger to the smaller; "bilinear", "bicubic" and "nearest"
            interpolate the student's to the teacher's.

    Inputs:
        student_feature_map: (B, D_s, h_s, w_s); of a ViT its patch tokens on their grid.
        teacher_feature_map: (B, D_t, h_t, w_t).

    Returns:
        Scalar >= 0 in squared feature units.

    Raises:
        ValueError: a number is not positive; resize is unknown; maps that are not (B, D, h, w), differ in B, or have
            other widths than in build.
        TypeError: an argument is no number.
        RuntimeError: called before build.

    Source:
        Yang et al., DMKD: Improving Feature-based Knowledge Distillation for Object Detection Via Dual Masking
        Augmentation, ICASSP 2024, https://arxiv.org/abs/2309.02719: no official code; from the paper: masks by spatial
        and by channel attention of the teacher, two reconstructions, learnt weights that fuse them. Our choice: T and
        the threshold, MGD's generator for both masks, weights that start at 1/2, the mean, one pair of stages for
        recognition (there, all levels of a detector's pyramid).

    Example:
        >>> import torch
        >>> from kdvit.losses import DMKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 2.0)
        >>> loss = DMKD()
        >>> loss.build(*(ModelInfo.of(feature_map=SignalInfo.of("feature_map", x)) for x in (student, teacher)))
        >>> for generator in loss.generators:
        ...     _ = torch.nn.init.zeros_(generator[2].weight), torch.nn.init.ones_(generator[2].bias)
        >>> loss(student, teacher).item()  # both generate 1: (0.5 * 1 + 0.5 * 1 - 2)^2
        1.0
    """

    mismatch = Mismatch(
        width="1x1 convolution where they differ",
        depth="one stage of each",
        grid="the larger is average-pooled, or resize=",
    )

    def __init__(
        self,
        temperature: float = 0.5,
        threshold: float = 1.0,
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.temperature = number(self, "temperature", temperature, "> 0", "0.5 is what FGD has")
        self.threshold = number(self, "threshold", threshold, "> 0", "1.0 hides what is above the mean")
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.generators: nn.ModuleList | None = None

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        dim = teacher["feature_map"].dim
        self.projector = conv1x1(student["feature_map"].dim, dim)
        self.generators = nn.ModuleList(generation_block(dim) for _ in range(2))
        self.fusion = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        if self.generators is None:
            raise not_built(self)
        student, teacher = match_grids(*feature_pair(self, student_feature_map, teacher_feature_map), self.resize)
        aligned = self.projector(student)
        built_width(self, "teacher_feature_map", teacher, aligned.shape[1])
        masks = self._kept(teacher.abs().mean(dim=1, keepdim=True)), self._kept(teacher.abs().mean((2, 3), True))
        fused = sum(
            weight * at_least_float32(generator(aligned * mask))
            for weight, generator, mask in zip(self.fusion, self.generators, masks, strict=True)
        )
        return F.mse_loss(fused, teacher)

    def _kept(self, size: Tensor) -> Tensor:
        """Which entries of each image's activity (B, ...) are kept: 1 or 0, in its shape."""
        flat = size.flatten(1)
        importance = flat.shape[1] * (flat / self.temperature).softmax(dim=1)
        return (importance <= self.threshold).to(size.dtype).view_as(size)
