"""SRRL: the student's feature through the teacher's classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.branches import pooled
from kdvit.losses.checks import built_width, choice, feature_pair, flag, not_built, number
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.projectors import Projector, conv_norm
from kdvit.signals import Location, ModelInfo

FEATURES = ("feature_map", "pooled")


@register("srrl")
class SRRL(Loss):
    """Pull the student's pooled feature, and what the teacher's classifier says to it, towards the teacher's.

    L = alpha * mean over all elements of (f - teacher_pooled)^2
      + beta * mean over all elements of (W(f) - W(teacher_pooled))^2,
    f = mean over positions of ReLU(BatchNorm(Conv1x1(student)))

    W is the teacher's classifier, frozen: the gradient of the second term flows through it into the student. The
    classes are the teacher's on both sides, so the student may have others. The projector is there for equal widths
    too. Its ReLU fits what a CNN pools; a ViT's feature has both signs: relu=False.

    Published: task weight 1 and this loss 1 (ImageNet, 100 epochs); alpha 1 and beta 5 in yzd-v/cls_KD.

    Args:
        alpha: weight >= 0 of the feature term. 1.
        beta: weight >= 0 of the logit term. 1.
        feature: what is read of the student: ``"feature_map"``, averaged over positions behind the projector; or
            ``"pooled"``, what its classifier sees (a ViT's class token), through the projector as it is.
        student_stage: stage or block of the student's map, last as published; plays no part for ``"pooled"``.
        relu: whether the projector ends in a ReLU.

    Inputs:
        student_feature_map: (B, D_s, h, w), or
        student_pooled: (B, D_s), as ``feature`` says.
        teacher_pooled: (B, D_t), what the teacher's classifier sees.
        teacher_head: the teacher's classifier, (B, D_t) -> (B, C).

    Returns:
        ``{"feature", "logits"}``, scalars >= 0 in squared feature and logit units, weights included; 0 where f equals
        the teacher's.

    Raises:
        ValueError: a weight is negative; feature is not known; teacher_pooled has another width than in build, or
            another batch than the student's.
        TypeError: an argument is of the wrong kind, or the student's feature is missing.
        RuntimeError: called before build.

    Source:
        Yang et al., Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021,
        https://openreview.net/forum?id=ZzwDy_wiWv. Checked against jingyang2017/KD_SRRL@d2e802f (the instance of its
        loss: the released script calls the class, a TypeError), and for "pooled" DefangChen/SimKD@2b389c3; differs
        in: initial weights, without effect behind BatchNorm; relu=False is ours.

    Example:
        >>> import torch
        >>> from kdvit.losses import SRRL
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.zeros(2, 8, 4, 4), torch.ones(2, 16)
        >>> loss = SRRL()
        >>> loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", student)),
        ...            ModelInfo.of(pooled=SignalInfo.of("pooled", teacher)))
        >>> terms = loss(student_feature_map=student, teacher_pooled=teacher, teacher_head=lambda x: 3 * x[:, :5])
        >>> terms["feature"].item(), terms["logits"].item()  # zeros stay zeros: (0 - 1)^2 and (0 - 3)^2
        (1.0, 9.0)
    """

    mismatch = Mismatch(
        width="1x1 convolution", depth="one stage, and what the classifier sees", grid="mean over positions"
    )

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        feature: str = "feature_map",
        student_stage: Location = -1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.alpha = number(self, "alpha", alpha, ">= 0", "0 switches the feature term off")
        self.beta = number(self, "beta", beta, ">= 0", "0 switches the logit term off")
        self.feature = choice(self, "feature", feature, FEATURES)
        self.student_stage = student_stage
        self.relu = flag(self, "relu", relu)
        self.projector: Projector | None = None

    def inputs(self) -> tuple[str, ...]:
        return (f"student_{self.feature}", "teacher_pooled", "teacher_head")

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage} if self.feature == "feature_map" else {}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.projector = conv_norm(student[self.feature].dim, teacher["pooled"].dim, relu=self.relu)

    def forward(
        self,
        *,
        student_feature_map: Tensor | None = None,
        student_pooled: Tensor | None = None,
        teacher_pooled: Tensor,
        teacher_head: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        feature = student_feature_map if self.feature == "feature_map" else student_pooled
        if feature is None:
            raise TypeError(f"SRRL: student_{self.feature} must be given where feature says so, got none; pass it.")
        if self.projector is None:
            raise not_built(self)
        student = pooled(self.projector(feature if feature.ndim == 4 else feature[:, :, None, None]))
        names = f"student_{self.feature}", "teacher_pooled"
        student, teacher = feature_pair(self, student, teacher_pooled, *names, axes="B, D")
        built_width(self, "teacher_pooled", teacher, student.shape[1])
        logits, taught = (teacher_head(x).to(x.dtype) for x in (student, teacher))
        return {
            "feature": self.alpha * F.mse_loss(student, teacher),
            "logits": self.beta * F.mse_loss(logits, taught.detach()),
        }
