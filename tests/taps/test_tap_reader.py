"""Requests, what a loss gets of them, descriptions and the probe."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from kdvit.signals import CALLABLE_SIGNALS, SIGNALS, ModelInfo, SignalInfo
from kdvit.taps.probing import probe
from kdvit.taps.reader import AXES, Reader, Request, family_of, model_info, pick, requests_of


def test_requests_of_one_and_of_several_locations():
    assert requests_of("logits", None) == [Request("logits")]
    assert requests_of("tokens", -1) == [Request("tokens", -1)]
    assert requests_of("tokens", "layers.1") == [Request("tokens", "layers.1")]
    assert requests_of("tokens", [0, "b"]) == [Request("tokens", 0), Request("tokens", "b")]
    assert requests_of("tokens", (3,)) == [Request("tokens", 3)]


def test_pick_gives_a_tuple_where_several_were_asked_for():
    values = {Request("tokens", 0): "first", Request("tokens", 1): "second", Request("logits"): "logits"}
    assert pick("logits", None, values) == "logits"
    assert pick("tokens", 1, values) == "second"
    assert pick("tokens", (1, 0), values) == ("second", "first")
    assert pick("tokens", [1], values) == ("second",)


def test_model_info_holds_what_one_loss_asked_for():
    infos = {Request("tokens", i): SignalInfo("tokens", f"blocks.{i}", (5, 8 + i), 1, (2, 2), "m") for i in range(3)}
    infos[Request("logits")] = SignalInfo("logits", "output", (7,), model="m")
    info = model_info("m", 7, {"tokens": (2, 0), "logits": None}, infos, None)
    assert isinstance(info, ModelInfo) and info.name == "m" and info.num_classes == 7
    assert [token.dim for token in info["tokens"]] == [10, 8]
    assert info["logits"].dim == 7
    with pytest.raises(ValueError, match="m: signal 'query' was not read; known here: tokens, logits"):
        info["query"]


def test_every_signal_has_its_axes():
    assert set(AXES) == set(SIGNALS) - set(CALLABLE_SIGNALS)


def test_a_request_is_read_once(make_case):
    case = make_case("vit")
    taps = case.reader("logits", ("tokens", 1), "logits", ("tokens", 1))
    assert taps.requests == (Request("logits"), Request("tokens", 1))
    assert len(taps.taps.points) == 1


def test_descriptions(make_case):
    """Shapes without the batch, prefix and grid: what a loss builds its projectors from."""
    case = make_case("dinov2 registers")
    taps = case.reader(
        ("tokens", 0), ("patch_tokens", 0), ("cls_token", 0), ("feature_map", 0), ("query", 0), ("attention", 1)
    )
    infos = list(taps.describe(taps.read(case.images)[1]).values())
    name = "dinov2 registers"
    assert infos == [
        SignalInfo("tokens", "blocks.0", (9, 24), 5, (2, 2), name),
        SignalInfo("patch_tokens", "blocks.0", (4, 24), 0, (2, 2), name),
        SignalInfo("cls_token", "blocks.0", (24,), 0, None, name),
        SignalInfo("feature_map", "blocks.0", (24, 2, 2), 0, (2, 2), name),
        SignalInfo("query", "blocks.0.attn", (2, 9, 12), 5, (2, 2), name),
        SignalInfo("attention", "blocks.1.attn", (2, 9, 9), 5, (2, 2), name),
    ]
    assert infos[4].num_heads == 2 and infos[4].dim == 12 and infos[3].dim == 24
    more = case.reader("normed_tokens", "normed_patch_tokens", "pooled", "logits", "head", ("tail", -1))
    infos = list(more.describe(more.read(case.images)[1]).values())
    assert infos == [
        SignalInfo("normed_tokens", "norm", (9, 24), 5, (2, 2), name),
        SignalInfo("normed_patch_tokens", "norm", (4, 24), 0, (2, 2), name),
        SignalInfo("pooled", "head", (24,), 0, None, name),
        SignalInfo("logits", "output", (5,), 0, None, name),
        SignalInfo("head", "head", (), 0, None, name),
        SignalInfo("tail", "blocks.1", (), 0, None, name),
    ]


def test_cls_attention_knows_its_prefix(make_case):
    case = make_case("vit")
    taps = case.reader(("cls_attention", 0))
    (info,) = taps.describe(taps.read(case.images)[1]).values()
    assert info == SignalInfo("cls_attention", "blocks.0.attn", (2, 17), 1, (4, 4), "vit")


def test_the_grid_is_that_of_the_images(make_case):
    """One model at two sizes: the grid is computed, never guessed from the number of tokens."""
    model = make_case("dynamic size").model
    for size, grid in (((32, 32), (4, 4)), ((16, 64), (2, 8)), ((64, 16), (8, 2))):
        taps = Reader(family_of(model, "vit"), [Request("feature_map", 1), Request("patch_tokens", 1)], (3, *size))
        _, signals = taps.read(torch.rand(1, 3, *size))
        infos = taps.describe(signals)
        assert [info.grid for info in infos.values()] == [grid, grid]
        taps.remove()


def test_images_of_another_size_than_promised(make_case):
    taps = make_case("dynamic size").reader(("feature_map", 1))
    with pytest.raises(ValueError) as error:
        taps.read(torch.rand(1, 3, 32, 32))
    assert str(error.value) == (
        "tokens_to_map: patch_tokens must have 5x3 = 15 tokens, got 16; "
        "drop the prefix tokens, or pass the grid of this image size."
    )


def test_probe_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.train()
    model[1].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    output = probe(lambda x: (seen.append((x, model.training, torch.is_grad_enabled())), model(x))[1], model, (3, 8, 8))
    ((images, training, graph),) = seen
    assert images.shape == (2, 3, 8, 8) and not images.any() and not training and not graph
    assert output.shape == (2, 4) and not output.requires_grad
    assert [module.training for module in model.modules()] == [True, True, False, True, True, True]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_probe_restores_the_modes_after_an_error():
    model = nn.Linear(3, 2).double().train()
    with pytest.raises(RuntimeError):
        probe(model, model, (3, 8, 9))
    assert model.training
    assert probe(lambda x: x.dtype, model, (1, 2, 2), batch_size=3) == torch.float64


def test_probe_draws_no_random_number_of_the_run():
    """A model that is random in eval mode too (masks, sampled positions) does not shift the run's numbers."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    probe(lambda images: torch.rand(5), nn.Flatten(), (1, 2, 2))
    assert torch.equal(torch.rand(2), expected)


def test_probe_of_a_model_without_parameters():
    assert probe(nn.Flatten(), nn.Flatten(), (1, 2, 2)).shape == (2, 4)


def test_logits_with_and_without_the_distillation_head(make_case):
    """Beside dist_logits, `logits` is the class head alone."""
    case = make_case("deit distilled")
    output, logits, dist_logits = case.read("logits", "dist_logits")
    torch.testing.assert_close((logits + dist_logits) / 2, output)
    assert case.read("logits")[1] is not logits
    output, *pair = case.read("dist_logits", "logits", stop_early=True)
    torch.testing.assert_close(pair, [dist_logits, logits])


def test_other_libraries_are_not_imported():
    """Recognising a model needs its class name alone."""
    code = (
        "import sys, torch, kdvit.taps.reader as reader;"
        "reader.family_of(torch.nn.Flatten(), 'x');"
        "print([name for name in ('timm', 'transformers', 'torchvision') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_registered_families():
    kinds = {
        "TimmViT": timm.create_model("test_vit", img_size=32),
        "TimmStages": timm.create_model("test_resnet"),
        "Family": nn.Flatten(),
    }
    assert {name: type(family_of(model, "x")).__name__ for name, model in kinds.items()} == {n: n for n in kinds}
