"""CWD: where in the image each channel looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kdvit.losses.checks import (
    built_width,
    choice,
    feature_pair,
    not_built,
    number,
    same_classes,
    several_positions,
)
from kdvit.losses.kd import kl_rows
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, conv1x1
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo, map_to_tokens

NORMS = ("channel", "spatial")
READS = ("feature_map", "dense_logits")


@register("cwd")
class CWD(Loss):
    """Pull each channel of the student, as a distribution over positions, towards the same channel of the teacher.

    L = T^2 * mean over B and channels of KL(softmax(teacher / T) || softmax(conv(student) / T)) over positions

    With norm "spatial", the softmax is over channels, and the mean over B and positions. conv is a 1x1 convolution,
    and exists only where the widths differ.

    Published: task weight 1 and this loss 3 on logits, 50 on a feature map (semantic segmentation).

    Args:
        temperature: T > 0. 4; the released default is 1, its commands set 4.
        norm: "channel", or "spatial" as the code also offers: pixel-wise distillation where logits are read.
        signal: "feature_map", or "dense_logits": the classifier's at every patch or position.
        student_stage: stage (CNN, hierarchical) or block (ViT) of the student; negative counts from the end; or a
            share of the depth; or a module path; for feature maps. Last.
        teacher_stage: the same of the teacher. Last.
        resize: where grids differ, "pool" average-pools the larger map; "bilinear", "bicubic" and "nearest" interpolate
            the student's.

    Inputs:
        student_feature_map: (B, D_s, h, w); of a ViT its patch tokens on their grid, un-normed.
        teacher_feature_map: (B, D_t, h, w); width and grid may differ.
        student_dense_logits: (B, C, h, w), raw; instead of the maps.
        teacher_dense_logits: (B, C, h, w), raw; instead of the maps; the grid may differ.

    Returns:
        Scalar >= 0 in nats * T^2; 0 where each channel (norm "spatial": each position) differs by an offset alone.

    Raises:
        ValueError: temperature is not > 0; norm, signal or resize is unknown; the inputs are no maps, differ in B or C,
            or have other widths than in build; with norm "channel" the grids have a single position in common.
        TypeError: temperature is no number; the inputs of the signal are missing.
        RuntimeError: feature maps are given before build.

    Source:
        Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021,
        https://arxiv.org/abs/2011.13256. Checked against irfanICMLL/TorchDistiller@78bac7c; differs in: log-softmax
        instead of the logarithm of a softmax, so that nothing overflows; resize is our choice (there, grids are equal).

    Example:
        >>> import torch
        >>> from kdvit.losses import CWD
        >>> student = torch.tensor([1.0, 1.0]).log().view(1, 1, 1, 2)  # one channel: 1/2 and 1/2
        >>> teacher = torch.tensor([3.0, 1.0]).log().view(1, 1, 1, 2)  # 3/4 and 1/4
        >>> loss = CWD(temperature=1.0, signal="dense_logits", norm="channel")
        >>> two = lambda x: torch.cat([x, x], dim=1)  # two classes
        >>> terms = loss(student_dense_logits=two(student), teacher_dense_logits=two(teacher))
        >>> round(terms.item(), 4)  # 3/4 ln(3/2) + 1/4 ln(1/2)
        0.1308
    """

    mismatch = Mismatch(
        width="1x1 convolution where they differ",
        depth="one stage of each",
        grid="the larger is average-pooled, or resize=",
    )

    def __init__(
        self,
        temperature: float = 4.0,
        norm: str = "channel",
        signal: str = "feature_map",
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.temperature = number(self, "temperature", temperature, "> 0", "the published value is 4")
        self.norm = choice(self, "norm", norm, NORMS)
        self.signal = choice(self, "signal", signal, READS)
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.projector: Projector | None = None

    def inputs(self) -> tuple[str, ...]:
        return f"student_{self.signal}", f"teacher_{self.signal}"

    def locations(self) -> Mapping[str, Location]:
        if self.signal == "dense_logits":
            return {}
        return {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        dims = student[self.signal].dim, teacher[self.signal].dim
        self._check(student[self.signal].grid, teacher[self.signal].grid)
        if self.signal == "dense_logits":
            same_classes(self, *dims, *self.inputs())
        else:
            self.projector = conv1x1(*dims)

    def forward(
        self,
        student_feature_map: Tensor | None = None,
        teacher_feature_map: Tensor | None = None,
        student_dense_logits: Tensor | None = None,
        teacher_dense_logits: Tensor | None = None,
    ) -> Tensor:
        of_maps = self.signal == "feature_map"
        student = student_feature_map if of_maps else student_dense_logits
        teacher = teacher_feature_map if of_maps else teacher_dense_logits
        names = self.inputs()
        for name, x in zip(names, (student, teacher), strict=True):
            if x is None:
                raise TypeError(f"CWD: {name} must be given where signal='{self.signal}'; pass {name}.")
        student, teacher = feature_pair(self, student, teacher, *names)
        self._check(student.shape[2:], teacher.shape[2:])
        if of_maps:
            student = self._project(student, teacher)
        else:
            same_classes(self, student.shape[1], teacher.shape[1], *names)
        student, teacher = (self._rows(x) / self.temperature for x in match_grids(student, teacher, self.resize))
        return self.temperature**2 * kl_rows(student, teacher).mean()

    def _check(self, student_grid: Sequence[int], teacher_grid: Sequence[int]) -> None:
        if self.norm == "channel":
            several_positions(self, [(student_grid, teacher_grid)])

    def _project(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.projector is None:
            raise not_built(self)
        projected = at_least_float32(self.projector(student))
        built_width(self, "teacher_feature_map", teacher, projected.shape[1])
        return projected

    def _rows(self, x: Tensor) -> Tensor:
        """One row per distribution: (B * D, h * w), or (B * h * w, D) with norm "spatial"."""
        return (x.flatten(2) if self.norm == "channel" else map_to_tokens(x)).flatten(0, 1)
