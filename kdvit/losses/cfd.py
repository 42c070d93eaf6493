"""CFD: the teacher's pooled feature as a distribution over channels, and what a frozen classifier says of ours."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from kdvit.losses.checks import built_width, feature_pair, flag, not_built, number
from kdvit.losses.gathering import gather_batch
from kdvit.losses.kd import kl_rows
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, linear
from kdvit.signals import ModelInfo


@register("cfd")
class CFD(Loss):
    """Pull the student's pooled feature, as a distribution over channels, towards the teacher's, which is sharpened.

    L = mean_i KL(softmax(teacher_i / T) || softmax(Lin(student_i)))
      + beta * (gamma * mean_i H(p_i) - (1 - gamma) * H(mean_i p_i)),  p_i = softmax(head(Lin(student_i)))

    T divides the teacher's feature alone, and there is no factor T^2. H is the entropy: each image's prediction p_i is
    to be sure, all together are to be spread over the classes. The head is the teacher's classifier, frozen; it is read
    with beta > 0. Lin exists only where the widths differ. H(mean p) depends on the batch.

    Published: this loss 1 and no task loss (image generation); T 0.9, beta 0, or T 0.95, beta 0.003, gamma 0.75.

    Args:
        temperature: T > 0; below 1 it sharpens. 0.9.
        beta: weight >= 0 of the entropies. 0; released code: alpha. It says what is read: no schedule changes it.
        gamma: share of the images' own entropy in them, from 0 to 1. 0.75; released code: beta.
        gather: False: mean_i is over this process's batch; True: over the batches of all processes.

    Inputs:
        student_pooled: (B, D_s), what the classifier sees.
        teacher_pooled: (B, D_t), the same of the teacher.
        teacher_head: callable, (B, D_t) -> logits (B, C), differentiable; read with beta > 0.

    Returns:
        ``{"feature"}``, and with beta > 0 ``"entropy"`` and ``"diversity"``: scalars in nats, weights included; feature
        >= 0, with T = 1 0 where the (projected) features differ by an offset per image; entropy >= 0; diversity <= 0.

    Raises:
        ValueError: a number is out of its range; the inputs differ in B, or have other widths than in build.
        TypeError: an argument is of the wrong kind; teacher_head is missing.
        RuntimeError: called before build.

    Source:
        Sun et al., Accelerating Diffusion Sampling with Classifier-based Feature Distillation, ICME 2023,
        https://arxiv.org/abs/2211.12039. Checked against zju-SWJ/RCFD@14b9a3a; differs in: there both features are
        of one frozen third classifier, on an image of the student and of the teacher (diffusion models); here they are
        the models' own, with Lin and the teacher's classifier. Entropies stay finite for logits of any size.

    Example:
        >>> import torch
        >>> from kdvit.losses import CFD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> loss = CFD(temperature=0.5)
        >>> loss.build(*(ModelInfo.of(pooled=SignalInfo.of("pooled", x)) for x in (student, teacher)))
        >>> round(loss(student, teacher)["feature"].item(), 4)  # (9/10, 1/10): 0.9 ln(1.8) + 0.1 ln(0.2)
        0.3681
    """

    mismatch = Mismatch(width="linear layer where they differ")
    fixed_options = ("beta",)

    def __init__(self, temperature: float = 0.9, beta: float = 0.0, gamma: float = 0.75, gather: bool = False) -> None:
        super().__init__()
        self.temperature = number(self, "temperature", temperature, "> 0", "1.0 leaves the teacher's feature as it is")
        self.beta = number(self, "beta", beta, ">= 0", "0 switches the entropies off")
        self.gamma = number(self, "gamma", gamma, ">= 0", "1 counts the entropy of single images alone")
        if self.gamma > 1:
            raise ValueError(f"CFD: gamma must be at most 1, got {gamma}; the diversity's share is 1 - gamma.")
        self.gather = flag(self, "gather", gather)
        self.projector: Projector | None = None

    def inputs(self) -> tuple[str, ...]:
        return ("student_pooled", "teacher_pooled", *(("teacher_head",) if self.beta else ()))

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.teacher_dim = teacher["pooled"].dim
        self.projector = linear(student["pooled"].dim, self.teacher_dim)

    def forward(
        self,
        student_pooled: Tensor,
        teacher_pooled: Tensor,
        teacher_head: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        if self.projector is None:
            raise not_built(self)
        if self.beta and teacher_head is None:
            raise TypeError("CFD: teacher_head must be given with beta > 0, got none; pass the teacher's classifier.")
        student, teacher = feature_pair(
            self, student_pooled, teacher_pooled, "student_pooled", "teacher_pooled", axes="B, D"
        )
        built_width(self, "teacher_pooled", teacher, self.teacher_dim)
        student = at_least_float32(self.projector(student))
        if self.gather:
            student, teacher = gather_batch(student), gather_batch(teacher)
        terms = {"feature": kl_rows(student, teacher / self.temperature).mean()}
        if self.beta:
            log_p = teacher_head(student).to(student.dtype).log_softmax(dim=1)
            terms["entropy"] = self.beta * self.gamma * _entropy(log_p).mean()
            # The logarithm of the mean prediction, without a class that underflows to log 0.
            mean_log_p = log_p.logsumexp(dim=0) - math.log(len(log_p))
            terms["diversity"] = -self.beta * (1 - self.gamma) * _entropy(mean_log_p)
        return terms


def _entropy(log_p: Tensor) -> Tensor:
    """Of distributions on the last axis, in nats."""
    return -(log_p.exp() * log_p).sum(dim=-1)
