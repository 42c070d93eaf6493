"""Accuracy of a model over a loader, on all processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Accuracy:
    """top1 and top5 in percent, the mean cross-entropy in nats, and over how many images."""

    top1: float
    top5: float
    loss: float
    num_images: int


@torch.no_grad()
def evaluate(predict: Callable[[Tensor], Tensor], loader: Iterable[dict], accelerator: Accelerator) -> Accuracy:
    """Accuracy of ``predict`` (images -> logits), which must be in eval mode.

    Args:
        predict: a model, or `Teacher.predict`.
        loader: prepared by ``accelerator``; gives ``image`` and ``label``.
        accelerator: gathers the counts; the images that even out the last batch are not counted twice.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    for batch in loader:
        row = accuracy_rows(predict(batch["image"]).float(), batch["label"])
        totals += accelerator.gather_for_metrics(row).cpu().double().sum(0)
    return accuracy_of(totals)


def accuracy_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, 4) float32, what each image adds to the totals: in the first place, in the first five, cross-entropy, one.

    Sum them on the CPU, in float64: not every device knows it.
    """
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack(
        [
            ranked[:, 0].float(),
            ranked.any(1).float(),
            F.cross_entropy(logits, labels, reduction="none"),
            torch.ones_like(labels, dtype=torch.float32),
        ],
        dim=1,
    )


def accuracy_of(totals: Tensor) -> Accuracy:
    """From the sum of all rows of `accuracy_rows`."""
    top1, top5, loss, count = totals.tolist()
    return Accuracy(100 * top1 / count, 100 * top5 / count, loss / count, int(count))
