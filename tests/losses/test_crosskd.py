from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses import CrossKD
from kdvit.signals import ModelInfo, SignalInfo, map_to_tokens
from tests.losses.golden import assert_close, golden

#: The file's others are PKD's (test_pkd.py).
CASES = {name: case for name, case in golden("feature_crosskd").items() if not name.startswith("pkd")}
GRID = (2, 3)


def built(student: Tensor, teacher: Tensor, grid=GRID, num_prefix_tokens: int = 1, **options) -> CrossKD:
    loss = CrossKD(**options)
    tokens = SignalInfo.of("tokens", teacher, grid=grid, num_prefix_tokens=num_prefix_tokens)
    loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", student)), ModelInfo.of("teacher", tokens=tokens))
    return loss.to(student.dtype)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Tail(nn.Module):
    """One block that mixes tokens, and a classifier of their mean, or of the first one."""

    def __init__(self, dim: int = 6, num_classes: int = 4, first: bool = False) -> None:
        super().__init__()
        self.mix, self.head, self.first = nn.Linear(dim, dim), nn.Linear(dim, num_classes), first
        for seed, p in enumerate(self.parameters()):
            p.data = drawn(*p.shape, seed=20 + seed)
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        attention = (tokens @ tokens.transpose(1, 2) / 6).softmax(-1)
        tokens = tokens + self.mix(attention @ tokens).tanh()
        return self.head(tokens[:, 0] if self.first else tokens.mean(1))


def pair(
    student_dim: int = 5, grid=GRID, num_prefix_tokens: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A student's map and a teacher's tokens of 6 channels, both with an offset."""
    num_tokens = num_prefix_tokens + GRID[0] * GRID[1]
    student = 3 + 2 * drawn(4, student_dim, *grid, dtype=dtype)
    return student, drawn(4, num_tokens, 6, seed=1, dtype=dtype) + torch.arange(6, dtype=dtype)


def call(loss: CrossKD, student: Tensor, teacher: Tensor, tail: Callable[[Tensor], Tensor]) -> Tensor:
    return loss(student, teacher, tail, tail(teacher))


def test_cases_were_found():
    assert sorted(CASES) == ["kl_0", "reuse_0"]


def test_equals_the_official_alignment_reuse_and_quality_focal_loss():
    """Their tail is a ReLU and a frozen 1x1 convolution that classifies every position: those are the rows here."""
    case = CASES["reuse_0"]
    student, teacher = case["in.student"].requires_grad_(), map_to_tokens(case["in.teacher"])
    loss = built(student, teacher, (6, 6), 0, response="quality_focal")
    weight, bias, seen = case["w.head.weight"].flatten(1), case["w.head.bias"], []

    def tail(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return F.linear(tokens.relu(), weight, bias).flatten(0, 1)

    teacher_logits = tail(teacher)
    assert_close(teacher_logits, case["out.logits_t"], 1e-5)
    rows = loss(student, teacher, tail, teacher_logits)
    assert_close(seen[1], map_to_tokens(case["out.aligned"]), 1e-5)
    # Theirs is a sum over rows, divided by a detector's number of positives; ours a mean over rows.
    value = rows * len(teacher_logits) / case.options["avg_factor"]
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)
    assert not list(loss.parameters())


def test_equals_the_official_kl():
    case = CASES["kl_0"]
    student, (feature_map, teacher) = case["in.student"].requires_grad_(), pair()
    feature_map, teacher = feature_map.repeat(2, 1, 1, 1)[:6], teacher.repeat(2, 1, 1)[:6]
    loss = built(feature_map, teacher, temperature=case.options["T"])
    value = loss(feature_map, teacher, lambda tokens: student, case["in.teacher"])
    value = value / student.shape[1]  # their mean over classes, our sum
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)


def by_loop(loss: CrossKD, student: Tensor, teacher: Tensor, tail: nn.Module, num_prefix_tokens: int) -> Tensor:
    """For equal grids."""
    batch, num_tokens, dim = len(student), GRID[0] * GRID[1], teacher.shape[2]
    weight = loss.projector[0].weight[:, :, 0, 0]
    tokens = teacher.clone()
    for c in range(dim):
        ours = torch.stack([weight[c] @ student[i, :, n // 3, n % 3] for i in range(batch) for n in range(num_tokens)])
        theirs = torch.stack([teacher[i, num_prefix_tokens + n, c] for i in range(batch) for n in range(num_tokens)])
        moved = (ours - ours.mean()) / (ours.std() + 1e-6) * theirs.std() + theirs.mean()
        for i in range(batch):
            for n in range(num_tokens):
                tokens[i, num_prefix_tokens + n, c] = moved[i * num_tokens + n]
    z, target, t = tail(tokens), tail(teacher), loss.temperature
    total = 0.0
    for i in range(batch):
        if loss.response == "kl":
            q, p = ((x[i] / t).exp() / (x[i] / t).exp().sum() for x in (z, target))
            total += sum(p[c] * (p[c] / q[c]).log() for c in range(len(p)))
        else:
            q, p = (1 / (1 + (-x[i] / t).exp()) for x in (z, target))
            for c in range(len(p)):
                total += -(p[c] * q[c].log() + (1 - p[c]) * (1 - q[c]).log()) * abs(q[c] - p[c])
    return t**2 * total / batch


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
@pytest.mark.parametrize("options", [{}, {"response": "quality_focal"}, {"temperature": 3.0}], ids=str)
def test_equals_a_plain_loop(options, num_prefix_tokens):
    student, teacher = pair(num_prefix_tokens=num_prefix_tokens, dtype=torch.float64)
    loss, tail = built(student, teacher, num_prefix_tokens=num_prefix_tokens, **options), Tail().double()
    value = call(loss, student, teacher, tail)
    torch.testing.assert_close(value, by_loop(loss, student, teacher, tail, num_prefix_tokens), rtol=1e-9, atol=1e-12)


def test_value_by_hand():
    """One image, one channel of two values: whatever they are, they become the teacher's mean -+ its deviation."""
    student, teacher = torch.tensor([-7.0, 1.0]).view(1, 1, 1, 2), torch.tensor([[[2.0], [0.0]]])
    loss = built(student, teacher, (1, 2), 0)

    def tail(tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, 0], tokens[:, 1]], dim=1)

    # (0, 2) instead of (2, 0): (p - q) * difference of the logits, p = sigmoid(2)
    expected = (2 / (1 + math.exp(-2)) - 1) * 2
    assert call(loss, student, teacher, tail).item() == pytest.approx(expected, abs=1e-5)


def test_scale_and_offset_of_the_students_channels_do_not_matter():
    student, teacher = pair(student_dim=6)
    loss, tail = built(student, teacher), Tail()
    assert not list(loss.parameters())  # equal widths
    expected = call(loss, student, teacher, tail)
    moved = student * torch.linspace(0.5, 30, 6).view(6, 1, 1) + torch.linspace(-40, 40, 6).view(6, 1, 1)
    torch.testing.assert_close(call(loss, moved, teacher, tail), expected, rtol=1e-4, atol=1e-6)
    patches = teacher[:, 1:].transpose(1, 2).unflatten(2, GRID)
    assert call(loss, 5 - (5 - 7 * patches), teacher, tail).item() == pytest.approx(0, abs=1e-5)


def test_projector_exists_only_where_widths_differ_and_has_no_bias():
    student, teacher = pair()
    (weight,) = built(student, teacher).parameters()
    assert weight.shape == (6, 5, 1, 1)


def test_the_tail_sees_the_teachers_prefix_tokens_and_the_teachers_moments():
    student, teacher = pair(num_prefix_tokens=5)
    loss, seen = built(student, teacher, num_prefix_tokens=5), []

    def tail(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return Tail()(tokens)

    call(loss, student.requires_grad_(), teacher.requires_grad_(), tail).backward()
    own, crossed = seen
    torch.testing.assert_close(crossed[:, :5], own[:, :5])
    torch.testing.assert_close(crossed[:, 5:].mean(dim=(0, 1)), own[:, 5:].mean(dim=(0, 1)))
    torch.testing.assert_close(crossed[:, 5:].std(dim=(0, 1)), own[:, 5:].std(dim=(0, 1)), rtol=1e-4, atol=1e-5)
    assert student.grad.abs().max() > 0 and teacher.grad is None


def test_other_prefix_tokens_change_no_patch_token():
    student, teacher = pair(num_prefix_tokens=5)
    loss, seen = built(student, teacher, num_prefix_tokens=5), []

    def tail(tokens: Tensor) -> Tensor:
        seen.append(tokens[:, 5:])
        return Tail()(tokens)

    loss(student, teacher, tail, torch.zeros(4, 4))
    loss(student, torch.cat([100 * teacher[:, :5], teacher[:, 5:]], dim=1), tail, torch.zeros(4, 4))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


def test_gradient_flows_through_the_frozen_tail_alone():
    student, teacher = pair()
    tail, student = Tail(), student.requires_grad_()
    call(built(student, teacher), student, teacher, tail).backward()
    assert student.grad.flatten(1).abs().amax(dim=1).min() > 0
    assert all(p.grad is None for p in tail.parameters())


@pytest.mark.parametrize("grid", [(4, 4), (1, 2), (7, 7)], ids=str)
@pytest.mark.parametrize("resize", ["bilinear", "bicubic", "nearest", "pool"])
def test_other_grids_become_the_teachers(grid, resize):
    student, teacher = pair(grid=grid)
    loss, shapes = built(student, teacher, resize=resize), []

    def tail(tokens: Tensor) -> Tensor:
        shapes.append(tokens.shape)
        return Tail()(tokens)

    student.requires_grad_()
    call(loss, student, teacher, tail).backward()
    assert shapes == [(4, 7, 6)] * 2 and student.grad.abs().max() > 0


def value(grid=(4, 4), **options) -> float:
    student, teacher = pair(grid=grid)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = built(student, teacher, **options)
    return call(loss, student, teacher, Tail()).item()


@pytest.mark.parametrize(
    "options", [{"temperature": 2.0}, {"response": "quality_focal"}, {"resize": "nearest"}], ids=str
)
def test_options_change_the_value(options):
    assert abs(value(**options) - value()) > 1e-3


def test_blocks_are_where_it_reads():
    assert CrossKD(student_stage=2, teacher_block=0.75).locations() == {
        "student_feature_map": 2,
        "teacher_tokens": 0.75,
        "teacher_tail": 0.75,
    }


def test_a_single_position_is_finite():
    student, teacher = drawn(1, 6, 1, 1).requires_grad_(), drawn(1, 2, 6)
    value = call(built(student, teacher, (1, 1)), student, teacher, Tail())
    value.backward()
    assert value.item() == pytest.approx(
        0, abs=1e-6
    )  # it becomes the teacher's mean, which is the teacher's only token
    assert student.grad.isfinite().all()


def test_refuses_a_tail_that_does_not_see_the_patches():
    """The last block of a model whose classifier sees the class token."""
    student, teacher = pair()
    head = nn.Linear(6, 4).requires_grad_(False)
    loss = built(student, teacher, teacher_block=-1).eval()
    with pytest.raises(ValueError) as caught:
        call(loss, student, teacher, lambda tokens: head(tokens[:, 0]))
    assert str(caught.value) == (
        "CrossKD: teacher_tail must depend on the patch tokens, got one that reads the prefix tokens alone; choose an "
        "earlier teacher_block than -1."
    )
    assert call(loss, student, teacher, lambda tokens: head(tokens.mean(1))).isfinite()
    assert call(loss, student, teacher, Tail(first=True)).isfinite()  # through a block that mixes


def test_refuses_a_teacher_without_a_grid():
    student, teacher = pair()
    with pytest.raises(ValueError) as caught:
        built(student, teacher, None)
    assert str(caught.value) == (
        "CrossKD: teacher must have a patch grid, got none for tokens of 'teacher' at 'given'; choose a model of patch "
        "tokens, or pass grid=."
    )


@pytest.mark.parametrize(
    ("teacher", "logits", "sentence"),
    [
        (
            drawn(4, 8, 6),
            drawn(4, 4),
            "CrossKD: teacher_tokens must have shape (4, 7, 6) to fit student_feature_map, got (4, 8, 6); build the "
            "loss for these sizes.",
        ),
        (
            drawn(3, 7, 6),
            drawn(4, 4),
            "CrossKD: teacher_tokens must have shape (4, 7, 6) to fit student_feature_map, got (3, 7, 6); build the "
            "loss for these sizes.",
        ),
        (
            drawn(4, 7, 6),
            drawn(4, 3),
            "CrossKD: teacher_logits has C=3 but teacher_tail's logits has C=4; align the heads or pass class_map.",
        ),
        (
            drawn(4, 7, 6),
            drawn(3, 4),
            "CrossKD: teacher_logits has B=3 but teacher_tail's logits has B=4; give both the same batch.",
        ),
    ],
    ids=["tokens", "batch", "classes", "batch of logits"],
)
def test_refuses_other_inputs(teacher, logits, sentence):
    student, built_for = pair()
    with pytest.raises(ValueError) as caught:
        built(student, built_for)(student, teacher, Tail(), logits)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"temperature": 0},
            ValueError,
            "CrossKD: temperature must be > 0, got 0; 1.0 leaves the logits as they are.",
        ),
        (
            {"response": "focal"},
            ValueError,
            "CrossKD: response must be a known one, got 'focal'; did you mean 'quality_focal'? Known: kl, "
            "quality_focal.",
        ),
        (
            {"resize": "linear"},
            ValueError,
            "CrossKD: resize must be a known one, got 'linear'; did you mean 'bilinear'? Known: pool, bilinear, "
            "bicubic, nearest.",
        ),
    ],
    ids=["temperature", "response", "resize"],
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        CrossKD(**options)
    assert str(caught.value) == sentence


def test_must_be_built():
    student, teacher = pair()
    with pytest.raises(RuntimeError, match="CrossKD: build must be called before forward; put the loss into a kdvit"):
        call(CrossKD(), student, teacher, Tail())
