"""``pre_activation``: a stage in front of its last ReLU."""

from __future__ import annotations

import pytest
import timm
import torch

from kdvit.taps.reader import Reader, Request, family_of
from tests import tiny


def read(model: torch.nn.Module, *requests: tuple) -> list[torch.Tensor]:
    reader = Reader(family_of(model, "model"), [Request(*r) for r in requests], (3, 32, 32))
    _, signals = reader.read(tiny.images(2))
    reader.remove()
    return list(signals.values())


@pytest.mark.parametrize("options", [{}, {"act_layer": lambda inplace: torch.nn.ReLU()}], ids=["in place", "copied"])
def test_it_is_the_stage_before_its_relu(options):
    model = tiny.cnn(0, **options)
    for stage in (0, 1, -1, 0.5):
        before, after = read(model, ("pre_activation", stage), ("feature_map", stage))
        assert before.min() < 0 and torch.equal(before.relu(), after)


@pytest.mark.parametrize("make", [tiny.vit, lambda: timm.create_model("convnext_atto", num_classes=5).eval()])
def test_without_a_relu_at_the_end_it_is_the_feature_map(make):
    before, after = read(make(), ("pre_activation", -1), ("feature_map", -1))
    assert torch.equal(before, after)


def test_the_gradient_flows_through_it():
    model = tiny.cnn().train()
    (before,) = read(model, ("pre_activation", 2))
    before.sum().backward()
    assert model.layer2[0].bn2.weight.grad.abs().max() > 0
    assert model.layer3[0].bn1.weight.grad is None


def test_the_model_is_left_alone():
    model = tiny.cnn()
    expected = model(tiny.images(2))
    read(model, ("pre_activation", 1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(tiny.images(2)), expected)
