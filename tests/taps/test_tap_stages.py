"""Hierarchical transformers and CNNs: stages, pooled features and head against timm's own functions."""

from __future__ import annotations

import pytest
import timm
import torch

from kdvit.taps.reader import family_of


@torch.no_grad()
def test_feature_maps_are_timms_intermediates(stages_case):
    maps = stages_case.model.forward_intermediates(stages_case.images, intermediates_only=True)
    family = family_of(stages_case.model, stages_case.name)
    assert type(family).__name__ == "TimmStages"
    assert family.num_blocks() == len(maps) >= 4
    for stage, true in enumerate(maps):
        _, by_index, by_end, by_path = stages_case.read(
            ("feature_map", stage), ("feature_map", stage - len(maps)), ("feature_map", family.stages[stage])
        )
        assert by_index.shape == true.shape and by_index.shape[1] == stages_case.model.feature_info[stage]["num_chs"]
        torch.testing.assert_close(by_index, true, rtol=0, atol=0)
        torch.testing.assert_close(by_end, true, rtol=0, atol=0)
        torch.testing.assert_close(by_path, true, rtol=0, atol=0)


@torch.no_grad()
def test_pooled_and_head_are_timms(stages_case):
    model, images = stages_case.model, stages_case.images
    logits = model(images)
    pre_logits = model.forward_head(model.forward_features(images), pre_logits=True)
    output, pooled, head, read_logits = stages_case.read("pooled", "head", "logits")
    torch.testing.assert_close(output, logits, rtol=0, atol=0)
    torch.testing.assert_close(read_logits, logits, rtol=0, atol=0)
    torch.testing.assert_close(pooled, pre_logits, rtol=0, atol=0)
    torch.testing.assert_close(head(pooled), logits)


def test_geometry_is_described(stages_case):
    reader = stages_case.reader(("feature_map", -1), "pooled", "head")
    _, signals = reader.read(stages_case.images)
    last, pooled, head = reader.describe(signals).values()
    width = stages_case.model.feature_info[-1]["num_chs"]
    assert last.shape == (width, 2, 2) and last.dim == width and last.grid == (2, 2)
    assert last.location == stages_case.model.feature_info[-1]["module"]
    assert pooled.shape == (stages_case.model.head_hidden_size,) and pooled.grid is None
    assert head.shape == () and head.model == stages_case.name


@pytest.mark.parametrize("signal", ["attention", "cls_attention", "query", "key", "value"])
def test_attention_is_refused(stages_case, signal):
    with pytest.raises(ValueError) as error:
        stages_case.reader((signal, 1))
    assert str(error.value) == (
        f"{stages_case.name} gives no {signal} at 1: it is a model of stages without token attention over one grid; "
        "choose a transformer (a timm or Hugging Face ViT, DeiT, DINO, BEiT, Eva, CaiT) or another loss."
    )


@pytest.mark.parametrize("request_", [("tokens", 0), ("cls_token", 0), ("tail", 0), ("normed_tokens", None)])
def test_token_signals_are_refused(make_case, request_):
    signal, stage = request_
    where = "" if stage is None else f" at {stage}"
    with pytest.raises(ValueError) as error:
        make_case("convnext").reader(request_)
    assert str(error.value) == (
        f"convnext gives no {signal}{where}: it is a model of stages and gives logits, dense_logits, pooled, head; "
        "feature_map, pre_activation of stages 0..3; tokens, patch_tokens, feature_map of a dotted module path."
    )


def test_an_unknown_stage_is_refused(make_case):
    case = make_case("convnext")
    with pytest.raises(ValueError) as error:
        case.reader(("feature_map", 4))
    assert str(error.value) == (
        "convnext: stage must be in 0..3 (or -4..-1 from the end), got 4; the model has 4 stages."
    )
    with pytest.raises(ValueError, match="stage must be an index, .* path, got None; it has 4 stages"):
        case.reader(("feature_map", None))


def test_a_path_inside_a_channels_last_model(make_case):
    """Swin's blocks give (B, h, w, D): nobody may take that for (B, D, h, w)."""
    with pytest.raises(ValueError) as error:
        make_case("swin").reader(("feature_map", "layers.0.blocks.0"))
    assert str(error.value) == (
        "swin gives no feature_map at 'layers.0.blocks.0': inside this model maps are channels-last; "
        "read a stage, 0..3."
    )
    case = make_case("convnext")
    _, inside, stage = case.read(("feature_map", "stages.0.blocks.0"), ("feature_map", 0))
    assert inside.shape == stage.shape


def test_token_outputs_of_other_architectures(case_of):
    """XCiT's blocks give tokens: no map by index, but tokens by path."""
    model = timm.create_model("xcit_nano_12_p16_224", img_size=32, depth=2, num_classes=3)
    case = case_of("xcit", model.eval(), torch.rand(1, 3, 32, 32))
    taps = case.reader(("feature_map", 1))
    with pytest.raises(ValueError, match=r"xcit: feature_map at 'blocks.1' must be a tensor with 4 axes, got shape"):
        taps.describe(taps.read(case.images)[1])
    assert case.read(("tokens", "blocks.1"))[1].shape == (1, 4, 128)


@torch.no_grad()
def test_channels_last_stages_that_do_not_say_so(case_of):
    """SAM's blocks give (B, h, w, D) as Swin's do, but timm's class has no output_fmt."""
    model = timm.create_model(
        "samvit_base_patch16_224", img_size=64, embed_dim=24, depth=2, num_heads=2, global_attn_indexes=(1,)
    )
    case = case_of("sam", model.eval(), torch.rand(1, 3, 64, 64))
    maps = model.forward_intermediates(case.images, intermediates_only=True)
    for stage in range(2):
        assert torch.equal(case.read(("feature_map", stage))[1], maps[stage])


def test_a_map_of_another_layout_is_refused(make_case):
    """What timm says of a stage's width is checked, so that no other layout passes for channels first."""
    case = make_case("convnext")
    case.model.feature_info[1]["num_chs"] = 7
    with pytest.raises(ValueError) as error:
        case.read(("feature_map", 1))
    assert str(error.value) == (
        "convnext: feature_map of stage 1 must have 7 channels, got shape (2, 32, 8, 8) at 'stages.1'; "
        "choose another stage, or a module path."
    )


def test_feature_info_that_names_no_module(case_of):
    model = timm.create_model("twins_svt_small", img_size=32, depths=(1, 1, 1, 1), num_classes=3)
    with pytest.raises(ValueError, match="twins: module path must exist, got 'block.0'; did you mean 'blocks.0'"):
        case_of("twins", model, torch.rand(1, 3, 32, 32)).reader(("feature_map", 0))


def test_sizes(make_case):
    assert family_of(make_case("swin").model, "swin").takes_any_size() is False
    assert family_of(make_case("resnet18").model, "resnet18").takes_any_size() is True
    plain = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1))
    assert family_of(plain, "plain").takes_any_size() is True
