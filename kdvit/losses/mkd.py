"""MKD: knowledge distillation whose temperatures are learned on held-out images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam

from kdvit.losses.checks import count, logit_pair, number
from kdvit.losses.kd import kl_rows
from kdvit.losses.loss import Loss, register


@register("mkd")
class MKD(Loss):
    """Pull the student's class probabilities towards the teacher's, each softened by a temperature that is learned.

    L = mean_i KL(softmax(teacher / T_t) || softmax(student / T_s)),  T = the given temperature * exp(a)

    The meta-parameters a_t and a_s start at 0. No other optimizer moves them than that of `meta_optimizer`, by the
    bilevel steps of `kdvit.bilevel.Bilevel`: downhill in the held-out cross-entropy of the student one training step
    ahead. Without such steps this is KD with two fixed temperatures, and without the factor T^2, because the student's
    temperature is also free to set the size of the gradient.

    A bilevel step costs 4 forward passes of the student and 3 of the teacher.

    Published: task weight 1 and this loss with a weight lambda; ViT students, ImageNet, 600 epochs for ViT-L. The
    numbers of lambda, the start and the meta learning rate could not be read.

    Args:
        student_temperature: T_s > 0 at the start. 1.
        teacher_temperature: T_t > 0 at the start. 1.
        meta_lr: learning rate > 0 of Adam for a_t and a_s: about the relative change of a temperature per bilevel
            step. 0.01.
        meta_interval: training steps from one bilevel step to the next. 10; 1 for one in every step.

    Inputs:
        student_logits: (B, C), raw.
        teacher_logits: (B, C), raw.

    Returns:
        Scalar >= 0 in nats; 0 where both softened distributions are equal.

    Raises:
        ValueError: a number is not positive; the logits differ in B or C, or are not (B, C).
        TypeError: a number is no number, or meta_interval no integer.

    Source:
        Liu et al., Meta Knowledge Distillation, 2022, https://arxiv.org/abs/2202.07940; no official code; from the
        paper: two temperatures as meta-parameters, moved by the gradient of the learning objective during training.
        Our choice: their logarithm, Adam, finite differences, all numbers.

    Example:
        >>> import torch
        >>> from kdvit.losses import MKD
        >>> loss = MKD(teacher_temperature=0.5)
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log() / 2
        >>> round(loss(student, teacher).item(), 4)  # probabilities 3/4 and 1/4: 3/4 ln(3/2) + 1/4 ln(1/2)
        0.1308
        >>> loss.temperatures()  # of the student and the teacher, as they are now
        (1.0, 0.5)
    """

    fixed_options = ("meta_lr",)

    def __init__(
        self,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        meta_lr: float = 0.01,
        meta_interval: int = 10,
    ) -> None:
        super().__init__()
        advice = "1.0 leaves the logits as they are"
        self.student_temperature = number(self, "student_temperature", student_temperature, "> 0", advice)
        self.teacher_temperature = number(self, "teacher_temperature", teacher_temperature, "> 0", advice)
        self.meta_lr = number(self, "meta_lr", meta_lr, "> 0", "the usual range is 0.001 to 0.1")
        self.meta_interval = count(self, "meta_interval", meta_interval, "1 takes a bilevel step in every step")
        self.student_log_factor = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.teacher_log_factor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def temperatures(self) -> tuple[float, float]:
        """The temperatures of the student and the teacher, as they are now."""
        return tuple(temperature.item() for temperature in self._temperatures())

    def meta_optimizer(self) -> Adam:
        # A hypergradient has the student's learning rate as a factor: next to Adam's usual epsilon it may be small.
        return Adam([self.student_log_factor, self.teacher_log_factor], lr=self.meta_lr, eps=1e-12)

    def extra_forwards(self) -> dict[str, float]:
        return {"student": 4 / self.meta_interval, "teacher": 3 / self.meta_interval}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student, teacher = logit_pair(self, student_logits, teacher_logits)
        student_temperature, teacher_temperature = self._temperatures()
        return kl_rows(student / student_temperature, teacher / teacher_temperature).mean()

    def _temperatures(self) -> tuple[Tensor, Tensor]:
        return (
            self.student_temperature * self.student_log_factor.exp(),
            self.teacher_temperature * self.teacher_log_factor.exp(),
        )
