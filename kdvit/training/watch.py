"""NaN and infinity, found at the step where they arise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdvit.distiller import DistillerOutput


class Watch:
    """Remembers each step's losses until they are looked at: reading a value stalls a GPU."""

    def __init__(self) -> None:
        self._unchecked: list[tuple[int, Tensor, dict[str, Tensor], Tensor]] = []

    def add(self, step: int, output: DistillerOutput, sample_ids: Tensor) -> None:
        self._unchecked.append((step, output.loss.detach(), output.losses, sample_ids))

    def check(self, advice: str) -> None:
        """Look at what was added since the last time.

        Raises:
            RuntimeError: a loss is NaN or infinite; names it, its step and its samples.
        """
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked or torch.stack([loss for _, loss, _, _ in unchecked]).isfinite().all():
            return
        step, loss, losses, sample_ids = next(row for row in unchecked if not row[1].isfinite())
        bad = [name for name, value in losses.items() if not value.isfinite()] or ["the weighted sum"]
        raise RuntimeError(
            f"Trainer: {', '.join(bad)} became {loss.item()} at step {step} (samples {sample_ids.tolist()[:8]} ...); "
            f"{advice}"
        )


def check_weights(model: nn.Module, step: int, advice: str) -> None:
    """A gradient may be NaN where its loss is not; such weights must not replace the last good state.

    Raises:
        RuntimeError: a weight is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise RuntimeError(
                f"Trainer: the weights became NaN or infinite before step {step} (first: {name}); {advice}"
            )
