"""Tokens, maps, pooled features, head and tail of timm's transformers against timm's own functions."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from kdvit.taps.reader import Reader, Request, family_of

CLOSE = dict(rtol=1e-5, atol=1e-5)


def test_the_family_knows_prefix_grid_and_size(vit_case):
    family = family_of(vit_case.model, vit_case.name)
    assert type(family).__name__ == "TimmViT"
    assert family.num_blocks() == 2
    assert family.num_prefix_tokens == vit_case.flavour.prefix
    assert family.has_cls_token is vit_case.flavour.has_cls_token
    assert family.grid(tuple(vit_case.images.shape[1:])) == vit_case.flavour.grid
    channels, height, width = family.input_size()
    assert channels == 3
    assert family.takes_any_size() or (height, width) == vit_case.flavour.image_size


@torch.no_grad()  # the kernel differs with a graph, by the last bit
def test_tokens_are_timms_intermediates(vit_case):
    flavour, model, images = vit_case.flavour, vit_case.model, vit_case.images
    is_cait = vit_case.name == "cait"
    options = {} if is_cait else dict(return_prefix_tokens=bool(flavour.num_prefix_tokens))
    flat = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True, **options)
    maps = model.forward_intermediates(images, intermediates_only=True)
    for block in range(2):
        patches, prefix = flat[block] if options.get("return_prefix_tokens") else (flat[block], None)
        whole = patches if prefix is None else torch.cat((prefix, patches), dim=1)
        _, tokens, patch_tokens, feature_map = vit_case.read(
            ("tokens", block), ("patch_tokens", block - 2), ("feature_map", block)
        )
        torch.testing.assert_close(tokens, whole, rtol=0, atol=0)
        torch.testing.assert_close(patch_tokens, patches, rtol=0, atol=0)
        torch.testing.assert_close(feature_map, maps[block], rtol=0, atol=0)
        assert tokens.shape[1] == flavour.prefix + flavour.grid[0] * flavour.grid[1]
        assert feature_map.shape[-2:] == flavour.grid
        if flavour.has_cls_token:
            _, cls_token = vit_case.read(("cls_token", block))
            torch.testing.assert_close(cls_token, prefix[:, 0], rtol=0, atol=0)


def test_a_class_token_that_is_not_there_is_refused(vit_case):
    """Registers are prefix tokens, but the first of them is no class token."""
    if vit_case.flavour.has_cls_token:
        assert vit_case.reader(("cls_token", 0)).requests == (Request("cls_token", 0),)
        return
    with pytest.raises(ValueError) as error:
        vit_case.reader(("cls_token", 0))
    assert str(error.value) == (
        f"{vit_case.name} gives no cls_token at 'blocks.0': it has no class token there; read patch_tokens instead."
    )
    assert "cls_token" not in "".join(family_of(vit_case.model, "x").gives())


@torch.no_grad()  # the kernel differs with a graph, by the last bit
def test_normed_tokens_are_timms_features(vit_case):
    flavour = vit_case.flavour
    features = vit_case.model.forward_features(vit_case.images)
    _, tokens, patch_tokens = vit_case.read("normed_tokens", "normed_patch_tokens")
    torch.testing.assert_close(tokens, features, rtol=0, atol=0)
    torch.testing.assert_close(patch_tokens, features[:, flavour.num_prefix_tokens :], rtol=0, atol=0)
    assert patch_tokens.shape[1] == flavour.grid[0] * flavour.grid[1]
    if vit_case.model.cls_token is not None:
        _, cls_token = vit_case.read("normed_cls_token")
        torch.testing.assert_close(cls_token, features[:, 0], rtol=0, atol=0)
    else:
        with pytest.raises(ValueError, match="gives no cls_token at 'norm': it has no class token there"):
            vit_case.reader("normed_cls_token")


@torch.no_grad()  # the kernel differs with a graph, by the last bit
def test_pooled_and_head_are_timms(vit_case):
    model, images = vit_case.model, vit_case.images
    pre_logits = model.forward_head(model.forward_features(images), pre_logits=True)
    logits = model(images)
    output, pooled, head, read_logits = vit_case.read("pooled", "head", "logits")
    torch.testing.assert_close(output, logits, rtol=0, atol=0)
    torch.testing.assert_close(read_logits, logits, rtol=0, atol=0)
    if hasattr(model, "head_dist"):  # the model's logits are the mean of two heads; `head` is the class head
        _, class_logits, dist_logits = vit_case.read("logits", "dist_logits")
        torch.testing.assert_close(head(pooled), class_logits)
        torch.testing.assert_close((class_logits + dist_logits) / 2, logits)
        assert not torch.allclose(class_logits, dist_logits)
    else:
        torch.testing.assert_close(pooled, pre_logits, rtol=0, atol=0)
        torch.testing.assert_close(head(pooled), logits)
        with pytest.raises(ValueError, match=f"{vit_case.name} gives no dist_logits: it has no distillation head"):
            vit_case.reader("dist_logits")


def test_tail_is_the_rest_of_the_model(vit_case):
    with torch.no_grad():
        logits = vit_case.model(vit_case.images)
    for block in range(2):
        _, tokens, tail = vit_case.read(("tokens", block), ("tail", block))
        torch.testing.assert_close(tail(tokens), logits, **CLOSE)
        assert not torch.allclose(tail(tokens.roll(1, dims=0)), logits, atol=1e-2)


def test_gradients_flow_through_a_frozen_tail_and_head(vit_case):
    vit_case.model.requires_grad_(False)
    _, tokens, tail, pooled, head = vit_case.read(("tokens", 0), ("tail", 0), "pooled", "head")
    for x, rest in ((tokens, tail), (pooled, head)):
        x = x.clone().requires_grad_()
        rest(x).square().sum().backward()
        assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in vit_case.model.parameters())


def test_distilled_logits_in_training_mode(make_case):
    """timm returns both heads only when told to; the two signals are the same either way."""
    case = make_case("deit distilled")
    case.model.train()
    plain = case.read("logits", "dist_logits")
    case.model.set_distilled_training(True)
    pair, class_logits, dist_logits = case.read("logits", "dist_logits")
    torch.testing.assert_close(pair[0], class_logits)
    torch.testing.assert_close(pair[1], dist_logits)
    torch.testing.assert_close(plain[1:], [class_logits, dist_logits])
    _, mean, tokens, tail = case.read("logits", ("tokens", 1), ("tail", 1))
    torch.testing.assert_close(mean, (class_logits + dist_logits) / 2)
    torch.testing.assert_close(tail(tokens), mean, **CLOSE)


def test_classes_built_without_the_factory():
    """Nothing but the patch embedding says what images such a model takes."""
    tiny = dict(img_size=(32, 48), patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=3, in_chans=1)
    families = 0
    for cls in (
        timm.models.vision_transformer.VisionTransformer,
        timm.models.eva.Eva,
        timm.models.beit.Beit,
        timm.models.cait.Cait,
    ):
        model = cls(**tiny).eval()
        family = family_of(model, cls.__name__)
        assert family.input_size() == (1, 32, 48)
        assert family.takes_any_size() is False
        assert family.normalisation() is None
        assert family.grid(None) == (2, 3)
        images = torch.rand(2, 1, 32, 48)
        reader = Reader(family, [Request("tokens", 0), Request("tail", 0), Request("attention", -1)], (1, 32, 48))
        logits, signals = reader.read(images)
        tokens, tail, attention = signals.values()
        torch.testing.assert_close(tail(tokens), logits, **CLOSE)
        assert attention.shape[-1] == tokens.shape[1]
        families += 1
    assert families == 4
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=64, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
    )
    assert family_of(swin, "swin").input_size() == (3, 64, 64)
    assert family_of(timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1)), "r").input_size() is None


def test_facts_of_a_model_from_the_factory(make_case):
    family = family_of(make_case("clip").model, "clip")
    assert family.input_size() == (3, 32, 32)
    mean, std = family.normalisation()
    assert mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert std == pytest.approx((0.2686, 0.2613, 0.2758), abs=1e-4)
    resized = make_case("vit").model
    resized.set_input_size((64, 32))
    family = family_of(resized, "vit")
    assert family.input_size() == (3, 64, 32) and family.grid(None) == (8, 4)


def test_a_subclass_is_read_like_its_class():
    class Mine(timm.models.vision_transformer.VisionTransformer):
        pass

    model = Mine(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    assert type(family_of(model, "mine")).__name__ == "TimmViT"


def test_a_model_without_classifier_gives_features(make_case):
    case = make_case("vit")
    case.model.reset_classifier(0)
    output, pooled, head = case.read("pooled", "head")
    torch.testing.assert_close(output, pooled)
    assert isinstance(head, nn.Identity)


def test_cait_without_its_class_blocks():
    model = timm.create_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)
    model.prune_intermediate_layers(1)
    reader = Reader(family_of(model.eval(), "cait"), [Request("tokens", -1), Request("normed_tokens")], (3, 32, 32))
    _, signals = reader.read(torch.rand(1, 3, 32, 32))
    assert [value.shape for value in signals.values()] == [(1, 16, 24)] * 2
    with pytest.raises(ValueError, match="it has no class token there"):
        reader.family.source("normed_cls_token", None, None)
