from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import ReviewKD
from kdvit.losses.reviewkd import hierarchical_context
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_reviewkd")
#: Parts of an official fusion block -> ours.
OFFICIAL = {"abfs.": "fusions.", "conv1.": "reduce.", "conv2.": "expand.", "att_conv.": "attention."}
TWO = {"student_stages": (0.5, 1.0), "teacher_stages": (0.5, 1.0)}
Maps = tuple[Tensor, ...]


def model(maps: Maps, pooled: Tensor | None = None) -> ModelInfo:
    signals = {} if pooled is None else {"pooled": SignalInfo.of("pooled", pooled)}
    return ModelInfo.of(feature_map=tuple(SignalInfo.of("feature_map", x) for x in maps), **signals)


def built(loss: ReviewKD, student: Maps, teacher: Maps, *pooled: Tensor) -> ReviewKD:
    torch.manual_seed(0)
    student_pooled, teacher_pooled = pooled or (None, None)
    loss.build(model(student, student_pooled), model(teacher, teacher_pooled))
    return loss.to(student[0].dtype)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pyramid() -> tuple[Maps, Maps, Tensor, Tensor]:
    """Two stages of other widths and grids than the teacher's, and what is pooled."""
    student, teacher = (
        (draw(3, 2, 8, 6), draw(3, 4, 4, 3, seed=1)),
        (draw(3, 3, 6, 8, seed=2), draw(3, 5, 5, 5, seed=3)),
    )
    return student, teacher, draw(3, 4, seed=4), draw(3, 6, seed=5)


def ours(name: str) -> str:
    for their, our in OFFICIAL.items():
        name = name.replace(their, our)
    return name


def test_cases_were_found():
    assert list(CASES) == ["cifar_same_size_vit_like"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    student, teacher = (tuple(case[f"in.{side}{k}"] for k in range(4)) for side in "st")
    student = tuple(x.requires_grad_() for x in student)
    loss = built(ReviewKD(pooled=False), student, teacher)
    loss.load_state_dict({ours(name): x for name, x in case.group("w").items()})
    outputs = []
    for fusion in loss.fusions:
        fusion.register_forward_hook(lambda module, inputs, output: outputs.insert(0, output[0]))
    value = loss(student, teacher)
    for k, output in enumerate(outputs):
        assert_close(output, case[f"out.r{k}"], 1e-5)
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    for k, x in enumerate(student):
        assert_close(x.grad, case[f"grad.s{k}"], 1e-4)
    expected = {ours(name): x for name, x in case.group("wgrad").items()}
    assert expected.keys() == dict(loss.named_parameters()).keys()
    for name, parameter in loss.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-4)


def normed(x: Tensor) -> Tensor:
    """BatchNorm of (B, D, h, w) at its start."""
    mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def at_nearest(x: Tensor, height: int, width: int) -> Tensor:
    """Pixel (i, j) of the new grid is the one at the same share of the old."""
    rows = [i * x.shape[2] // height for i in range(height)]
    columns = [j * x.shape[3] // width for j in range(width)]
    return x[:, :, rows][:, :, :, columns]


def fused(block, x: Tensor, deeper: Tensor | None) -> Tensor:
    x = normed(torch.einsum("dc,bcyx->bdyx", block.reduce[0].weight[:, :, 0, 0], x))
    if deeper is None:
        return x
    deeper = at_nearest(deeper, *x.shape[2:])
    weight, bias = block.attention[0].weight[:, :, 0, 0], block.attention[0].bias
    scores = torch.einsum("dc,bcyx->bdyx", weight, torch.cat([x, deeper], 1)) + bias[:, None, None]
    shares = 1 / (1 + (-scores).exp())
    return shares[:, :1] * x + shares[:, 1:] * deeper


def context(output: Tensor, target: Tensor) -> Tensor:
    sizes = [size for size in (4, 2, 1) if size < min(output.shape[2:])]
    values = [(output - target).square().mean()]
    values += [(F.adaptive_avg_pool2d(output, k) - F.adaptive_avg_pool2d(target, k)).square().mean() for k in sizes]
    weights = [2.0**-k for k in range(len(values))]
    return sum(w * value for w, value in zip(weights, values)) / sum(weights)


def test_equals_a_plain_recursion():
    """Grids and widths all differ; the pooled stage is the deepest."""
    student, teacher, student_pooled, teacher_pooled = pyramid()
    loss = built(ReviewKD(mid_dim=7, **TWO), student, teacher, student_pooled, teacher_pooled)
    stages = [(student_pooled[:, :, None, None], teacher_pooled[:, :, None, None])]
    stages += list(zip(student, teacher, strict=True))[::-1]
    deeper, expected, sizes = None, 0.0, []
    for block, (s, t) in zip(loss.fusions, stages, strict=True):
        deeper = at_nearest(fused(block, s, deeper), *t.shape[2:])
        output = normed(F.conv2d(deeper, block.expand[0].weight, padding=1))
        assert output.shape == t.shape
        expected = expected + context(output, t)
        sizes.append(tuple(deeper.shape[1:]))
    assert sizes == [(7, 1, 1), (7, 5, 5), (7, 6, 8)]
    torch.testing.assert_close(loss(student, teacher, student_pooled, teacher_pooled), expected)


def test_context_by_hand():
    """Means of 2x2 are compared where the map is larger: the checkerboard vanishes at all but its own size."""
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]  # 8x8
    zeros = torch.zeros_like(board)
    assert hierarchical_context(board, zeros).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4 + 1 / 8))
    assert hierarchical_context(zeros + 2, zeros).item() == pytest.approx(4.0)
    assert hierarchical_context(board[..., :2, :2], zeros[..., :2, :2]).item() == pytest.approx(1 / (1 + 1 / 2))  # 1x1
    assert hierarchical_context(board[..., :4, :4], zeros[..., :4, :4]).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4))
    assert hierarchical_context(board[..., :1, :1], zeros[..., :1, :1]).item() == 1.0
    # The smaller axis decides, 2x2 and 1x1 here.
    assert hierarchical_context(board[..., :3], zeros[..., :3]).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4))


def test_deep_stages_are_fused_into_shallow_ones():
    """Deep features take part in what is compared with shallow ones, and not the other way round."""
    student, teacher, *_ = pyramid()
    student = tuple(x.requires_grad_() for x in student)
    loss = built(ReviewKD(pooled=False, **TWO), student, teacher)
    outputs = []
    for fusion in loss.fusions:
        fusion.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    loss(student, teacher)
    deep, shallow = outputs
    (grad,) = torch.autograd.grad(
        (deep * draw(*deep.shape, seed=8)).sum(), student[0], retain_graph=True, allow_unused=True
    )
    assert grad is None
    direction = draw(*shallow.shape, seed=9)
    assert all(grad.abs().max() > 1e-6 for grad in torch.autograd.grad((shallow * direction).sum(), student))


@pytest.mark.parametrize(
    ("options", "dims"),
    [({}, (4, 4, 4)), ({"mid_dim": 9}, (9, 9, 9)), ({"pooled": False}, (4, 4))],
    ids=str,
)
def test_sizes_of_the_fusions(options, dims):
    student, teacher, *pooled = pyramid()
    loss = built(ReviewKD(**TWO | options), student, teacher, *(pooled if options.get("pooled", True) else ()))
    assert tuple(fusion.reduce[0].out_channels for fusion in loss.fusions) == dims
    assert [fusion.attention is None for fusion in loss.fusions] == [True, *[False] * (len(dims) - 1)]
    wide = torch.zeros(1, 600, 2, 2)
    loss = built(ReviewKD(pooled=False, student_stages=(-1,), teacher_stages=(-1,)), (wide,), (wide[:, :3],))
    assert loss.fusions[0].reduce[0].out_channels == 512


def test_the_convolutions_begin_as_released():
    """Uniform with variance 1 / fan-in, three times torch's default."""
    student = (torch.zeros(1, 64, 4, 4),)
    loss = built(ReviewKD(pooled=False, student_stages=(-1,), teacher_stages=(-1,)), student, student)
    for projector, fan_in in ((loss.fusions[0].reduce, 64), (loss.fusions[0].expand, 64 * 9)):
        weight = projector[0].weight
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.1)
        assert weight.abs().max().item() == pytest.approx((3 / fan_in) ** 0.5, rel=0.05)


def test_options_change_what_is_read_and_the_value():
    student, teacher, *pooled = pyramid()
    with_pooled = built(ReviewKD(**TWO), student, teacher, *pooled)
    without = built(ReviewKD(pooled=False, **TWO), student, teacher)
    other = built(ReviewKD(mid_dim=9, **TWO), student, teacher, *pooled)
    assert with_pooled.inputs() == ("student_feature_map", "teacher_feature_map", "student_pooled", "teacher_pooled")
    assert without.inputs() == ("student_feature_map", "teacher_feature_map")
    values = [with_pooled(student, teacher, *pooled), other(student, teacher, *pooled), without(student, teacher)]
    assert all(abs(x - y) > 1e-3 for i, x in enumerate(values) for y in values[:i])
    locations = ReviewKD(student_stages=[2, -1], teacher_stages=("layer3", 1.0)).locations()
    assert locations == {"student_feature_map": (2, -1), "teacher_feature_map": ("layer3", 1.0)}


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"pooled": 1}, TypeError, "ReviewKD: pooled must be True or False, got 1; write one of them."),
        ({"mid_dim": 0}, ValueError, "ReviewKD: mid_dim must be > 0, got 0; None takes the student's width."),
        (
            {"mid_dim": 2.0},
            TypeError,
            "ReviewKD: mid_dim must be an integer > 0, got 2.0; None takes the student's width.",
        ),
        (
            {"student_stages": (1, 2)},
            ValueError,
            "ReviewKD: teacher_stages must be as many as student_stages, got 4 for 2; they are paired in order.",
        ),
    ],
    ids=["pooled", "mid_dim", "kind", "pairs"],
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        ReviewKD(**options)
    assert str(caught.value) == sentence


def test_refuses_other_inputs():
    student, teacher, *pooled = pyramid()
    loss = built(ReviewKD(**TWO), student, teacher, *pooled)
    with pytest.raises(TypeError) as caught:
        loss(student, teacher)
    assert str(caught.value) == "ReviewKD: student_pooled and teacher_pooled must be given with pooled; pass both."
    with pytest.raises(ValueError) as caught:
        loss(student, teacher, pooled[0], pooled[1][:, :5])
    assert str(caught.value) == (
        "ReviewKD: teacher_pooled must have D=6 as in build, got D=5; build the loss for these models."
    )
    with pytest.raises(ValueError, match="ReviewKD: teacher_feature_map must have D=5 as in build, got"):
        loss(student, (teacher[0], teacher[1][:, :3]), *pooled)
    with pytest.raises(
        ValueError, match=r"ReviewKD: student_pooled must have shape \(B, D\), got \(3, 4, 1, 1\); give"
    ):
        loss(student, teacher, pooled[0][:, :, None, None], pooled[1])
    with pytest.raises(ValueError, match="ReviewKD: student_feature_map must be a tuple of 2 tensors, got 1; give one"):
        loss(student[:1], teacher, *pooled)


def test_must_be_built():
    with pytest.raises(RuntimeError, match="ReviewKD: build must be called before forward; put the loss into a kdvit"):
        ReviewKD()(*pyramid())
