"""Logit standardisation, as an option of every loss that reads logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kdvit.losses.checks import number
from kdvit.losses.loss import Loss
from kdvit.losses.precision import at_least_float32
from kdvit.signals import Location, ModelInfo


def standardize(logits: Tensor, eps: float) -> Tensor:
    """(logits - mean) / (std + eps) over the last axis, with the unbiased std."""
    logits = at_least_float32(logits)
    return (logits - logits.mean(dim=-1, keepdim=True)) / (logits.std(dim=-1, keepdim=True) + eps)


class Standardized(Loss):
    """Let a loss compare the shape of the logits, not their scale: every logit input is z-scored before it.

    L = loss(z(student_logits), z(teacher_logits), ...),  z(x) = (x - mean_c x) / (std_c x + eps), unbiased std

    ``make("kd", standardize=True, temperature=2.0)`` makes one. The loss does not see the scale of the student's
    logits, so keep a task loss beside it, on the raw logits. Published outer weight with KD: 9 (task loss 0.1),
    for ViT students 10; with DKD alpha and beta are multiplied by 9.

    Args:
        loss: any loss that reads ``*_logits``. Published temperature of its own: 2 (2 to 4 by pair).
        eps: > 0, added to the standard deviation.

    Inputs:
        those of ``loss``; student_logits, teacher_logits and student_dist_logits are standardised, the rest is
        handed on.

    Returns:
        What ``loss`` returns.

    Raises:
        ValueError: loss reads no logits; eps is not positive; what ``loss`` raises.
        TypeError: loss is no `Loss`.

    Source:
        Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, Algorithm 1,
        https://arxiv.org/abs/2403.01427. Checked against sunshangquan/logit-standardization-KD@f6e5aa5; differs in:
        nothing (the paper's text has the biased std, its code and this loss the unbiased one).

    Example:
        >>> import torch
        >>> from kdvit.losses import KD, Standardized
        >>> student = torch.tensor([[1.0, 0.0, -1.0]])
        >>> Standardized(KD(temperature=2.0))(student, 5 * student + 3).item() < 1e-6  # equal but for scale and mean
        True
    """

    def __init__(self, loss: Loss, eps: float = 1e-7) -> None:
        super().__init__()
        if not isinstance(loss, Loss):
            raise TypeError(f"Standardized: loss must be a kdvit.losses.Loss, got {loss!r}; make one, such as KD().")
        self.loss = loss
        self.eps = number(self, "eps", eps, "> 0", "it keeps constant logits finite")
        self._inputs = loss.inputs()
        if not any(_are_logits(name) for name in self._inputs):
            raise ValueError(
                f"Standardized: loss must read logits, got {type(loss).__name__} which reads "
                f"{', '.join(self._inputs)}; drop standardize for it."
            )

    @property
    def name(self) -> str:
        """The name of the loss, marked."""
        return f"standardized_{self.loss.name}"

    def inputs(self) -> tuple[str, ...]:
        return self._inputs

    def locations(self) -> Mapping[str, Location | Sequence[Location]]:
        return self.loss.locations()

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.loss.build(student, teacher)

    def forward(self, *signals: Any, **named: Any) -> Tensor | dict[str, Tensor]:
        given = dict(zip(self._inputs, signals)) | named
        return self.loss(**{key: standardize(x, self.eps) if _are_logits(key) else x for key, x in given.items()})


def _are_logits(name: str) -> bool:
    return name.endswith("logits")
