"""CA-MKD: several teachers, each weighed image by image by how well it knows the label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.branches import pooled
from kdvit.losses.checks import as_many, choice, not_built, number
from kdvit.losses.labels import label_shares
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.resizing import RESIZES
from kdvit.losses.teacher_distances import logit_distances, map_distances, project, projectors_to
from kdvit.signals import Location, ModelInfo

#: Whose cross-entropy weighs the feature term.
CONFIDENCES = ("teacher", "student")


def confidence_weights(cross_entropies: Tensor) -> Tensor:
    """Weights (B, T) that sum to 1 from the cross-entropies (B, T) of T teachers: the smaller, the larger the weight.

    Example:
        >>> import torch
        >>> confidence_weights(torch.tensor([[3.0, 1.0]]).log())  # softmax: 3/4 and 1/4
        tensor([[0.2500, 0.7500]])
    """
    return (1 - cross_entropies.softmax(dim=1)) / (cross_entropies.shape[1] - 1)


@register("ca_mkd")
class CAMKD(Loss):
    """Pull the student towards several teachers, more towards those that are nearer to an image's label.

    L = alpha / T * mean_i sum_t w_it * temperature^2 * KL(softmax(z_t / temperature) || softmax(z_s / temperature))
      + beta / T * mean_i sum_t w_it * mse_i(ReLU(BatchNorm(Conv1x1_t(F_s))), F_t),
    w_it = (1 - softmax over teachers(cross-entropy_it)) / (T - 1)

    T is the number of teachers, mse_i the mean over channels and positions of image i. The weights of an image sum
    to 1; the division by T on top of that is the released code's. With two teachers they are the softmax of minus the
    cross-entropies, with many nearly uniform: none gets more than 1 / (T - 1).

    Whose cross-entropy: that of the teachers' logits in both terms. Released, the feature term asks how well each
    teacher's classifier does on the student's projected map (its mean over positions), and lets the gradient flow
    through these weights too: ``confidence="student"``. That needs teachers whose classifier sees the mean over the
    last map, such as a ResNet; on a ViT's un-normed tokens the classifier is not at home.

    Published: task weight 1 and this loss 1 (alpha and beta hold its weights); CIFAR-100, three CNN teachers, 240
    epochs, the first one without the feature term.

    Args:
        alpha: weight >= 0 of the logits. 1.
        beta: weight >= 0 of the features. 50.
        temperature: > 0, of the KL. 4.
        confidence: whose cross-entropy weighs the feature term, ``"teacher"`` or, as released, ``"student"``.
        student_stage: block or stage of the student. -1, the last.
        teacher_stage: the same of every teacher. -1, the last.
        resize: where the grids differ: "pool" (the larger is average-pooled), "bilinear", "bicubic" or "nearest"
            (the student's is interpolated).

    Inputs:
        student_logits: (B, C), raw.
        teachers_logits: one (B, C) per teacher, raw.
        student_feature_map: (B, D_s, h, w); of a ViT its patch tokens on their grid.
        teachers_feature_map: one (B, D_t, h, w) per teacher, best behind a ReLU: the projected map has no negative
            values.
        labels: (B,) class indices, or (B, C) soft labels, whose shares count.
        teachers_head: with ``confidence="student"``: one callable (B, D_t) -> (B, C) per teacher.
        teachers_pooled: with ``confidence="student"``: one (B, D_t) per teacher, read for its width alone.

    Returns:
        ``{"logits", "features"}``, scalars >= 0, weights included: nats * temperature^2 and squared feature units.
        logits is 0 where the student's logits equal every teacher's.

    Raises:
        ValueError: a number is out of its range; confidence or resize is unknown; there are less than two teachers;
            a teacher's classifier does not fit its map; inputs differ in B or C, or in number; maps of other widths
            than in build; the labels fit neither (B,) nor (B, C).
        TypeError: an argument is of the wrong kind; labels of shape (B,) are no integers.
        RuntimeError: called before build.

    Source:
        Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022,
        https://arxiv.org/abs/2201.00007. Checked against Rorozhl/CA-MKD@c2f39a9; differs in: whose cross-entropy (see
        above), no bias before BatchNorm, the larger grid is pooled (there: the student's map is resized, and stays
        so for the next teacher).

    Example:
        >>> import torch
        >>> from kdvit.losses import CAMKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> zeros, ones = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
        >>> info = ModelInfo.of(feature_map=SignalInfo.of("feature_map", zeros))
        >>> loss = CAMKD(beta=4.0)
        >>> loss.build(info, (info, info))
        >>> sure, unsure = torch.tensor([[3.0, 1.0]] * 2).log(), torch.zeros(2, 2)  # of class 0: 3/4 and 1/2
        >>> terms = loss(sure, (sure, unsure), zeros, (zeros, ones), torch.tensor([0, 0]))
        >>> round(terms["features"].item(), 4)  # 4 / 2 * the weight 2/5 of the unsure teacher * (0 - 1)^2
        0.8
    """

    mismatch = Mismatch(
        width="1x1 convolution to each teacher's", depth="one stage of each", grid="the larger is average-pooled"
    )

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 50.0,
        temperature: float = 4.0,
        confidence: str = "teacher",
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.alpha = number(self, "alpha", alpha, ">= 0", "0 switches the logits off")
        self.beta = number(self, "beta", beta, ">= 0", "0 switches the features off")
        self.temperature = number(self, "temperature", temperature, "> 0", "1.0 leaves the logits as they are")
        self.confidence = choice(self, "confidence", confidence, CONFIDENCES)
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.projectors: nn.ModuleList | None = None

    def inputs(self) -> tuple[str, ...]:
        return (*super().inputs(), *(("teachers_head", "teachers_pooled") if self.confidence == "student" else ()))

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teachers_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: Sequence[ModelInfo]) -> None:
        self.projectors = projectors_to(self, student, teacher)
        for each in teacher if self.confidence == "student" else ():
            dims = each["feature_map"].dim, each["pooled"].dim
            if dims[0] != dims[1]:
                raise ValueError(
                    f"CAMKD: the classifier of '{each.name}' must see D={dims[0]} like its feature map, got "
                    f"D={dims[1]}; choose its last stage, or confidence='teacher'."
                )

    def forward(
        self,
        student_logits: Tensor,
        teachers_logits: Sequence[Tensor],
        student_feature_map: Tensor,
        teachers_feature_map: Sequence[Tensor],
        labels: Tensor,
        teachers_head: Sequence[Callable[[Tensor], Tensor]] | None = None,
        teachers_pooled: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        if self.projectors is None:
            raise not_built(self)
        divergences = logit_distances(self, student_logits, teachers_logits, self.projectors, self.temperature)
        pairs = project(self, student_feature_map, teachers_feature_map, self.projectors, self.resize)
        shares = label_shares(self, labels, at_least_float32(student_logits))
        weights = self._weights([logits.detach() for logits in teachers_logits], shares)
        feature_weights = weights
        if self.confidence == "student":
            as_many(self, self.projectors, teachers_head=teachers_head)
            answers = [head(pooled(ours)) for head, (ours, _) in zip(teachers_head, pairs, strict=True)]
            feature_weights = self._weights(answers, shares)
        terms = {
            "logits": self.alpha * weights * divergences,
            "features": self.beta * feature_weights * map_distances(pairs),
        }
        return {name: values.mean() for name, values in terms.items()}

    def _weights(self, logits: Sequence[Tensor], shares: Tensor) -> Tensor:
        rows = [F.cross_entropy(at_least_float32(z), shares, reduction="none") for z in logits]
        return confidence_weights(torch.stack(rows, dim=1))
