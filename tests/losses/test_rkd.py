from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import RKD
from kdvit.losses.rkd import _cosines, _Distances
from tests.losses.golden import assert_close, golden

CASES = golden("feature_rkd")


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    student = case["in.student"].requires_grad_()
    weights = case.options["w_d"], case.options["w_a"]
    terms = RKD(*weights)(student, case["in.teacher"])
    assert weights == (RKD().distance_weight, RKD().angle_weight)
    assert_close(terms["distance"], 25 * case["out.loss_distance"], 1e-5)
    assert_close(terms["angle"], 50 * case["out.loss_angle"], 1e-5)
    loss = sum(terms.values())
    assert_close(loss, case["out.loss"], 1e-5)
    assert_close(loss, case["out.rep_loss"], 1e-5)
    loss.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def test_value_by_hand():
    # Distances 1, 1, 2 (mean 4/3) against 1, 1, 1: a line with the second in the middle against an equal triangle.
    student = torch.tensor([[0.0], [1.0], [2.0]])
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    terms = RKD(distance_weight=9.0, angle_weight=27.0)(student, teacher)
    assert terms["distance"].item() == pytest.approx(4 * huber(3 / 4, 1) + 2 * huber(3 / 2, 1), rel=1e-5)
    # Cosines 1, -1, 1 against 1/2 at each of the three, each angle twice.
    assert terms["angle"].item() == pytest.approx(4 * huber(1, 1 / 2) + 2 * huber(-1, 1 / 2), rel=1e-5)


def test_equals_a_plain_loop():
    student, teacher = features(5, 3), features(5, 4, seed=1)
    distances, cosines = [], []
    for x in (student, teacher):
        pairs = [(a - b).norm().item() for a in x for b in x]
        mean = sum(pairs) / 20
        distances.append([d / mean for d in pairs])
        units = [[(b - a) / ((b - a).norm() or 1) for b in x] for a in x]
        cosines.append([(u @ v).item() for row in units for u in row for v in row])
    terms = RKD(distance_weight=1.0, angle_weight=1.0)(student, teacher)
    for name, (ours, theirs) in {"distance": distances, "angle": cosines}.items():
        loop = sum(map(huber, ours, theirs)) / len(ours)
        assert terms[name].item() == pytest.approx(loop, rel=1e-9)


def test_features_may_be_moved_rotated_mirrored_and_scaled():
    teacher = features(6, 4)
    rotation = torch.linalg.qr(features(7, 7, seed=1)).Q[:4]
    student = 5 * (teacher @ rotation) + features(7, seed=2)
    terms = RKD()(student, teacher)
    assert {name: x.item() for name, x in terms.items()} == pytest.approx({"distance": 0, "angle": 0}, abs=1e-12)
    stretched = RKD()(student * torch.arange(1.0, 8.0), teacher)
    assert all(x > 1e-2 for x in stretched.values())


def test_a_large_offset_costs_no_digits():
    student, teacher = features(6, 4).float(), features(6, 5, seed=1).float()
    far = (student + 2**14).requires_grad_()  # in steps of 2^-9 there
    near = (far.detach() - 2**14).requires_grad_()
    values = [sum(RKD()(x, teacher).values()) for x in (near, far)]
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(value, x)[0] for value, x in zip(values, (near, far), strict=True)]
    assert_close(grads[1], grads[0], 1e-4)


def test_equal_images_are_finite_and_at_a_right_angle_to_all():
    student = features(4, 3)
    student[1] = student[0]
    distances = _Distances.apply(student.requires_grad_())
    cosines = _cosines(distances)
    assert distances[0, 1] == 0 and cosines[0, 1].eq(0).all() and cosines[0, :, 1].eq(0).all()
    loss = sum(RKD()(student, features(4, 3, seed=1)).values())
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_distances_have_the_gradient_of_the_plain_form():
    x, weights = features(5, 3).requires_grad_(), features(5, 5, seed=1)
    plain = (x.unsqueeze(0) - x.unsqueeze(1) + torch.eye(5).unsqueeze(2)).norm(dim=2) * (1 - torch.eye(5))
    torch.testing.assert_close(_Distances.apply(x), plain)
    expected = torch.autograd.grad((weights * plain).sum(), x)
    torch.testing.assert_close(torch.autograd.grad((weights * _Distances.apply(x)).sum(), x), expected)


def test_cosines_are_those_of_differences():
    x = features(6, 3)
    units = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
    torch.testing.assert_close(_cosines(_Distances.apply(x)), units @ units.transpose(1, 2))


def test_two_images_have_a_distance_alone():
    student = features(2, 3).requires_grad_()
    terms = RKD()(student, features(2, 3, seed=1))
    assert terms["distance"].item() == pytest.approx(0) and terms["angle"].item() == pytest.approx(0)


def test_weights_scale_their_terms():
    student, teacher = features(5, 3), features(5, 4, seed=1)
    one, other = RKD(1.0, 1.0)(student, teacher), RKD(0.0, 7.0)(student, teacher)
    assert other["distance"] == 0 and other["angle"].item() == pytest.approx(7 * one["angle"].item())
    no_angles = RKD(3.0, 0.0)(student, teacher)
    assert no_angles["angle"] == 0 and no_angles["distance"].item() == pytest.approx(3 * one["distance"].item())


def test_errors():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="RKD: distance_weight must be >= 0, got -1; 0 switches distances off."):
        RKD(distance_weight=-1)
    with pytest.raises(ValueError, match="RKD: angle_weight must be >= 0, got nan; 0 switches angles off."):
        RKD(angle_weight=math.nan)
    with pytest.raises(TypeError, match="RKD: gather must be True or False, got None; write one of them."):
        RKD(gather=None)
    with pytest.raises(ValueError, match=r"RKD: student_pooled must have shape \(B, D\), got \(4,\); give the signal"):
        RKD()(x[0], x)
    with pytest.raises(ValueError, match="RKD: teacher_pooled has B=2 but student_pooled has B=3; give both the same"):
        RKD()(x, x[:2])
