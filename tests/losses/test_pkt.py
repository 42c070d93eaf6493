from __future__ import annotations

import math

import pytest
import torch

from kdvit.losses import PKT
from tests.losses.golden import assert_close, golden

CASES = golden("feature_pkt")


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    student = case["in.student"].requires_grad_()
    loss = PKT()(student, case["in.teacher"])
    assert_close(loss, case["out.loss"], 1e-5)
    loss.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)


def test_value_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # a right angle: rows (2/3, 1/3)
    teacher = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)  # opposite: rows (1, 0)
    assert PKT()(student, teacher).item() == pytest.approx(math.log(3 / 2) / 2, abs=1e-6)


def test_equals_a_plain_loop():
    student, teacher = features(4, 3), features(4, 5, seed=1)
    rows = []
    for x in (student, teacher):
        kernel = [[((a @ b / (a.norm() * b.norm())).item() + 1) / 2 for b in x] for a in x]
        rows.append([[k / sum(row) for k in row] for row in kernel])
    loop = sum(t * math.log(t / s) for i in range(4) for s, t in zip(rows[0][i], rows[1][i], strict=True)) / 16
    assert PKT(eps=1e-12)(student, teacher).item() == pytest.approx(loop, rel=1e-9)


def test_features_may_be_rotated_and_each_image_scaled():
    teacher = features(5, 6)
    rotation = torch.linalg.qr(features(6, 6, seed=1)).Q
    student = teacher @ rotation * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).unsqueeze(1)
    assert PKT()(student, teacher).item() == pytest.approx(0, abs=1e-7)
    assert PKT()(student + 1, teacher).item() > 1e-4


def test_eps_changes_the_value():
    student, teacher = features(4, 3), features(4, 5, seed=1)
    assert PKT(eps=0.1)(student, teacher).item() != pytest.approx(PKT()(student, teacher).item(), rel=1e-2)


def test_opposite_images_are_finite():
    # In float32 the cosine of x and -x may be a little less than -1.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        x = torch.randn(1, 33, generator=generator)
        student = torch.cat([x, -x]).requires_grad_()
        loss = PKT(eps=1e-9)(student, torch.randn(2, 7, generator=generator))
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()


def test_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="PKT: eps must be > 0, got 0; it keeps the logarithm finite."):
        PKT(eps=0)
    with pytest.raises(TypeError, match="PKT: gather must be True or False, got 1; write one of them."):
        PKT(gather=1)
    with pytest.raises(ValueError, match=r"PKT: teacher_pooled must have shape \(B, D\), got \(2, 3, 1\); give the"):
        PKT()(x, x.unsqueeze(2))
    with pytest.raises(ValueError, match="PKT: teacher_pooled has B=1 but student_pooled has B=2; give both"):
        PKT()(x, x[:1])
