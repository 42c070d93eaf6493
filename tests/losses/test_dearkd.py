from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kdvit
from kdvit.losses import DearKD, DeiT
from kdvit.schedules import Steps
from kdvit.signals import ModelInfo, Progress, SignalInfo
from tests.tiny import cnn, distilled_vit, images, labels

Maps = tuple[Tensor, ...]
STUDENT, TEACHER = ((4, 3, 3), (4, 3, 3)), ((6, 3, 3), (5, 3, 3))


def maps(student=STUDENT, teacher=TEACHER, dtype=torch.float64) -> tuple[Maps, Maps]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        tuple(torch.randn(2, *shape, generator=generator, dtype=dtype) for shape in side) for side in (student, teacher)
    )


def built(student: Maps, teacher: Maps, **options) -> DearKD:
    loss = DearKD(**options)
    torch.manual_seed(0)
    loss.build(
        *(ModelInfo.of(feature_map=tuple(SignalInfo.of("feature_map", x) for x in m)) for m in (student, teacher))
    )
    return loss.to(student[0].dtype)


def test_value_by_hand():
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    target = torch.tensor([[0.5, -3.0]] * 2, dtype=torch.float64).view(2, 2, 1, 1)
    loss = built((x,), (target,), student_stages=(0,), teacher_stages=(0,))
    loss.aligners[0][0].weight.data.fill_(2.0)
    loss.aligners[0][-1].weight.data.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    loss.aligners[0][-1].bias.data.copy_(torch.tensor([0.0, 1.0]))
    # (-2, 2) is normalised to (-1, 1) and rectified to (0, 1): channels (0, 1) and (1, 0), the second may be negative.
    expected = (0.5**2 + (1 - 0.5) ** 2 + (1 + 3) ** 2 + (0 + 3) ** 2) / 4
    assert loss((x,), (target,)).item() == pytest.approx(expected, rel=1e-5)


def test_equals_a_plain_loop():
    student, teacher = maps()
    loss, total = built(student, teacher), 0.0
    for aligner, s, t in zip(loss.aligners, student, teacher, strict=True):
        depthwise, pointwise = aligner[0].weight, aligner[-1]
        padded = F.pad(s, (1, 1, 1, 1))
        for b, c in [(b, c) for b in range(2) for c in range(len(t[0]))]:
            for i, j in [(i, j) for i in range(3) for j in range(3)]:
                value = pointwise.bias[c]
                for d in range(4):
                    here = [
                        [
                            (padded[n, d, k : k + 3, m : m + 3] * depthwise[d, 0]).sum()
                            for k in range(3)
                            for m in range(3)
                        ]
                        for n in range(2)
                    ]
                    every = torch.stack([v for row in here for v in row])
                    x = (here[b][3 * i + j] - every.mean()) / (every.var(unbiased=False) + 1e-5).sqrt()
                    value = value + pointwise.weight[c, d, 0, 0] * x.clamp(min=0)
                total += ((value - t[b, c, i, j]) ** 2 / t.numel()).item()
    assert loss(student, teacher).item() == pytest.approx(total, rel=1e-10)


def test_pairs_are_summed():
    student, teacher = maps()
    loss, total = built(student, teacher), 0.0
    for i in range(2):
        one = built(student[i : i + 1], teacher[i : i + 1], student_stages=(0,), teacher_stages=(0,))
        one.aligners[0].load_state_dict(loss.aligners[i].state_dict())
        total += one(student[i : i + 1], teacher[i : i + 1])
    torch.testing.assert_close(loss(student, teacher), total)


def test_the_larger_map_is_pooled_or_the_students_is_interpolated():
    student, teacher = maps(((4, 2, 2), (4, 6, 6)), ((6, 8, 8), (5, 3, 3)))
    loss = built(student, teacher)
    pairs = ((student[0], F.avg_pool2d(teacher[0], 4)), (F.avg_pool2d(student[1], 2), teacher[1]))
    expected = sum(F.mse_loss(a(s), t) for a, (s, t) in zip(loss.aligners, pairs, strict=True))
    torch.testing.assert_close(loss(student, teacher), expected)
    values = {
        how: built(student, teacher, resize=how)(student, teacher).item() for how in ("pool", "bilinear", "nearest")
    }
    assert len({round(x, 9) for x in values.values()}) == 3


def test_is_off_after_stage_one():
    """What the docstring tells to write: both kinds of distillation end, and the task alone goes on."""
    weight = Steps({0: 2.0, 250: 0.0})
    losses = [(weight, DearKD()), (weight, DeiT())]
    distiller = kdvit.Distiller(cnn(), distilled_vit(), losses)
    first, second = (
        distiller.eval()(images(), labels(), progress=Progress(epoch=epoch, total_epochs=300.0))
        for epoch in (249.9, 250.0)
    )
    assert first.loss.item() == pytest.approx(
        (first.losses["task"] + 2 * first.losses["dearkd"] + 2 * first.losses["deit"]).item(), rel=1e-6
    )
    assert second.loss.item() == pytest.approx(second.losses["task"].item(), rel=1e-6)


def test_refuses_what_cannot_work():
    student, teacher = maps()
    with pytest.raises(ValueError, match="DearKD: teacher_stages must be as many as student_stages, got 1 for 2; they"):
        DearKD(teacher_stages=(0,))
    with pytest.raises(TypeError, match=r"DearKD: student_stages must be a sequence, got 1; write \(1,\) for one"):
        DearKD(student_stages=1)
    with pytest.raises(ValueError, match="DearKD: resize must be a known one, got 'area'"):
        DearKD(resize="area")
    with pytest.raises(RuntimeError, match="DearKD: build must be called before forward"):
        DearKD()(student, teacher)
    loss = built(student, teacher)
    with pytest.raises(ValueError, match="DearKD: teacher_feature_map must be a tuple of 2 tensors, got 1; give one"):
        loss(student, teacher[:1])
    with pytest.raises(ValueError, match="DearKD: teacher_feature_map must have D=6 as in build, got D=5; build the"):
        loss(student, (teacher[1], teacher[1]))
    with pytest.raises(ValueError, match="DearKD: teacher_feature_map has B=1 but student_feature_map has B=2; give"):
        loss(student, tuple(x[:1] for x in teacher))


def test_stages_are_where_it_reads():
    assert DearKD((0, 1), ("layer1", 2)).locations() == {
        "student_feature_map": (0, 1),
        "teacher_feature_map": ("layer1", 2),
    }
