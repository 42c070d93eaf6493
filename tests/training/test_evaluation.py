"""Accuracy worked out by hand."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from kdvit.training import Accuracy, evaluate


def loader(logits: Tensor, labels: Tensor, batch_size: int):
    """The logits are the images, so that `predict` is the identity."""
    rows = [{"image": row, "label": label} for row, label in zip(logits, labels, strict=True)]
    return Accelerator().prepare(torch.utils.data.DataLoader(rows, batch_size=batch_size))


def test_top1_top5_and_loss():
    scores = torch.arange(7.0).repeat(4, 1)  # ranks: 6, 5, 4, 3, 2, then 1 and 0
    labels = torch.tensor([6, 5, 2, 1])
    found = evaluate(lambda images: images, loader(scores, labels, batch_size=3), Accelerator())
    partition = math.log(sum(math.exp(value) for value in range(7)))
    loss = sum(partition - label for label in labels.tolist()) / 4
    assert (found.top1, found.top5, found.num_images) == (25.0, 75.0, 4)
    assert abs(found.loss - loss) < 1e-6


def test_fewer_than_five_classes():
    labels = torch.tensor([0, 1, 1])
    found = evaluate(lambda images: images, loader(torch.eye(2)[[0, 0, 1]], labels, batch_size=2), Accelerator())
    assert found.top5 == 100.0 and abs(found.top1 - 200 / 3) < 1e-9


def test_half_precision_logits_are_scored_in_float32():
    labels = torch.tensor([0, 1])
    found = evaluate(lambda images: images.half(), loader(1e4 * torch.eye(2), labels, batch_size=2), Accelerator())
    assert found == Accuracy(100.0, 100.0, 0.0, 2)


def test_predictions_build_no_graph():
    weight = torch.ones(2, requires_grad=True)
    seen = []
    evaluate(
        lambda images: seen.append(images * weight) or seen[-1],
        loader(torch.eye(2), torch.tensor([0, 1]), 2),
        Accelerator(),
    )
    assert not seen[0].requires_grad
