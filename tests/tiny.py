"""Tiny models with weights that all matter, for tests and for the worker of the two-process tests."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

NUM_CLASSES = 5


def redraw(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew from a seed: no scale is 1, no bias 0, and the result is the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_scale = p.ndim == 1 and name.endswith("weight")
            p.copy_(1 + 0.2 * noise if is_scale else noise * (0.2 if p.ndim == 1 else p[0].numel() ** -0.5))
    return model


def vit(seed: int = 0, model: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    """A timm ViT for 32 pixels in a 4x4 grid, in eval mode."""
    facts = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=NUM_CLASSES)
    return redraw(timm.create_model(model, **facts | options), seed).eval()


def distilled_vit(seed: int = 0, **options) -> nn.Module:
    """The same with a distillation token and head."""
    return vit(seed, "deit_tiny_distilled_patch16_224", **options)


def cnn(seed: int = 0, **options) -> nn.Module:
    """A timm ResNet with BatchNorm and stages of 8, 16, 24 and 32 channels, in eval mode."""
    facts = dict(channels=(8, 16, 24, 32), layers=(1, 1, 1, 1), num_classes=NUM_CLASSES)
    return redraw(timm.create_model("resnet18", **facts | options), seed).eval()


def plain(seed: int = 0, num_classes: int = NUM_CLASSES) -> nn.Module:
    """A module that says nothing of itself."""
    layers = nn.Conv2d(3, 6, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes)
    return redraw(nn.Sequential(*layers), seed).eval()


def images(batch_size: int = 4, channels: int = 3, size: tuple[int, int] = (32, 32), seed: int = 1) -> Tensor:
    """Normal noise."""
    return torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(seed))


def labels(batch_size: int = 4) -> Tensor:
    """0, 1, 2, ... modulo the classes."""
    return torch.arange(batch_size) % NUM_CLASSES
