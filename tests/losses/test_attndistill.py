from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses import AttnDistill
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import GoldenCase, assert_close, golden

CASES = golden("feature_attndistill")
LOSSES = {name: case for name, case in CASES.items() if name.startswith("loss")}
PROJECTORS = {name: case for name, case in CASES.items() if name.startswith("projector")}


def info(side: str, dim: int, num_heads: int, grid: tuple[int, int] | None, num_prefix: int = 1) -> ModelInfo:
    num_keys = num_prefix + (4 if grid is None else grid[0] * grid[1])
    attention = SignalInfo("cls_attention", "blocks.1.attn", (num_heads, num_keys), num_prefix, grid)
    token = "cls_token" if side == "student" else "normed_cls_token"
    return ModelInfo.of(side, **{token: SignalInfo(token, "blocks.1", (dim,)), "cls_attention": attention})


def built(
    heads: tuple[int, int] = (2, 2),
    grids: tuple = ((2, 2), (2, 2)),
    prefix: tuple[int, int] = (1, 1),
    dims: tuple[int, int] = (6, 8),
    **options,
) -> AttnDistill:
    loss = AttnDistill(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, teacher = (
            info(side, dim, num_heads, grid, num_prefix)
            for side, dim, num_heads, grid, num_prefix in zip(("student", "teacher"), dims, heads, grids, prefix)
        )
        loss.build(student, teacher)
    return loss


def attention(num_heads: int, num_keys: int, seed: int = 0, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(3, num_heads, num_keys, generator=generator, dtype=torch.float64)).softmax(-1)


def value(loss: AttnDistill, student: Tensor, teacher: Tensor) -> Tensor:
    """The attention's term; the embedding plays no part."""
    tokens = torch.zeros(len(student), 6), torch.zeros(len(student), 8)
    return loss(*tokens, student, teacher)["attention"]


def test_cases_were_found():
    assert len(LOSSES) == 3 and len(PROJECTORS) == 1 and len(CASES) == 4


def official(case: GoldenCase, **options) -> AttnDistill:
    given = case.options
    loss = AttnDistill(
        cls_weight=given["weight_cls"],
        attention_weight=given["weight_attn"],
        temperature=given["attn_T"],
        aggregate=given["aggregation"],
        **options,
    )
    dim = case["in.cls_s"].shape[1]
    student, teacher = (
        info(side, dim, given[f"heads_{side[0]}"], (224 // given[f"patch_{side[0]}"],) * 2)
        for side in ("student", "teacher")
    )
    loss.build(student, teacher)
    loss.projector = nn.Identity()  # the file has the token behind it
    return loss


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
def test_equals_the_official_loss(case):
    cls_token, student = case["in.cls_s"].requires_grad_(), case["in.attn_s"].requires_grad_()
    terms = official(case)(cls_token, case["in.cls_t"], student, case["in.attn_t"])
    assert_close(terms["cls"], case["out.loss_cls"], 1e-5)
    assert_close(terms["attention"], case["out.loss_attn"], 1e-5)
    total = sum(terms.values())
    assert_close(total, case["out.loss"], 1e-5)
    total.backward()
    assert_close(cls_token.grad, case["grad.cls_s"], 1e-5)
    assert_close(student.grad, case["grad.attn_s"], 1e-5)


@pytest.mark.parametrize("case", PROJECTORS.values(), ids=PROJECTORS)
def test_projector_equals_the_official_one(case):
    *dims, out_dim = case.options["hidden_dims"]
    loss = built(dims=(dims[0], out_dim), num_layers=case.options["n_layers"])
    mlp = loss.projector[:-1]  # the official norm behind it belongs to the model
    assert isinstance(loss.projector[-1], nn.LayerNorm) and loss.projector[-1].weight.shape == (out_dim,)
    mlp.load_state_dict(case.group("w"))
    x = case["in.x"].requires_grad_()
    y = mlp(x)
    assert_close(y, case["out.y"], 1e-5)
    y.square().mean().backward()
    assert_close(x.grad, case["grad.x"], 1e-5)
    wanted = case.group("wgrad")
    grads = {name: p.grad for name, p in mlp.named_parameters()}
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert_close(grad, wanted[name], 1e-5)


@pytest.mark.parametrize(
    ("num_layers", "dims"), [(1, [6, 8]), (2, [6, 12, 8]), (3, [6, 12, 6, 8]), (4, [6, 12, 6, 12, 8])]
)
def test_every_projector_ends_at_the_teachers_width(num_layers, dims):
    loss = built(num_layers=num_layers)
    layers = [layer for layer in loss.projector if isinstance(layer, nn.Linear)]
    assert [layers[0].in_features, *(layer.out_features for layer in layers)] == dims
    assert sum(isinstance(layer, nn.GELU) for layer in loss.projector) == num_layers - 1
    assert [layer.eps for layer in loss.projector if isinstance(layer, nn.LayerNorm)] == [1e-6, 1e-6]


def test_embedding_by_hand():
    loss = built(dims=(2, 2), num_layers=1, cls_weight=3.0)
    linear = loss.projector[1]
    nn.init.eye_(linear.weight)
    # (1, 3) is normed to (-1, 1), twice; against (0, 0) and (2, 1).
    tokens, target = torch.tensor([[1.0, 3.0]] * 2), torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    rows = attention(2, 5)[:2]
    assert loss(tokens, target, rows, rows)["cls"].item() == pytest.approx(3 * (1 + 1 + 9 + 0) / 4, rel=1e-4)


def rows_loop(student: list[float], teacher: list[float]) -> float:
    kept = []
    for row in (student, teacher):
        row = [min(max(p, 1e-5), 0.996) for p in row]
        kept.append([p / sum(row) for p in row])
    return sum(t * math.log(t / s) for s, t in zip(*kept))


def merged(heads: list[list[float]], temperature: float) -> list[float]:
    powers = [math.prod(max(p, 1e-5) for p in key) ** (1 / temperature) for key in zip(*heads)]
    return [p / sum(powers) for p in powers]


def test_equals_a_plain_loop():
    student, teacher = attention(2, 5), attention(2, 5, seed=1, sharpness=12.0)  # some of it out of the range
    assert teacher.min() < 1e-5 and teacher.max() > 0.996
    expected = sum(rows_loop(s.tolist(), t.tolist()) for i in range(3) for s, t in zip(student[i], teacher[i])) / 3
    assert value(built(attention_weight=0.5), student, teacher).item() == pytest.approx(0.5 * expected, rel=1e-10)


@pytest.mark.parametrize("aggregate", [None, True])
@pytest.mark.parametrize("num_heads", [2, 3])
def test_merged_heads_equal_a_plain_loop(num_heads, aggregate):
    student, teacher = attention(2, 5), attention(num_heads, 5, seed=1, sharpness=12.0)
    loss = built(heads=(2, num_heads), aggregate=aggregate, temperature=3.0, attention_weight=1.0)
    if aggregate is None and num_heads == 2:
        expected = [rows_loop(*pair) for s, t in zip(student.tolist(), teacher.tolist()) for pair in zip(s, t)]
    else:
        expected = [rows_loop(merged(s, 3.0), merged(t, 3.0)) for s, t in zip(student.tolist(), teacher.tolist())]
    assert value(loss, student, teacher).item() == pytest.approx(sum(expected) / 3, rel=1e-10)


def test_merged_heads_are_their_geometric_mean():
    """With T the number of heads, merging heads that agree changes nothing."""
    student, teacher = attention(1, 5), attention(1, 5, seed=1)
    one = value(built(heads=(1, 1)), student, teacher)
    three = built(heads=(3, 3), aggregate=True, temperature=3.0)
    torch.testing.assert_close(value(three, student.expand(-1, 3, -1), teacher.expand(-1, 3, -1)), one)


def test_teachers_attention_is_resized_and_keeps_its_mass():
    student, teacher = attention(2, 5), attention(2, 17, seed=1)
    pooled = F.avg_pool2d(teacher[..., 1:].unflatten(-1, (4, 4)), 2).flatten(-2)
    pooled = torch.cat([teacher[..., :1], 4 * pooled], dim=-1)  # four patches become one: their sum
    torch.testing.assert_close(pooled.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    loss = built(grids=((2, 2), (4, 4)), resize="pool")
    torch.testing.assert_close(value(loss, student, teacher), value(built(), student, pooled))
    values = {how: value(built(grids=((2, 2), (4, 4)), resize=how), student, teacher) for how in ("bicubic", "nearest")}
    assert len({round(x.item(), 6) for x in (*values.values(), value(loss, student, teacher))}) == 3


def test_larger_grids_of_the_student():
    student, teacher = attention(2, 1 + 6), attention(3, 1 + 4, seed=1)
    loss = built(heads=(2, 3), grids=((2, 3), (2, 2)))
    student.requires_grad_()
    value(loss, student, teacher).backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0


def test_bicubic_values_below_zero_stay_finite():
    """Where the released code has NaN: merged heads of a resized attention with a peak."""
    teacher = torch.full((1, 2, 1 + 16), 1e-4, dtype=torch.float64)
    teacher[..., 1] = 1 - teacher[..., 1:].sum(-1)
    patches = teacher[..., 1:].unflatten(-1, (4, 4))
    assert F.interpolate(patches, size=(3, 3), mode="bicubic").min() < 0
    loss = built(grids=((3, 3), (4, 4)), aggregate=True)
    student = attention(2, 10)[:1].requires_grad_()
    result = value(loss, student, teacher)
    result.backward()
    assert result.isfinite() and result > 0 and student.grad.isfinite().all()


@pytest.mark.parametrize("prefix", [(1, 5), (5, 1), (2, 2), (2, 3)], ids=str)
def test_other_prefix_tokens(prefix):
    """With as many on both sides all keys count; otherwise the class token's and the patches', scaled to sum 1."""
    student, teacher = (attention(2, p + 4, seed=p) for p in prefix)

    def without(x: Tensor, num_prefix: int) -> Tensor:
        x = torch.cat([x[..., :1], x[..., num_prefix:]], dim=-1)
        return x / x.sum(-1, keepdim=True)

    got = value(built(prefix=prefix), student, teacher)
    if prefix[0] == prefix[1]:
        assert got.item() == pytest.approx(
            0.1 * sum(rows_loop(s, t) for i in range(3) for s, t in zip(student[i].tolist(), teacher[i].tolist())) / 3
        )
    else:
        torch.testing.assert_close(
            got, value(built(), *(without(x, p) for x, p in zip((student, teacher), prefix, strict=True)))
        )


def test_other_prefix_tokens_and_another_grid():
    student, teacher = attention(2, 5), attention(2, 5 + 16, seed=1)
    kept = torch.cat([teacher[..., :1], teacher[..., 5:]], dim=-1)
    loss = built(prefix=(1, 5), grids=((2, 2), (4, 4)))
    expected = value(built(grids=((2, 2), (4, 4))), student, kept / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(value(loss, student, teacher), expected)


def test_options_change_the_value():
    student, teacher = attention(2, 5), attention(2, 5, seed=1)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(3, 6, generator=generator), torch.randn(3, 8, generator=generator)
    options = [
        {},
        {"cls_weight": 2.0},
        {"attention_weight": 1.0},
        {"num_layers": 2},
        {"aggregate": True},
        {"aggregate": True, "temperature": 1.0},
    ]
    values = [sum(built(**option)(*tokens, student, teacher).values()).item() for option in options]
    assert len({round(x, 5) for x in values}) == len(options)
    plain, explicit = built(), built(aggregate=False)
    torch.testing.assert_close(value(plain, student, teacher), value(explicit, student, teacher), rtol=0, atol=0)


def test_blocks_are_where_it_reads():
    assert AttnDistill(student_block=3, teacher_block=0.5).locations() == {
        "student_cls_token": 3,
        "student_cls_attention": 3,
        "teacher_cls_attention": 0.5,
    }


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"cls_weight": -1}, ValueError, "AttnDistill: cls_weight must be >= 0, got -1; 0 switches the embedding off."),
        ({"attention_weight": "x"}, TypeError, "AttnDistill: attention_weight must be a number >= 0, got 'x'; 0 swit"),
        ({"num_layers": 5}, ValueError, "AttnDistill: num_layers must be 1 to 4, got 5; the published MLP has 4."),
        ({"num_layers": 0}, ValueError, "AttnDistill: num_layers must be > 0, got 0; the published MLP has 4."),
        ({"temperature": 0}, ValueError, "AttnDistill: temperature must be > 0, got 0; the number of heads gives thei"),
        (
            {"aggregate": "yes"},
            TypeError,
            "AttnDistill: aggregate must be True or False, got 'yes'; write one of them.",
        ),
        ({"resize": "area"}, ValueError, "AttnDistill: resize must be a known one, got 'area'; "),
    ],
    ids=str,
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        AttnDistill(**options)
    assert str(caught.value).startswith(sentence)


def test_refuses_models_that_do_not_fit():
    with pytest.raises(ValueError) as caught:
        built(heads=(2, 3), aggregate=False)
    assert str(caught.value) == (
        "AttnDistill: aggregate must be True or None for heads that differ, got False for 2 and 3; None merges them."
    )
    with pytest.raises(ValueError) as caught:
        built(grids=(None, (2, 2)))
    assert str(caught.value) == (
        "AttnDistill: student must have a patch grid, got none for cls_attention of 'student' at 'blocks.1.attn'; "
        "choose a model of patch tokens, or pass grid=."
    )


def test_refuses_other_inputs():
    loss, rows = built(), attention(2, 5)
    tokens = torch.zeros(3, 6), torch.zeros(3, 8)
    with pytest.raises(
        ValueError,
        match=r"AttnDistill: teacher_cls_attention must have shape \(B, 2, 5\), got \(3, 2, 6\); build the loss for "
        "these models and this image size.",
    ):
        loss(*tokens, rows, attention(2, 6))
    with pytest.raises(
        ValueError, match=r"AttnDistill: student_cls_attention must have shape \(B, 2, 5\), got \(3, 3, 5"
    ):
        loss(*tokens, attention(3, 5), rows)
    with pytest.raises(
        ValueError,
        match=r"AttnDistill: teacher_normed_cls_token must have shape \(3, 8\), got \(3, 7\); build the loss for these",
    ):
        loss(tokens[0], torch.zeros(3, 7), rows, rows)
    with pytest.raises(
        ValueError, match="AttnDistill: teacher_cls_attention has B=2 but student_cls_token has B=3; giv"
    ):
        loss(*tokens, rows, rows[:2])


def test_must_be_built():
    with pytest.raises(
        RuntimeError, match="AttnDistill: build must be called before forward; put the loss into a kdvit"
    ):
        value(AttnDistill(), attention(2, 5), attention(2, 5))
