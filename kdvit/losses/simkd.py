"""SimKD: a student that is deployed with the teacher's classifier."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.branches import pooled
from kdvit.losses.checks import adopted_head, built_width, choice, count, feature_pair, flag, not_built
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, conv_norm
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo

FEATURES = ("feature_map", "pooled")
#: How far a mean over positions may be from what a classifier sees, relative to the largest entry: bfloat16 teachers.
TOLERANCE = 0.02


@register("simkd")
class SimKD(Loss):
    """Pull the student's last feature map, through a projector, towards the teacher's, and reuse its classifier.

    L = mean over all elements of (P(student) - teacher)^2,  logits at inference: W(mean over positions of P(student))

    P: 1x1 to D_t / factor channels, 3x3, 1x1 to D_t, each without bias and with BatchNorm and ReLU. W is the teacher's
    classifier; P and a frozen copy of W are deployed with the student, whose own classifier plays no part. Where W does
    not see the mean of the teacher's last map (a ViT's class token, a norm or a convolution behind the pooling),
    matching maps would feed W with what it does not know: feature="pooled" is the choice then. A ViT's features have
    both signs: relu=False.

    Published: task weight 0 and this loss 1 (CIFAR-100, 240 epochs): no labels, no logits.

    Args:
        feature: what is matched: ``"feature_map"``, the maps, position by position; or ``"pooled"``: the mean over
            positions of P(student) with what the teacher's classifier sees.
        factor: how much narrower than the teacher's map the middle of the projector is. 2.
        student_stage: stage or block of the student, last as published.
        teacher_stage: the same of the teacher; plays no part for ``"pooled"``.
        resize: where the grids differ: ``"pool"``: the larger is average-pooled, in front of the projector, as
            published; ``"bilinear"``, ``"bicubic"``, ``"nearest"``: the student's becomes the teacher's. Plays no part
            for ``"pooled"``.
        relu: whether the projector ends in a ReLU.

    Inputs:
        student_feature_map: (B, D_s, h_s, w_s).
        teacher_pooled: (B, D_t), what the teacher's classifier sees; with ``"feature_map"`` it is compared with the
            mean of teacher_feature_map in eval mode, once by the Distiller, and not used otherwise; where blank
            images make it 0, in the first training step.
        teacher_feature_map: (B, D_t, h_t, w_t); for feature="feature_map" alone.

    Returns:
        Scalar >= 0 in squared feature units; 0 where the projected feature equals the teacher's.

    Raises:
        ValueError: feature or resize is not known; factor is not positive or exceeds D_t; teacher_pooled is not the
            mean of teacher_feature_map; the teacher's features have another width than in build; the batches differ.
        TypeError: an argument is of the wrong kind, or the teacher's map is missing.
        RuntimeError: called before build, or predict before adopt_head.

    Source:
        Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022, section 3.2,
        https://arxiv.org/abs/2203.14001. Checked against DefangChen/SimKD@2b389c3; differs in: each axis of the grid
        is pooled by its own sizes (there: square maps); "pooled" and relu=False are ours.

    Example:
        >>> import torch
        >>> from kdvit.losses import SimKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher, pooled = torch.zeros(2, 8, 4, 4), torch.ones(2, 16, 4, 4), torch.ones(2, 16)
        >>> loss = SimKD()
        >>> loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", student)),
        ...            ModelInfo.of(feature_map=SignalInfo.of("feature_map", teacher),
        ...                         pooled=SignalInfo.of("pooled", pooled)))
        >>> loss(student, pooled, teacher).item()  # zeros stay zeros: (0 - 1)^2
        1.0
        >>> loss.adopt_head(torch.nn.Linear(16, 10))
        >>> torch.equal(loss.predict(student)[0], loss.head.bias)  # the classifier sees zeros
        True
    """

    mismatch = Mismatch(width="three convolutions", depth="one stage of each", grid="the larger is average-pooled")
    fixed_options = ("factor",)

    def __init__(
        self,
        feature: str = "feature_map",
        factor: int = 2,
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.feature = choice(self, "feature", feature, FEATURES)
        self.factor = count(self, "factor", factor, "the published value is 2")
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.relu = flag(self, "relu", relu)
        self.projector: Projector | None = None
        self.head: nn.Linear | None = None

    def inputs(self) -> tuple[str, ...]:
        maps = ("teacher_feature_map",) if self.feature == "feature_map" else ()
        return ("student_feature_map", "teacher_pooled", *maps)

    def locations(self) -> Mapping[str, Location]:
        stages = {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}
        return {name: stage for name, stage in stages.items() if name in self.inputs()}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.dim = teacher["pooled"].dim
        self.undecided = False  # whether the classifier sees the mean: an image on which all is 0 does not tell
        self.grid = None
        if self.feature == "feature_map":
            self.grid = teacher["feature_map"].grid  # for predict, which sees no teacher
            if teacher["feature_map"].dim != self.dim:
                raise _other_feature(f"widths {self.dim} and {teacher['feature_map'].dim}")
        if self.factor > self.dim:
            raise ValueError(
                f"SimKD: factor must be at most the teacher's width {self.dim}, got {self.factor}; "
                "the published value is 2."
            )
        middle = self.dim // self.factor
        self.projector = Projector(
            *conv_norm(student["feature_map"].dim, middle),
            *conv_norm(middle, middle, kernel_size=3),
            *conv_norm(middle, self.dim, relu=self.relu),
        )

    def forward(
        self, student_feature_map: Tensor, teacher_pooled: Tensor, teacher_feature_map: Tensor | None = None
    ) -> Tensor:
        if self.projector is None:
            raise not_built(self)
        built_width(self, "teacher_pooled", teacher_pooled, self.dim)
        if self.feature == "pooled":
            student = pooled(self._projected(student_feature_map))
            names = "student_feature_map", "teacher_pooled"
            return F.mse_loss(*feature_pair(self, student, teacher_pooled, *names, axes="B, D"))
        if teacher_feature_map is None:
            raise TypeError("SimKD: teacher_feature_map must be given where feature says so, got none; pass it.")
        student, teacher_map = feature_pair(self, student_feature_map, teacher_feature_map)
        built_width(self, "teacher_feature_map", teacher_map, self.dim)
        # Once is enough, and a comparison of values would stall a GPU on every training step.
        if (self.undecided or not self.training) and not torch.compiler.is_compiling():
            self._check_classifier_sees_the_mean(teacher_map, teacher_pooled)
        student, teacher_map = match_grids(student, teacher_map, self.resize)
        return F.mse_loss(self._projected(student), teacher_map)

    def predict(self, student_feature_map: Tensor) -> Tensor:
        """The logits (B, C) of the deployed student."""
        if self.projector is None:
            raise not_built(self)
        head, student = adopted_head(self), at_least_float32(student_feature_map)
        if self.grid is not None:
            student, _ = match_grids(student, student.new_empty(1, 1, *self.grid), self.resize)
        return head(pooled(self._projected(student)).to(head.weight.dtype))

    def _projected(self, x: Tensor) -> Tensor:
        return at_least_float32(self.projector(x))

    def _check_classifier_sees_the_mean(self, teacher_map: Tensor, teacher_pooled: Tensor) -> None:
        largest = teacher_pooled.abs().max()
        if (pooled(teacher_map) - teacher_pooled).abs().max() > TOLERANCE * largest:
            raise _other_feature("another vector")
        self.undecided = not largest > 0


def _other_feature(got: str) -> ValueError:
    return ValueError(
        f"SimKD: teacher_pooled must be the mean over positions of teacher_feature_map, got {got}; pass "
        "feature='pooled' for this teacher, or the teacher_stage that its classifier averages."
    )
