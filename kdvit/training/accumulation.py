"""Gradient accumulation: the last optimizer step of an epoch may have fewer batches than the others."""

from __future__ import annotations


def window_scale(batch: int, num_batches: int, accumulation_steps: int) -> float:
    """What to multiply a batch's loss with, so that each optimizer step follows the mean over its own batches.

    Accelerate divides every loss by ``accumulation_steps``, also in an epoch's last window, which ends with the epoch:
    with 5 batches and 2 a step, the last step would be half as long as its gradient.

    Args:
        batch: number of the batch in its epoch, from 0.
        num_batches: of this process in a whole epoch.
        accumulation_steps: batches of a full window.

    Example:
        >>> [window_scale(batch, num_batches=5, accumulation_steps=2) for batch in range(5)]
        [1.0, 1.0, 1.0, 1.0, 2.0]
    """
    first = batch - batch % accumulation_steps
    return accumulation_steps / min(accumulation_steps, num_batches - first)
