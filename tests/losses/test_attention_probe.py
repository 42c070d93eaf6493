from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import AttentionProbe
from kdvit.losses.attention_probe import selection_score
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_attention_probe")
PROBES = {name: case for name, case in CASES.items() if name.startswith("probe")}
SCORES = {name: case for name, case in CASES.items() if name.startswith("select")}
LAST = {"student_blocks": (-1,), "teacher_blocks": (-1,)}


def tokens(dim: int, num_blocks: int = 3, num_patches: int = 4, seed: int = 0) -> Tensor:
    """Class token and patches of every block, (L, B, 1 + N, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_blocks, 2, 1 + num_patches, dim, generator=generator, dtype=torch.float64)


def split(student: Tensor, teacher: Tensor, prefix: tuple[int, int] = (1, 1)) -> tuple:
    """The inputs in stacked tokens of both models."""
    s, t = prefix
    return tuple(student[:, :, 0]), tuple(teacher[:, :, 0]), tuple(student[:, :, s:]), tuple(teacher[:, :, t:])


def info(side: str, dim: int, grid: tuple[int, int] | None, num_blocks: int = 3) -> ModelInfo:
    num_patches = 4 if grid is None else grid[0] * grid[1]
    patches = SignalInfo("patch_tokens", "blocks.1", (num_patches, dim), grid=grid)
    cls_token = SignalInfo("cls_token", "blocks.1", (dim,))
    return ModelInfo.of(side, patch_tokens=(patches,) * num_blocks, cls_token=(cls_token,) * num_blocks)


def test_cases_were_found():
    assert len(PROBES) == len(SCORES) == 1 and len(CASES) == 2


@pytest.mark.parametrize("case", PROBES.values(), ids=PROBES)
def test_equals_the_official_loss(case):
    student = case["in.feat_s"].requires_grad_()
    blocks = tuple(range(len(student)))
    value = AttentionProbe(student_blocks=blocks, teacher_blocks=blocks)(*split(student, case["in.feat_t"]))
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.feat_s"], 1e-5)


@pytest.mark.parametrize("case", SCORES.values(), ids=SCORES)
def test_score_equals_the_official_one(case):
    attention = case["in.y"]
    assert (case["in.uniform"] == case["in.uniform"][0, 0]).all()
    assert_close(selection_score(attention.unsqueeze(1), num_prefix_tokens=0), case["out.score"], 1e-5)
    # The same among the keys of prefix tokens and beside another head.
    head = torch.cat([torch.rand(len(attention), 5), attention], dim=1)
    score = selection_score(torch.stack([head, torch.rand_like(head)], dim=1), num_prefix_tokens=5)
    assert_close(score, case["out.score"], 1e-5)
    assert_close(score.mean(), case["out.loss"], 1e-5)


def test_score_by_hand():
    # (3, 4) against (1, 1): 7 / (5 * sqrt(2)).
    score = selection_score(torch.tensor([[[0.3, 0.3, 0.4]], [[0.9, 0.1, 0.0]], [[0.0, 0.5, 0.5]]]).bfloat16())
    assert score.dtype == torch.float32
    assert score.tolist() == pytest.approx([7 / (5 * math.sqrt(2)), 1 / math.sqrt(2), 1.0], abs=2e-3)


def test_value_by_hand():
    # Two channels, a class token and two patches. Channel 0: (2, 1, 2) / 3; channel 1: (0, 3, 4) / 5.
    student = torch.tensor([[2.0, 0.0], [1.0, 3.0], [2.0, 4.0]])[None, None]
    # r = (2 * 1 / 9, 2 * 2 / 9); the teacher's is 0.
    inputs = split(student, torch.eye(3, 2)[None, None])
    assert AttentionProbe(**LAST)(*inputs).item() == pytest.approx((4 + 16) / 81 / 2)
    # Cosines: 1 / sqrt(10) and 2 / sqrt(20), against 0.
    value = AttentionProbe(normalize="channels", **LAST)(*inputs).item()
    assert value == pytest.approx((1 / 10 + 4 / 20) / 2)


@pytest.mark.parametrize("normalize", ["tokens", "channels"])
def test_equals_a_plain_loop(normalize):
    sides = tokens(5), tokens(3, seed=1)
    errors = []
    for block in range(3):
        for i in range(2):
            probes = []
            for x in (side[block, i] for side in sides):
                if normalize == "tokens":
                    scaled = [[x[n, d] / sum(x[:, d] ** 2).sqrt() for d in range(x.shape[1])] for n in range(5)]
                else:
                    scaled = [[x[n, d] / sum(x[n] ** 2).sqrt() for d in range(x.shape[1])] for n in range(5)]
                probes.append([sum(a * b for a, b in zip(scaled[0], scaled[n])).item() for n in range(1, 5)])
            errors += [(ours - theirs) ** 2 for ours, theirs in zip(*probes)]
    value = AttentionProbe(normalize=normalize)(*split(*sides))
    assert value.item() == pytest.approx(sum(errors) / len(errors), rel=1e-10)


def test_what_it_does_not_see():
    """Scales that its normalisation takes away; and what the channels are called."""
    student, teacher = tokens(5), tokens(5, seed=1)
    generator = torch.Generator().manual_seed(2)
    channels = 0.5 + torch.rand(1, 2, 1, 5, generator=generator)
    lengths = 0.5 + torch.rand(1, 2, 5, 1, generator=generator)
    order = torch.tensor([3, 0, 4, 1, 2])
    for normalize, free, seen in (("tokens", channels, lengths), ("channels", lengths, channels)):
        loss = AttentionProbe(normalize=normalize)
        assert loss(*split(student * free, student)).item() == pytest.approx(0.0, abs=1e-20)
        assert loss(*split(student * seen, student)).item() > 1e-4
        assert loss(*split(student[..., order], student)).item() == pytest.approx(0.0, abs=1e-20)
        assert loss(*split(student, teacher)).item() > 1e-3


def test_teacher_learns_nothing():
    student, teacher = tokens(5).requires_grad_(), tokens(5, seed=1).requires_grad_()
    AttentionProbe()(*split(student, teacher)).backward()
    assert teacher.grad is None and (student.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("prefix", [(1, 5), (5, 1), (2, 2)], ids=str)
def test_other_prefix_tokens_are_not_read(prefix):
    """The signals of the class token and of the patches leave them out, whatever their number."""
    student, teacher = tokens(5), tokens(3, seed=1)

    def with_registers(x: Tensor, count: int) -> Tensor:
        registers = torch.randn(*x.shape[:2], count - 1, x.shape[3], dtype=torch.float64)
        return torch.cat([x[:, :, :1], registers, x[:, :, 1:]], dim=2)

    inputs = split(with_registers(student, prefix[0]), with_registers(teacher, prefix[1]), prefix)
    torch.testing.assert_close(AttentionProbe()(*inputs), AttentionProbe()(*split(student, teacher)))


def test_grids_may_differ():
    student, teacher = tokens(5, num_patches=16), tokens(3, seed=1)
    inputs = split(student, teacher)

    def value(resize: str) -> Tensor:
        loss = AttentionProbe(resize=resize)
        loss.build(info("student", 5, (4, 4)), info("teacher", 3, (2, 2)))
        return loss(*inputs)

    pooled = F.avg_pool2d(student[:, :, 1:].flatten(0, 1).transpose(1, 2).unflatten(2, (4, 4)), 2)
    pooled = torch.cat([student[:, :, :1], pooled.flatten(2).transpose(1, 2).unflatten(0, (3, 2))], dim=2)
    torch.testing.assert_close(value("pool"), AttentionProbe()(*split(pooled, teacher)))
    assert not torch.allclose(value("bicubic"), value("pool"))


def test_blocks_are_where_it_reads():
    loss = AttentionProbe(student_blocks=[3, -1], teacher_blocks=[7, "blocks.11"])
    assert loss.locations() == {
        "student_cls_token": (3, -1),
        "student_patch_tokens": (3, -1),
        "teacher_cls_token": (7, "blocks.11"),
        "teacher_patch_tokens": (7, "blocks.11"),
    }
    shares = AttentionProbe().student_blocks
    assert [math.ceil(round(share * 12, 6)) - 1 for share in shares] == [3, 7, 11]  # as the taps count


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"normalize": "token"},
            ValueError,
            "AttentionProbe: normalize must be a known one, got 'token'; did you mean",
        ),
        ({"resize": "area"}, ValueError, "AttentionProbe: resize must be a known one, got 'area'; "),
        (
            {"student_blocks": (0, 1)},
            ValueError,
            "AttentionProbe: teacher_blocks must be as many as student_blocks, got 3 for 2; they are paired in order.",
        ),
    ],
    ids=str,
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        AttentionProbe(**options)
    assert str(caught.value).startswith(sentence)


def test_refuses_models_without_a_grid():
    with pytest.raises(ValueError) as caught:
        AttentionProbe().build(info("student", 5, (2, 2)), info("plain", 5, None))
    assert str(caught.value) == (
        "AttentionProbe: teacher must have a patch grid, got none for patch_tokens of 'plain' at 'blocks.1'; "
        "choose a model of patch tokens, or pass grid=."
    )


def test_refuses_other_inputs():
    student, teacher = tokens(5), tokens(3, seed=1)
    inputs = list(split(student, teacher))

    def call(**changes: tuple) -> None:
        names = "student_cls_token", "teacher_cls_token", "student_patch_tokens", "teacher_patch_tokens"
        AttentionProbe()(**dict(zip(names, inputs)) | changes)

    with pytest.raises(ValueError, match="AttentionProbe: teacher_cls_token must be a tuple of 3 tensors, got 2; give"):
        call(teacher_cls_token=inputs[1][:2])
    with pytest.raises(
        ValueError,
        match="AttentionProbe: teacher_patch_tokens must have N=4 like student_patch_tokens, got N=3; drop the prefix "
        "tokens, and call build where the grids differ.",
    ):
        call(teacher_patch_tokens=tuple(x[:, 1:] for x in inputs[3]))
    with pytest.raises(
        ValueError,
        match=r"AttentionProbe: teacher_cls_token must have shape \(2, 3\) to fit teacher_patch_tokens, got \(2, 2\); "
        "give both of the same block.",
    ):
        call(teacher_cls_token=tuple(x[:, 1:] for x in inputs[1]))
