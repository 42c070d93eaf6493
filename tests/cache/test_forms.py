"""Each form by hand, there and back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdvit.cache.forms import Form, Projected, choose_forms, make_form
from kdvit.signals import SignalInfo

LOGITS = SignalInfo("logits", "output", (6,), model="wide")
TOKENS = SignalInfo("tokens", "blocks.1", (5, 8), num_prefix_tokens=1, grid=(2, 2), model="wide")
MAP = SignalInfo("feature_map", "layer4", (8, 2, 3), grid=(2, 3), model="wide")
ATTENTION = SignalInfo("attention", "blocks.1.attn", (2, 5, 5), num_prefix_tokens=1, model="wide")
POOLED = SignalInfo("pooled", "head", (8,), model="wide")
ALL = (LOGITS, TOKENS, MAP, ATTENTION, POOLED)


def signal(info: SignalInfo, batch: int = 4, scale: float = 3.0) -> Tensor:
    x = torch.randn(batch, *info.shape, generator=torch.Generator().manual_seed(0)) * scale
    return x.softmax(-1) if info.signal == "attention" else x


def there_and_back(form: Form, x: Tensor) -> Tensor:
    parts = form.encode(x)
    layout = form.layout()
    assert {name: (tuple(part.shape[1:]), part.dtype) for name, part in parts.items()} == layout
    assert form.num_bytes == sum(part[0].numel() * part.element_size() for part in parts.values())
    back = form.decode(parts)
    assert back.dtype == torch.float32 and back.shape == (len(x), *form.info.shape)
    return back


@pytest.mark.parametrize("info", ALL, ids=lambda info: info.signal)
def test_fp32_is_exact(info):
    x = signal(info)
    assert torch.equal(there_and_back(make_form("fp32", info), x), x)


@pytest.mark.parametrize("info", ALL, ids=lambda info: info.signal)
def test_fp16_rounds_to_the_nearest(info):
    x = signal(info, scale=30.0)
    back = there_and_back(make_form("fp16", info), x)
    # 11 significant bits: at most half a unit in the last place, 2^-11 of the value; 2^-25 where it is subnormal.
    assert ((back - x).abs() <= torch.maximum(x.abs() * 2**-11, torch.tensor(2.0**-25))).all()
    assert not torch.equal(back, x)


def test_fp16_refuses_what_it_cannot_hold():
    x = signal(POOLED)
    x[2, 3] = -7e4
    message = (
        "cache: pooled of 'wide' at 'head' must be within 65504 to be stored in fp16, got 70000; store it as fp32: "
        "--form pooled=fp32."
    )
    with pytest.raises(ValueError) as caught:
        make_form("fp16", POOLED).encode(x)
    assert str(caught.value) == message
    x[2, 3] = -65504
    assert make_form("fp16", POOLED).decode(make_form("fp16", POOLED).encode(x))[2, 3] == -65504


def test_int8_by_hand():
    info = SignalInfo("tokens", "blocks.0", (2, 3))
    form = make_form("int8", info)
    parts = form.encode(torch.tensor([[[1.27, -0.014, 0.0], [0.0, 0.0, 0.0]]]))
    assert parts["value"].tolist() == [[[127, -1, 0], [0, 0, 0]]]
    torch.testing.assert_close(parts["scale"][0, 0], torch.tensor([0.01]))
    torch.testing.assert_close(form.decode(parts), torch.tensor([[[1.27, -0.01, 0.0], [0.0, 0.0, 0.0]]]))


@pytest.mark.parametrize(("info", "axis"), [(TOKENS, 2), (ATTENTION, 3), (POOLED, 1), (MAP, 1)], ids=str)
def test_int8_has_a_scale_for_each_token(info, axis):
    """A large token takes nothing from the precision of the others; of a map, a position is a token."""
    x = signal(info)
    x.select(1 if axis > 1 else 0, 0).mul_(1000)  # one token; of a map one channel, so each position has its own range
    error = (there_and_back(make_form("int8", info), x) - x).abs()
    # Half a step of max |x| / 127, and a hair for the division and the product in float32.
    assert (error <= x.abs().amax(dim=axis, keepdim=True) / 254 * 1.0001).all()
    scale = make_form("int8", info).encode(x)["scale"]
    assert scale.numel() == x.numel() / x.shape[axis]


def test_int8_of_tiny_numbers_is_finite():
    form = make_form("int8", POOLED)
    back = there_and_back(form, torch.full((1, 8), 1e-44))
    assert back.isfinite().all() and (back.abs() <= 1e-36).all()


def test_top_k_by_hand():
    """Two of six classes are kept; the others have e^0 + e^0 + e^1 + e^1 between them."""
    logits = torch.tensor([[5.0, 0.0, 1.0, 7.0, 0.0, 1.0]])
    form = make_form("top2", LOGITS)
    parts = form.encode(logits)
    assert parts["value"].tolist() == [[7.0, 5.0]] and parts["class"].tolist() == [[3, 0]]
    rest = math.log(2 + 2 * math.e)
    assert parts["rest"].item() == pytest.approx(rest, rel=1e-6)
    back = there_and_back(form, logits)
    each = rest - math.log(4)
    torch.testing.assert_close(back, torch.tensor([[5.0, each, each, 7.0, each, each]]))
    # Nothing is lost as a whole: both classes have the probability that they had.
    torch.testing.assert_close(back.softmax(1)[0, [0, 3]], logits.softmax(1)[0, [0, 3]])


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0, 10000.0])
def test_top_k_is_finite_and_keeps_the_mass(k, scale):
    """Also where the rest is as good as nothing, and where there is no rest."""
    logits = signal(LOGITS, scale=1.0).clamp(-6, 6) * scale
    back = there_and_back(make_form(f"top{k}", LOGITS), logits)
    assert back.isfinite().all()
    top = logits.topk(k, dim=1).indices
    assert torch.equal(back.gather(1, top), logits.gather(1, top).half().float())
    # A logit's rounding, 2^-11 of it, is the relative error of its probability.
    tolerance = 2 * max(logits.abs().max().item() * 2**-11, 1e-6)
    torch.testing.assert_close(
        back.softmax(1).gather(1, top).sum(1), logits.softmax(1).gather(1, top).sum(1), rtol=tolerance, atol=1e-6
    )


def test_top_k_takes_more_classes_than_16_bits_name():
    info = SignalInfo("logits", "output", (40_000,))
    x = torch.zeros(1, 40_000)
    x[0, 39_999] = 9.0
    form = make_form("top1", info)
    assert form.layout()["class"][1] == torch.int32 and there_and_back(form, x)[0].argmax() == 39_999
    assert make_form("top1", LOGITS).layout()["class"][1] == torch.int16


@pytest.mark.parametrize("info", [TOKENS, MAP, POOLED], ids=lambda info: info.signal)
def test_projection_keeps_inner_products_of_full_width(info):
    form = make_form("project8", info)
    assert isinstance(form, Projected)
    x, matrix = signal(info), form.draw()
    assert torch.equal(matrix, make_form("project8", info).draw())  # drawn once and for all
    projected = form.project(x, matrix)
    channels_last = (lambda y: y.movedim(1, -1)) if info is MAP else (lambda y: y)
    ours, theirs = channels_last(projected).flatten(0, -2), channels_last(x).flatten(0, -2)
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=1e-4, atol=1e-3)
    assert form.decode(form.encode(projected)).shape == x.shape


def test_projection_makes_the_teacher_narrower():
    form = make_form("project4", MAP)
    assert form.info.shape == (4, 2, 3) and form.info.dim == 4 and form.info.grid == (2, 3)
    assert make_form("project4", TOKENS).info.shape == (5, 4)
    matrix = form.draw()
    torch.testing.assert_close(matrix.T @ matrix, 2 * torch.eye(4))  # 8 / 4: lengths stay what they are in the mean


@pytest.mark.parametrize(
    ("text", "info", "message"),
    [
        ("fp8", LOGITS, "form must be one of fp16, fp32, int8, top<k> (such as top10) and project<k>"),
        ("top", LOGITS, "form must be one of"),
        ("top7", LOGITS, "k must be in 1..6, the number of classes"),
        ("top0", LOGITS, "k must be in 1..6, the number of classes"),
        ("top2", TOKENS, "does not suit tokens of shape (5, 8): it is for logits"),
        ("int8", LOGITS, "does not suit logits of shape (6,): 8 bits are too few for logits"),
        ("project4", ATTENTION, "it is for tokens, maps and pooled features"),
        ("project9", TOKENS, "k must be in 1..8, the width"),
    ],
)
def test_forms_that_do_not_suit(text, info, message):
    with pytest.raises(ValueError) as caught:
        make_form(text, info)
    assert message in str(caught.value) and str(caught.value).startswith("cache: form ")


@pytest.mark.parametrize(
    ("texts", "forms"),
    [
        ("fp16", ["fp16"] * 5),
        ("top3", ["top3", "fp16", "fp16", "fp16", "fp16"]),
        ("int8", ["fp16", "int8", "int8", "int8", "int8"]),
        (("int8", "top3"), ["top3", "int8", "int8", "int8", "int8"]),
        ("project4", ["fp16", "project4", "project4", "fp16", "project4"]),
        (("logits=top2", "int8", "feature_map=fp32"), ["top2", "int8", "fp32", "int8", "int8"]),
    ],
)
def test_one_form_for_all_that_it_suits(texts, forms):
    assert [form.text for form in choose_forms(texts, ALL)] == forms


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("int8", "fp16"), "form must be given once, got int8 and fp16 for tokens; write tokens=FORM"),
        (("logits=fp16", "logits=fp32"), "form must be given once, got two for logits"),
        ("query=fp16", "form must name a signal that the losses read, got 'query'; they read logits, tokens, feature"),
        ("top9", "k must be in 1..6"),
        ("tokens=top3", "does not suit tokens"),
        (
            "logits=",
            "form must be one of fp16, fp32, int8, top<k> (such as top10) and project<k> (such as project64), got",
        ),
    ],
)
def test_choices_that_cannot_be_made(texts, message):
    with pytest.raises(ValueError) as caught:
        choose_forms(texts, ALL)
    assert message in str(caught.value)
