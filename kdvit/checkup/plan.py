"""What a checkup is told of the training that is to come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kdvit.distiller import Distiller

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def adamw(distiller: Distiller) -> torch.optim.Optimizer:
    """AdamW over all that is trained, for a checkup that is told of no optimizer."""
    return torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], lr=1e-3)


@dataclass(frozen=True)
class Plan:
    """The training that is to come, as far as a checkup must know it.

    Args:
        optimizer: makes the optimizer, given the Distiller (a copy of it).
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        num_steps: optimizer steps of the whole run; None: no total is estimated.
        num_epochs: passes over the training images, for weights that follow a schedule.
        accumulation_steps: batches that make one optimizer step.
        num_workers: loader processes; with some, loading goes on beside the step.
        num_train_images: the losses are told this number (`Distiller.allocate`); None: they were told already.
        num_test_images: images of one evaluation.
        num_evaluations: of the student, in the whole run.
    """

    optimizer: Callable[[Distiller], torch.optim.Optimizer] = adamw
    mixed_precision: str = "no"
    num_steps: int | None = None
    num_epochs: float = 1.0
    accumulation_steps: int = 1
    num_workers: int = 0
    num_train_images: int | None = None
    num_test_images: int = 0
    num_evaluations: int = 0

    def __post_init__(self) -> None:
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(
                f"Plan: mixed_precision must be 'no', 'bf16' or 'fp16', got {self.mixed_precision!r}; "
                "give what training will use."
            )
