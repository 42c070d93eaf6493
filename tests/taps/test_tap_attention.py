"""query, key, value and attention against what the model's own attention product gets and gives."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kdvit.taps.reader import family_of

EXACT = dict(rtol=1e-6, atol=1e-6)


def products(case, monkeypatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(query, key, value) that each block's fused attention kernel is called with."""
    calls = []
    original = F.scaled_dot_product_attention

    def record(query, key, value, *args, **kwargs):
        calls.append((query, key, value))
        return original(query, key, value, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", record)
        case.model(case.images)
    return calls


class MatrixProducts(TorchFunctionMode):
    """Records the operands of every 4-axes matrix product: CaiT has no fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.matmul, Tensor.__matmul__, torch.matmul) and args[0].ndim == 4:
            self.operands.append(args[:2])
        return func(*args, **(kwargs or {}))


def cait_products(case) -> list[tuple[Tensor, Tensor, Tensor]]:
    with MatrixProducts() as mode, torch.no_grad():
        case.model(case.images)
    scores, values = mode.operands[0::2], mode.operands[1::2]
    scale = case.model.blocks[0].attn.scale
    return [(q / scale, k.transpose(-2, -1), v) for (q, k), (_, v) in zip(scores, values, strict=True)]


def unfused_probabilities(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the softmax of each block gives in a copy of the model without fused kernels."""
    model, caught = copy.deepcopy(model), []
    for block in model.blocks:
        if hasattr(block.attn, "fused_attn"):
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        else:  # CaiT mixes the heads behind the softmax
            block.attn.proj_w.register_forward_pre_hook(lambda module, args: caught.append(args[0].permute(0, 3, 1, 2)))
    with torch.no_grad():
        model(images)
    return caught


def test_query_key_and_value_are_those_of_the_attention_product(vit_case, monkeypatch):
    is_cait = vit_case.name == "cait"
    truth = cait_products(vit_case) if is_cait else products(vit_case, monkeypatch)
    tokens = vit_case.flavour.prefix + vit_case.flavour.grid[0] * vit_case.flavour.grid[1]
    for block in range(len(vit_case.model.blocks)):
        _, query, key, value = vit_case.read(("query", block), ("key", block), ("value", block))
        for read, true in zip((query, key, value), truth[block], strict=True):
            assert read.shape == true.shape and read.shape[2] == tokens
            torch.testing.assert_close(read, true, **EXACT)
    assert not torch.allclose(truth[0][0], truth[1][0], atol=1e-2), "the blocks differ, so a mixed-up index would show"


def test_attention_is_that_of_the_unfused_model(vit_case):
    truth = unfused_probabilities(vit_case.model, vit_case.images)
    for block, true in enumerate(truth):
        _, attention = vit_case.read(("attention", block))
        assert attention.dtype == torch.float32
        assert (attention - true).abs().max() <= 1e-6
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    assert len(truth) == 2
    uniform = 1 / truth[0].shape[-1]
    assert (truth[0] - uniform).abs().max() > 0.02, "attention is not flat, so that the comparison says something"


def test_cls_attention_is_the_first_row(vit_case):
    if not vit_case.flavour.has_cls_token:
        with pytest.raises(ValueError, match="gives no cls_attention at 'blocks.1.attn': it has no class token there"):
            vit_case.reader(("cls_attention", 1))
        return
    _, row, attention = vit_case.read(("cls_attention", 1), ("attention", 1))
    assert row.shape == attention.shape[:2] + attention.shape[3:]
    assert (row - attention[:, :, 0]).abs().max() <= 1e-6


def test_the_model_keeps_its_fused_kernel(make_case, monkeypatch):
    case, reader_calls = make_case("dinov3"), []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: (reader_calls.append(1), original(*a, **k))[1]
    )
    case.read(("attention", 0), ("attention", 1))
    assert len(reader_calls) == 2, "one fused call a block"
    assert all(block.attn.fused_attn for block in case.model.blocks)


@pytest.mark.parametrize(
    "name", ["vit", "qk_norm", "dinov3", "eva02 fused", "beit both biases", "cait", "grouped query"]
)
def test_gradients_of_attention_are_those_of_the_unfused_model(make_case, name):
    """The recomputed probabilities train the projections (and bias tables) as the model's own would."""
    case = make_case(name)
    unfused, caught = copy.deepcopy(case.model), []
    attn = unfused.blocks[1].attn
    if name == "cait":
        attn.proj_w.register_forward_pre_hook(lambda module, args: caught.append(args[0].permute(0, 3, 1, 2)))
    else:
        attn.fused_attn = False
        attn.attn_drop.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    unfused(case.images)
    _, attention = case.read(("attention", 1))
    target = torch.rand(attention.shape, generator=torch.Generator().manual_seed(2))
    (caught[0] * target).sum().backward()
    (attention * target).sum().backward()
    compared = 0
    for (path, p), true in zip(case.model.named_parameters(), unfused.parameters(), strict=True):
        if p.grad is None:  # BEiT joins the biases of query, key and value; the value's then gets a gradient of 0
            assert true.grad is None or not true.grad.any(), path
        else:
            torch.testing.assert_close(p.grad, true.grad, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared > 10


def test_attention_stays_float32_under_autocast(make_case):
    """Autocast rounds matrix products to bfloat16; the scores of the fused kernel are not rounded."""
    for name in ("vit", "cait"):
        case = make_case(name)
        _, true = case.read(("attention", 0))
        with torch.autocast("cpu", torch.bfloat16):
            _, query, key, attention = case.read(("query", 0), ("key", 0), ("attention", 0))
        assert query.dtype == torch.bfloat16 and attention.dtype == torch.float32
        scores = query.float() @ key.float().transpose(-2, -1) * case.model.blocks[0].attn.scale
        if name == "cait":
            scores = F.linear(scores.permute(0, 2, 3, 1), *case.model.blocks[0].attn.proj_l.parameters())
            scores = scores.permute(0, 3, 1, 2)
        torch.testing.assert_close(attention, scores.softmax(-1), **EXACT)
        assert (attention - true).abs().max() < 0.05


def test_attention_of_a_half_precision_model_is_float32(make_case):
    for name in ("dinov3", "beit", "cait"):
        case = make_case(name)
        _, true = case.read(("attention", 1))
        case.model.to(torch.bfloat16)
        case.images = case.images.to(torch.bfloat16)
        _, attention = case.read(("attention", 1))
        assert attention.dtype == torch.float32
        assert (attention - true).abs().max() < 0.1


def test_attention_of_a_double_model_is_double(make_case):
    case = make_case("beit")
    case.model.double()
    case.images = case.images.double()
    truth = unfused_probabilities(case.model, case.images)
    _, attention = case.read(("attention", 1))
    assert attention.dtype == torch.float64
    torch.testing.assert_close(attention, truth[1], rtol=0, atol=1e-14)


def test_a_causal_mask_and_an_additive_mask_are_followed(make_case):
    """Whatever the block hands to its attention is part of the probabilities."""
    case = make_case("vit")
    tokens = 17
    mask = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(3)) > 0.3
    mask.fill_diagonal_(True)
    for kwargs in ({"attn_mask": mask}, {"attn_mask": torch.where(mask, 0.5, -2.0)}, {"is_causal": True}):
        unfused, caught = copy.deepcopy(case.model), []
        for block in unfused.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_pre_hook(lambda module, args, caught=caught: caught.append(args[0]))
        with torch.no_grad():
            unfused(case.images, **kwargs)
        reader = case.reader(("attention", 1), ("cls_attention", 1))
        masked = _WithMask(case.model, kwargs)
        _, found = reader.taps.run(masked, case.images)
        for request, true in zip(reader.requests, (caught[1], caught[1][:, :, 0]), strict=True):
            source = reader.sources[request]
            attention = source.compute(*(found[point] for point in source.points))
            assert (attention - true).abs().max() <= 1e-6
        reader.remove()


class _WithMask(nn.Module):
    def __init__(self, model: nn.Module, kwargs: dict) -> None:
        super().__init__()
        self.model, self.kwargs = model, kwargs

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, **self.kwargs)


@pytest.mark.parametrize(
    ("model", "cls"),
    [
        ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "DiffAttention"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
    ],
)
def test_an_attention_that_is_not_known_is_refused(model, cls):
    tiny = timm.create_model(model, img_size=32, depth=2, embed_dim=24, num_heads=2)
    with pytest.raises(ValueError) as error:
        family_of(tiny, "teacher").source("attention", 1, None)
    where = "blocks.1.attn" if cls == "DiffAttention" else "blocks.1"
    assert str(error.value) == (
        f"teacher gives no attention at '{where}': kdvit cannot read the attention of {cls} exactly; "
        "choose another model, or a loss that reads tokens."
    )


def test_an_attention_class_of_the_users_own_is_refused(make_case):
    case = make_case("vit")
    known = type(case.model.blocks[0].attn)
    case.model.blocks[0].attn.__class__ = type("MyAttention", (known,), {})
    with pytest.raises(ValueError, match="cannot read the attention of MyAttention exactly"):
        case.reader(("query", 0))
    assert case.reader(("query", 1)).sources
