"""MMKD: several teachers, weighed image by image by two small networks that learn on held-out images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from kdvit.losses.checks import choice, count, not_built, number, same_classes
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.resizing import RESIZES
from kdvit.losses.teacher_distances import logit_distances, map_distances, project, projectors_to
from kdvit.signals import Location, ModelInfo


class TeacherWeights(nn.Sequential):
    """A meta-network: what is known of an image (B, dim) -> weights of the teachers (B, T), which sum to 1.

    Its parameters require no gradient: only bilevel steps move them. It begins with equal weights.
    """

    def __init__(self, dim: int, num_teachers: int) -> None:
        super().__init__(nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, num_teachers), nn.Softmax(dim=1))
        nn.init.zeros_(self[2].weight)
        nn.init.zeros_(self[2].bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        # Half precision of the scores would be magnified by the softmax.
        with torch.autocast(x.device.type, enabled=False):
            return at_least_float32(super().forward(x.to(self[0].weight.dtype)))


@register("mmkd")
class MMKD(Loss):
    """Pull the student towards several teachers, with weights for each image that learn what helps the student.

    L = alpha * mean_i sum_t v_it * temperature^2 * KL(softmax(z_t / temperature) || softmax(z_s / temperature))
      + beta * mean_i sum_t w_it * mse_i(ReLU(BatchNorm(Conv1x1_t(F_s))), F_t),
    v_i = softmax(MLP([z_1i, ..., z_Ti, z_si])),  w_i = softmax(MLP([row i of G_1, ..., G_T, G_s])),  G = X X^T

    X are the flattened maps of the batch, (B, D * h * w), so that G (B, B) compares its images; an MLP has one hidden
    layer of half its input's width. The student's part of what an MLP reads is without gradient.

    The MLPs are meta-parameters: no other optimizer moves them than that of `meta_optimizer`, by the bilevel steps
    of `kdvit.bilevel.Bilevel`, downhill in the held-out cross-entropy of the student one training step ahead (DARTS).
    Released, the step is another: 2 steps of SGD on this loss alone and 1 on the cross-entropy, then the gradient
    of the cross-entropy back through all three, all on 64 of the last 256 training images that the student got
    wrong (a hard buffer). Without bilevel steps the weights stay 1 / T. A bilevel step costs 4 forward passes of the
    student and 3 of the teachers.

    G ties the second MLP to a batch size, and its columns to the order of the batch: once it has learned, that
    order matters. It sees this process's batch. A smaller batch is filled up with zeros. G is not scaled, as released:
    with maps of large values a few steps of Adam choose one teacher for all; a smaller meta_lr holds against this.

    Published: task weight 1 and this loss 1 (alpha and beta hold its weights); CIFAR-100, three CNN teachers, 240
    epochs, batches of 64.

    Args:
        batch_size: the images of a batch in one process, at most. 64.
        alpha: weight >= 0 of the logits. 1.
        beta: weight >= 0 of the features. 100.
        temperature: > 0, of the KL. 4.
        student_stage: block or stage of the student. -1, the last.
        teacher_stage: the same of every teacher. -1, the last.
        resize: where the grids differ: "pool" (the larger is average-pooled), "bilinear", "bicubic" or "nearest"
            (the student's is interpolated).
        meta_lr: learning rate > 0 of Adam for the MLPs. 0.001.
        meta_weight_decay: >= 0, of the same. 0.0001.
        meta_interval: training steps from one bilevel step to the next. 5.

    Inputs:
        student_logits: (B, C), raw.
        teachers_logits: one (B, C) per teacher, raw.
        student_feature_map: (B, D_s, h, w); of a ViT its patch tokens on their grid.
        teachers_feature_map: one (B, D_t, h, w) per teacher, best behind a ReLU: the projected map has no negative
            values.

    Returns:
        ``{"logits", "features"}``, scalars >= 0, weights included: nats * temperature^2 and squared feature units.
        logits is 0 where the student's logits equal every teacher's.

    Raises:
        ValueError: a number is out of its range; resize is unknown; there are less than two teachers; a batch is
            larger than batch_size; inputs differ in B or C, or in number; classes or widths differ from those in build.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Zhang et al., Adaptive Multi-Teacher Knowledge Distillation with Meta-Learning, ICME 2023,
        https://arxiv.org/abs/2306.06634. Checked against Rorozhl/MMKD@3ae1f8c; differs in: the bilevel step (see
        above), equal weights at the start, no bias before BatchNorm, smaller batches (there: skipped). Its option
        ``--convs`` never reached the projectors: they are 1x1 there too.

    Example:
        >>> import torch
        >>> from kdvit.losses import MMKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> zeros, ones, logits = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.zeros(2, 5)
        >>> info = ModelInfo.of(logits=SignalInfo.of("logits", logits),
        ...                     feature_map=SignalInfo.of("feature_map", zeros))
        >>> loss = MMKD(batch_size=2)
        >>> loss.build(info, (info, info))
        >>> terms = loss(logits, (logits, logits), zeros, (zeros, ones))
        >>> terms["features"].item()  # 100 * (1/2 * (0 - 0)^2 + 1/2 * (0 - 1)^2)
        50.0
    """

    mismatch = Mismatch(
        width="1x1 convolution to each teacher's", depth="one stage of each", grid="the larger is average-pooled"
    )
    fixed_options = ("meta_lr", "meta_weight_decay")

    def __init__(
        self,
        batch_size: int = 64,
        alpha: float = 1.0,
        beta: float = 100.0,
        temperature: float = 4.0,
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
        meta_lr: float = 1e-3,
        meta_weight_decay: float = 1e-4,
        meta_interval: int = 5,
    ) -> None:
        super().__init__()
        self.batch_size = count(self, "batch_size", batch_size, "give that of one process")
        self.alpha = number(self, "alpha", alpha, ">= 0", "0 switches the logits off")
        self.beta = number(self, "beta", beta, ">= 0", "0 switches the features off")
        self.temperature = number(self, "temperature", temperature, "> 0", "1.0 leaves the logits as they are")
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.meta_lr = number(self, "meta_lr", meta_lr, "> 0", "the published value is 0.001")
        self.meta_weight_decay = number(self, "meta_weight_decay", meta_weight_decay, ">= 0", "0 switches it off")
        self.meta_interval = count(self, "meta_interval", meta_interval, "1 takes a bilevel step in every step")
        self.projectors: nn.ModuleList | None = None

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teachers_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: Sequence[ModelInfo]) -> None:
        self.num_classes = student["logits"].dim
        for each in teacher:
            same_classes(self, self.num_classes, each["logits"].dim, teacher_name="teachers_logits")
        self.projectors = projectors_to(self, student, teacher)
        num_models = len(teacher) + 1
        self.logit_weights = TeacherWeights(num_models * self.num_classes, len(teacher))
        self.feature_weights = TeacherWeights(num_models * self.batch_size, len(teacher))

    def meta_optimizer(self) -> Adam | None:
        if self.projectors is None:  # not built: no meta-parameters yet
            return None
        meta = [*self.logit_weights.parameters(), *self.feature_weights.parameters()]
        # A hypergradient has the student's learning rate as a factor: next to Adam's usual epsilon it may be small.
        return Adam(meta, lr=self.meta_lr, weight_decay=self.meta_weight_decay, eps=1e-12)

    def extra_forwards(self) -> dict[str, float]:
        return {"student": 4 / self.meta_interval, "teacher": 3 / self.meta_interval}

    def forward(
        self,
        student_logits: Tensor,
        teachers_logits: Sequence[Tensor],
        student_feature_map: Tensor,
        teachers_feature_map: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        if self.projectors is None:
            raise not_built(self)
        divergences = logit_distances(self, student_logits, teachers_logits, self.projectors, self.temperature)
        pairs = project(self, student_feature_map, teachers_feature_map, self.projectors, self.resize)
        self._check_sizes(student_logits)
        logit_weights = self.logit_weights(_of_all(teachers_logits, student_logits))
        relations = [self._relations(x) for x in (*teachers_feature_map, student_feature_map)]
        feature_weights = self.feature_weights(torch.cat(relations, dim=1))
        return {
            "logits": self.alpha * (logit_weights * divergences).sum(dim=1).mean(),
            "features": self.beta * (feature_weights * map_distances(pairs)).sum(dim=1).mean(),
        }

    def _relations(self, feature_map: Tensor) -> Tensor:
        """The inner products of the images of a batch, (B, batch_size): zeros for images that it lacks."""
        x = at_least_float32(feature_map.detach()).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return F.pad(x @ x.T, (0, self.batch_size - len(x)))

    def _check_sizes(self, logits: Tensor) -> None:
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"MMKD: student_logits must have C={self.num_classes} as in build, got C={logits.shape[1]}; "
                "build the loss for these classes."
            )
        if len(logits) > self.batch_size:
            raise ValueError(
                f"MMKD: batch_size must be at least that of the batches, got {self.batch_size} for B={len(logits)}; "
                f"pass batch_size={len(logits)}."
            )


def _of_all(teachers: Sequence[Tensor], student: Tensor) -> Tensor:
    return torch.cat([at_least_float32(x.detach()) for x in (*teachers, student)], dim=1)
