"""Logit standardisation, as an option of every loss that reads logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kdvit.losses.checks import number
from kdvit.losses.loss import Loss
from kdvit.losses.precision import at_least_float32
from kdvit.losses.wrapper import LossWrapper


def standardize(logits: Tensor, eps: float) -> Tensor:
    """(logits - mean) / (std + eps) over the classes, the second axis, with the unbiased std."""
    logits = at_least_float32(logits)
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + eps)


class Standardized(LossWrapper):
    """Let a loss compare the shape of the logits, not their scale: every logit input is z-scored before it.

    L = loss(z(student_logits), z(teacher_logits), ...),  z(x) = (x - mean_c x) / (std_c x + eps), unbiased std

    ``make("kd", standardize=True, temperature=2.0)`` makes one. The loss does not see the scale of the student's
    logits, so keep a task loss beside it, on the raw logits.

    Published: with KD task weight 0.1 and this loss 9, for ViT students 10; with DKD alpha and beta times 9.

    Args:
        loss: any loss that reads ``*_logits``. Published temperature of its own: 2 (2 to 4 by pair).
        eps: > 0, added to the standard deviation.

    Inputs:
        those of ``loss``; all that are logits (student_logits, teacher_logits, student_dist_logits, of a second view,
        dense ones position by position) are standardised, the rest is handed on.

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
        super().__init__(loss)
        self.eps = number(self, "eps", eps, "> 0", "it keeps constant logits finite")
        if not any(_are_logits(name) for name in loss.inputs()):
            raise ValueError(
                f"Standardized: loss must read logits, got {type(loss).__name__} which reads "
                f"{', '.join(loss.inputs())}; drop standardize for it."
            )
        if "rerun_student" in loss.inputs():
            raise ValueError(
                f"Standardized: loss must read all its logits as inputs, got {type(loss).__name__}, which runs the "
                "student itself; drop standardize for it."
            )

    @property
    def calibrate(self) -> Callable[..., None] | None:
        inner = self.loss.calibrate
        if inner is None:
            return None

        @functools.wraps(inner)  # its parameters say what it is given
        def calibrate(**given: Tensor) -> None:
            inner(**self._standardized(given))

        return calibrate

    def forward(self, *signals: Any, **named: Any) -> Tensor | dict[str, Tensor]:
        given = dict(zip(self.inputs(), signals)) | named
        return self.loss(**self._standardized(given))

    def _standardized(self, given: Mapping[str, Any]) -> dict[str, Any]:
        def scored(x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            return tuple(map(scored, x)) if isinstance(x, tuple) else standardize(x, self.eps)  # of several teachers

        return {key: scored(x) if _are_logits(key) else x for key, x in given.items()}


def _are_logits(name: str) -> bool:
    return name.endswith("logits")
