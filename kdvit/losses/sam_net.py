"""Inspired by SAM-Net: the student's positions look up the teacher's features by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.attending import attend
from kdvit.losses.checks import built_width, choice, feature_pair, not_built, number
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, conv1x1
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo, map_to_tokens


@register("sam_net")
class SAMNet(Loss):
    """Inspired by SAM-Net: let every position of the student find in the teacher what the teacher's own finds there.

    L = mean over all elements of (A(x, y) y - A(y, y) y)^2,
    A(a, b) = softmax over positions j of <a_i, b_j> / (D_t * T)

    x and y: the positions of student and teacher, layer-normed (without learnt scale), the student's through a 1x1
    convolution first where the widths differ; so <a_i, b_j> / D_t is a correlation. A(x, y) is cross-attention from the
    student to the teacher; A(y, y), the teacher's self-attention, makes the target.

    From the paper: an image matcher that has self-attention in its name, attends across two sets of features and is
    trained with distillation. Its released code is the matcher alone (a fork of LoFTR): no line of it has a teacher or
    student, and the method cannot be reproduced from it. All else is ours: two models on one image in place of two
    images, the form of attention, the target, layer norm, recognition in place of matching, and every default.

    Published: the paper's numbers are not known to us; task weight 1 and this loss 1 are our choice.

    Args:
        temperature: T > 0; the smaller, the more exactly a position must be found. 0.1.
        student_stage: block, stage, share of the depth or module path; negative counts from the end.
        teacher_stage: the same of the teacher.
        resize: where the grids differ: "pool" averages the larger to the smaller; "bilinear", "bicubic" and "nearest"
            interpolate the student's to the teacher's.

    Inputs:
        student_feature_map: (B, D_s, h_s, w_s); of a ViT its patch tokens on their grid.
        teacher_feature_map: (B, D_t, h_t, w_t).

    Returns:
        Scalar >= 0, squared and without unit; 0 where the layer-normed positions are equal.

    Raises:
        ValueError: temperature is not positive; resize is unknown; the common grid has a single position, where there
            is nothing to look up; maps that are not (B, D, h, w), differ in B, or have other widths than in build.
        TypeError: temperature is no number.
        RuntimeError: called before build.

    Source:
        Kelenyi et al., SAM-Net: Self-Attention based Feature Matching with Spatial Transformers and Knowledge
        Distillation, Expert Systems with Applications 2024, https://doi.org/10.1016/j.eswa.2023.122804: for its
        distillation no official code; from the paper comes the idea alone, see above.

    Example:
        >>> import torch
        >>> from kdvit.losses import SAMNet
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> teacher = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).T.view(1, 2, 1, 2)  # two positions, opposite
        >>> loss = SAMNet()
        >>> loss.build(*(ModelInfo.of(feature_map=SignalInfo.of("feature_map", teacher)) for _ in range(2)))
        >>> round(loss(3 * teacher, teacher).item(), 4)  # equal but for scale
        0.0
        >>> round(loss(-teacher, teacher).item(), 3)  # finds (-1, 1) for (1, -1): (1 - (-1))^2
        4.0
    """

    mismatch = Mismatch(
        width="1x1 convolution where they differ",
        depth="one stage of each",
        grid="the larger is average-pooled, or resize=",
    )

    def __init__(
        self,
        temperature: float = 0.1,
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.temperature = number(self, "temperature", temperature, "> 0", "0.1 looks for a few positions")
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.projector: Projector | None = None

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        student_map, teacher_map = student["feature_map"], teacher["feature_map"]
        height, width = teacher_map.grid if self.resize != "pool" else map(min, student_map.grid, teacher_map.grid)
        if height * width < 2:
            raise ValueError(
                f"SAMNet: the common grid must have at least 2 positions, got 1x1 for {student_map.grid} and "
                f"{teacher_map.grid}; choose stages before the last, or larger images."
            )
        self.projector = conv1x1(student_map.dim, teacher_map.dim)

    def forward(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        if self.projector is None:
            raise not_built(self)
        student, teacher = match_grids(*feature_pair(self, student_feature_map, teacher_feature_map), self.resize)
        student = at_least_float32(self.projector(student))
        built_width(self, "teacher_feature_map", teacher, student.shape[1])
        student, teacher = normed_positions(student), normed_positions(teacher)
        return F.mse_loss(self._found(student, teacher), self._found(teacher, teacher))

    def _found(self, queries: Tensor, teacher: Tensor) -> Tensor:
        """What each of the queries (B, N, D) finds among the teacher's positions (B, N, D)."""
        found = attend(queries[:, None], teacher[:, None], teacher[:, None], 1 / (self.temperature * teacher.shape[-1]))
        return found[:, 0]


def normed_positions(x: Tensor) -> Tensor:
    """The positions of a map, layer-normed without learnt scale: (B, D, h, w) -> (B, N, D)."""
    tokens = map_to_tokens(x)
    return F.layer_norm(tokens, tokens.shape[-1:])
