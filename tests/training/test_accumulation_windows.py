"""Accumulated batches through the Trainer: the same weights as with the large batch."""

from __future__ import annotations

import pytest
import torch

from kdvit.training.accumulation import window_scale
from tests.training.conftest import distiller

#: Plain gradient descent: AdamW would hide the length of a gradient.
SETTINGS = {"optimizer": "momentum", "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "warmup_epochs": 0.0}


def weights_of(make_trainer, **options) -> dict[str, torch.Tensor]:
    subject = distiller(["dkd", "tinymim"])
    make_trainer(subject, **{**SETTINGS, **options}).fit()
    return {name: p.detach().clone() for name, p in subject.named_parameters()}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_full_windows_equal_the_large_batch(make_trainer):
    initial = {name: p.detach().clone() for name, p in distiller(["dkd", "tinymim"]).named_parameters()}
    large = weights_of(make_trainer, batch_size=16)
    small = weights_of(make_trainer, batch_size=8, accumulation_steps=2)
    assert distance(large, initial) > 0.1
    assert distance(small, large) < 1e-5
    assert distance(weights_of(make_trainer, batch_size=8, accumulation_steps=1), large) > 1e-2  # it would notice


def test_a_window_that_ends_with_the_epoch_is_the_mean_of_its_own_batches(make_trainer, tiny_data):
    data = tiny_data.subset(16, 32)
    alone = weights_of(make_trainer, data=data, batch_size=16)
    assert distance(weights_of(make_trainer, data=data, batch_size=16, accumulation_steps=3), alone) < 1e-6


@pytest.mark.parametrize("num_batches, accumulation_steps", [(4, 2), (5, 2), (7, 3), (2, 5), (3, 1)])
def test_the_scales_of_a_window_make_its_mean(num_batches, accumulation_steps):
    scales = [window_scale(batch, num_batches, accumulation_steps) for batch in range(num_batches)]
    for first in range(0, num_batches, accumulation_steps):
        window = scales[first : first + accumulation_steps]
        assert sum(window) / accumulation_steps == pytest.approx(1.0) and len(set(window)) == 1
