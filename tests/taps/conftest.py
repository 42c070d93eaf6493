"""Tiny random models of every kind that the taps read. Every parameter is re-drawn, so that each of them matters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import timm
import torch
from torch import nn

from kdvit.taps.reader import Reader, Request, family_of

VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5)


@dataclass(frozen=True)
class Flavour:
    """How timm makes one kind of transformer, and what must be true of it."""

    model: str
    options: dict
    num_prefix_tokens: int = 1
    grid: tuple[int, int] = (4, 4)
    image_size: tuple[int, int] = (32, 32)
    #: Prefix tokens that the blocks carry; CaiT's class token joins behind them.
    block_prefix: int | None = None
    has_cls_token: bool = True

    @property
    def prefix(self) -> int:
        return self.num_prefix_tokens if self.block_prefix is None else self.block_prefix


def vit(model: str = "vit_tiny_patch16_224", prefix: int = 1, **options) -> Flavour:
    return Flavour(model, VIT | options, prefix)


def patch14(model: str, prefix: int = 1, **options) -> Flavour:
    """The same at 28 pixels in patches of 14."""
    flavour = vit(model, prefix, img_size=28, patch_size=14, **options)
    return replace(flavour, grid=(2, 2), image_size=(28, 28))


DINOV3 = dict(model="vit_small_patch16_dinov3", prefix=5)
FLAVOURS = {
    "vit": vit(),
    "deit": vit("deit_tiny_patch16_224"),
    "deit distilled": vit("deit_tiny_distilled_patch16_224", 2),
    "deit3": vit("deit3_small_patch16_224"),
    "clip": vit("vit_base_patch16_clip_224"),
    "residual post-norm": replace(vit("vit_base_patch16_rpn_224", 0), has_cls_token=False),
    "qk_norm": vit(qk_norm=True),
    "qk_norm distilled LayerScale": vit("deit_tiny_distilled_patch16_224", 2, qk_norm=True, init_values=0.1),
    "qk_norm registers scale_norm": vit(prefix=4, qk_norm=True, scale_attn_norm=True, reg_tokens=3),
    "dinov2 registers": patch14("vit_small_patch14_reg4_dinov2", 5),
    "average pool": vit(global_pool="avg"),
    "no class token": replace(vit(prefix=0, class_token=False, global_pool="avg"), has_cls_token=False),
    "registers without class token": replace(
        vit(prefix=2, class_token=False, reg_tokens=2, global_pool="avg"), has_cls_token=False
    ),
    "attention pool": replace(vit(prefix=0, class_token=False, global_pool="map"), has_cls_token=False),
    "not square": replace(vit(img_size=(32, 48)), grid=(4, 6), image_size=(32, 48)),
    "dynamic size": replace(vit(dynamic_img_size=True), grid=(5, 3), image_size=(40, 24)),
    "eva02 separate": patch14("eva02_tiny_patch14_224"),
    "eva02 fused": patch14("eva02_tiny_patch14_224", qkv_fused=True, scale_attn_inner=True),
    "eva post-norm": patch14("eva02_tiny_patch14_224", use_post_norm=True),
    "eva qk_norm": patch14("eva02_tiny_patch14_224", qk_norm=True, qkv_fused=True),
    "dinov3": vit(**DINOV3),
    "dinov3 qkv bias": vit("vit_small_patch16_dinov3_qkvb", 5, qk_norm=True),
    "dinov3 separate, fixed size": vit(**DINOV3, qkv_fused=False, dynamic_img_size=False),
    "dinov3 dynamic size": replace(vit(**DINOV3), grid=(5, 3), image_size=(40, 24)),
    "grouped query": vit(**DINOV3, attn_type="rope", qkv_fused=False, num_kv_heads=2, num_heads=4, embed_dim=32),
    "mixed rotary": vit("vit_small_patch16_rope_mixed_224"),
    "rotary, fixed size": vit("vit_small_patch16_rope_224", attn_type="rope"),
    "beit": vit("beit_base_patch16_224"),
    "beit average pool": vit("beit_base_patch16_224", use_fc_norm=False, qkv_bias=False),
    "beit shared bias": vit("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "beit both biases": vit("beit_base_patch16_224", use_shared_rel_pos_bias=True),
    "beitv2": vit("beitv2_base_patch16_224", init_values=0.1, global_pool="token"),
    "cait": replace(vit("cait_xxs24_224"), block_prefix=0, has_cls_token=False),
}

STAGES = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)),
    ),
    "pvt v2": ("pvt_v2_b0", dict(depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4))),
    "maxvit": ("test_maxvit", dict(img_size=64)),
    "coatnet": ("test_coatnet", dict(img_size=64)),
    "resnet": ("test_resnet", {}),
    "resnet v2": ("resnetv2_18", dict(channels=(8, 16, 24, 32), layers=(1, 1, 1, 1), stem_chs=8)),
    "resnet18": ("resnet18", dict(channels=(8, 16, 24, 32), layers=(1, 1, 1, 1))),
    "regnety": ("regnety_002", {}),
    "convnext": ("test_convnext", {}),
}


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters and running statistics anew: no norm is an identity, no bias, gamma or table is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.3 * noise + (1.0 if name.endswith(("weight", "gamma_1", "gamma_2", "gamma")) else 0.0))
            elif p.ndim == 2:
                p.copy_(noise * p.shape[1] ** -0.5)
            else:
                p.copy_(noise * (p[0].numel() ** -0.5 if p.ndim == 4 and p.shape[0] > 1 else 0.5))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def images(height: int, width: int, batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(1))


@dataclass
class Case:
    """A model, images for it, and what its flavour promises."""

    name: str
    model: nn.Module
    images: torch.Tensor
    flavour: Flavour | None = None

    def reader(self, *requests: tuple | str, **options) -> Reader:
        asked = [Request(r) if isinstance(r, str) else Request(*r) for r in requests]
        return Reader(family_of(self.model, self.name), asked, tuple(self.images.shape[1:]), **options)

    def read(self, *requests: tuple | str, **options) -> list:
        """The model's output and the signals, in the order asked for; the taps are removed again."""
        reader = self.reader(*requests, **options)
        output, signals = reader.read(self.images)
        reader.remove()
        return [output, *signals.values()]


def timm_case(name: str) -> Case:
    flavour = FLAVOURS[name]
    model = redraw(timm.create_model(flavour.model, **flavour.options))
    return Case(name, model, images(*flavour.image_size), flavour)


def stage_case(name: str) -> Case:
    model, options = STAGES[name]
    return Case(name, redraw(timm.create_model(model, num_classes=5, **options)), images(64, 64))


@pytest.fixture(params=list(FLAVOURS))
def vit_case(request: pytest.FixtureRequest) -> Case:
    """Every flavour of timm's transformers with one token grid."""
    return timm_case(request.param)


@pytest.fixture(params=list(STAGES))
def stages_case(request: pytest.FixtureRequest) -> Case:
    """Every kind of timm model that is made of stages."""
    return stage_case(request.param)


@pytest.fixture
def make_case():
    """Make the case of one name."""
    return lambda name: stage_case(name) if name in STAGES else timm_case(name)


@pytest.fixture
def case_of():
    """Make a case of any model."""
    return lambda name, model, batch: Case(name, model, batch)
