from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdvit.losses import TAKT
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = {name: case for name, case in golden("feature_takt").items() if name.startswith("kd")}
LAYERS = ("query", "key", "value")


def built(student: Tensor, teacher: Tensor, **options) -> TAKT:
    loss = TAKT(**options)
    torch.manual_seed(0)
    loss.build(*(ModelInfo.of(pooled=SignalInfo.of("pooled", x)) for x in (student, teacher)))
    return loss.to(student.dtype)


def features(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, dim, generator=generator, dtype=torch.float64) for dim in (4, 6))


def stacked(case, group: str, layer: int, kind: str) -> Tensor:
    """The released code has a layer for each head; ours has all heads in one."""
    return torch.cat([case[f"{group}.heads.{head}.{layer}.{kind}"] for head in range(case.options["heads"])])


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("mode", ["official", "correct"])  # its features lie behind a ReLU
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case, mode):
    options = case.options
    student = case["in.feat_s"].clone().requires_grad_()
    loss = built(
        student, case["in.feat_t"], num_heads=options["heads"], temperature=options["T"], root=options["n"], mode=mode
    )
    for i, name in enumerate(LAYERS):
        for kind in ("weight", "bias"):
            loss.get_parameter(f"{name}.0.{kind}").data = stacked(case, "w", i, kind)
    value = options["weight"] * loss(student, case["in.feat_t"])
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.feat_s"], 1e-5)
    for i, name in enumerate(LAYERS):
        for kind in ("weight", "bias"):
            assert_close(loss.get_parameter(f"{name}.0.{kind}").grad, stacked(case, "wgrad", i, kind), 1e-5)


def test_value_by_hand():
    student = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    loss = built(student, student, num_heads=1)
    for name, weight in zip(LAYERS, (2.0, 3.0, 0.5), strict=True):
        loss.get_parameter(f"{name}.0.weight").data.fill_(weight)
        loss.get_parameter(f"{name}.0.bias").data.zero_()
    # n(0.8) = 8^(1/3) = 2, n(-0.1) = -1; A(x) = 2x * 3x / sqrt(1) * x / 2 = 3 x^3: 24 and -3.
    teacher = torch.tensor([[0.8], [-0.1]], dtype=torch.float64)
    assert loss(student, teacher).item() == pytest.approx(((24 - 1) ** 2 + (-3 - 2) ** 2) / 2, rel=1e-12)
    loss.mode = "official"  # n(-0.1) = 1
    assert loss(student, teacher).item() == pytest.approx(((24 - 1) ** 2 + (3 - 2) ** 2) / 2, rel=1e-12)


@pytest.mark.parametrize("mode", ["correct", "official"])
def test_equals_a_plain_loop(mode):
    student, teacher = features()
    loss = built(student, teacher, num_heads=3, temperature=0.7, root=2.5, mode=mode)
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        x = torch.tensor(
            [(abs(v) / 0.7) ** 0.4 * (1 if mode == "official" else math.copysign(1, v)) for v in t.tolist()]
        )
        adapted = torch.zeros(4, dtype=torch.float64)
        for head in range(3):
            rows = slice(4 * head, 4 * head + 4)
            q, k, v = (
                layer[0].weight[rows] @ x.double() + layer[0].bias[rows] for layer in (loss.query, loss.key, loss.value)
            )
            adapted += (q @ k) / math.sqrt(4) * v / 3
        total += (adapted - s).square().sum().item() / 3
    assert loss(student, teacher).item() == pytest.approx(total, rel=1e-6)


def test_the_official_mode_cannot_tell_a_feature_from_its_negative():
    student, teacher = features()
    official, correct = (built(student, teacher, mode=mode) for mode in ("official", "correct"))
    assert torch.equal(official(student, teacher), official(student, -teacher))
    assert not torch.allclose(correct(student, teacher), correct(student, -teacher))
    assert torch.equal(official(student, teacher.abs()), correct(student, teacher.abs()))
    assert not torch.allclose(official(student, teacher), correct(student, teacher))


def test_options_change_the_value():
    student, teacher = features()
    options = [{}, {"num_heads": 2}, {"temperature": 0.5}, {"root": 2.0}, {"mode": "official"}]
    values = [built(student, teacher, **option)(student, teacher).item() for option in options]
    assert len({round(x, 9) for x in values}) == len(options)


def test_the_student_has_no_projector():
    """The adapter is the teacher's: the gradient at the student is the difference itself, summed over channels."""
    student, teacher = features()
    student.requires_grad_()
    loss = built(student, teacher)
    loss(student, teacher).backward()
    adapted = loss._adapt(loss._shrink(teacher))
    torch.testing.assert_close(student.grad, 2 * (student - adapted).detach() / 3)


def test_refuses_what_cannot_work():
    student, teacher = features()
    for options, sentence in (
        ({"num_heads": 0}, "TAKT: num_heads must be > 0, got 0; the published value is 8."),
        ({"temperature": 0}, "TAKT: temperature must be > 0, got 0; the published value is 0.1."),
        ({"root": -1}, "TAKT: root must be > 0, got -1; the published value is 3."),
        ({"mode": "offical"}, "TAKT: mode must be a known one, got 'offical'; did you mean 'official'? Known: correct"),
    ):
        with pytest.raises(ValueError) as caught:
            TAKT(**options)
        assert str(caught.value).startswith(sentence)
    with pytest.raises(RuntimeError, match="TAKT: build must be called before forward"):
        TAKT()(student, teacher)
    loss = built(student, teacher)
    with pytest.raises(ValueError, match="TAKT: student_pooled must have D=4 as in build, got D=3; build the loss"):
        loss(student[:, :3], teacher)
    with pytest.raises(ValueError, match=r"TAKT: teacher_pooled must have shape \(B, D\), got \(3, 6, 1\)"):
        loss(student, teacher[:, :, None])
