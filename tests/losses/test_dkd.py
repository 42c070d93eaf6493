from __future__ import annotations

import math

import pytest
import torch

from kdvit.losses import DKD, KD
from tests.losses.golden import assert_close, assert_matches, golden, tolerance

CASES = golden("response_dkd")


def test_cases_were_found():
    assert len(CASES) == 6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_mdistiller(case):
    assert_matches(case, DKD(**case.options), labels="target")
    # The official parts have the factor T^2, but not alpha and beta.
    loss = DKD(**case.options | {"alpha": 1.0, "beta": 1.0})
    terms = loss(case["in.student_logits"], case["in.teacher_logits"], case["in.target"])
    assert_close(terms["target"], case["out.tckd"], tolerance(case["out.tckd"]))
    assert_close(terms["non_target"], case["out.nckd"], tolerance(case["out.nckd"]))


def test_value_by_hand():
    student, teacher = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 2.0, 4.0]]).log()
    terms = DKD(alpha=2.0, beta=3.0, temperature=1.0)(student, teacher, torch.tensor([3]))
    # Target: teacher (1/2, 1/2), student (1/4, 3/4). Others: teacher (1/4, 1/4, 1/2), student thirds.
    target = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    others = 2 * 0.25 * math.log(3 / 4) + 0.5 * math.log(3 / 2)
    assert terms["target"].item() == pytest.approx(2 * target, rel=1e-6)
    assert terms["non_target"].item() == pytest.approx(3 * others, rel=1e-6)


def test_equals_a_plain_loop():
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 4, 2, 1])
    loop = 0.0
    for s, t, y in zip(student / 2, teacher / 2, labels.tolist(), strict=True):
        p, q = t.softmax(0).tolist(), s.softmax(0).tolist()
        loop += p[y] * math.log(p[y] / q[y]) + (1 - p[y]) * math.log((1 - p[y]) / (1 - q[y]))
        for c in set(range(5)) - {y}:
            a, b = p[c] / (1 - p[y]), q[c] / (1 - q[y])
            loop += 8 * a * math.log(a / b)
    value = sum(DKD(temperature=2.0)(student, teacher, labels).values())
    assert value.item() == pytest.approx(2**2 * loop / 4, rel=1e-12)


def test_with_the_teachers_confidence_as_beta_it_is_kd():
    """Eq. 5 of the paper: KD = target term + (1 - teacher's target probability) * non-target term."""
    student, teacher = torch.randn(2, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    beta = 1 - teacher.softmax(1)[0, 2].item()
    value = sum(DKD(alpha=1.0, beta=beta, temperature=1.0)(student, teacher, torch.tensor([2])).values())
    assert value.item() == pytest.approx(KD(temperature=1.0)(student, teacher).item(), rel=1e-12)


@pytest.mark.parametrize("option", ["alpha", "beta", "temperature"])
def test_options_change_the_value(option):
    student, teacher = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.0, 3.0, 1.0]])
    default, other = (sum(DKD(**o)(student, teacher, torch.tensor([0])).values()) for o in ({}, {option: 0.5}))
    assert (default - other).abs() > 1e-3


def test_is_finite_and_right_where_probabilities_underflow():
    student, teacher = torch.tensor([[400.0, 0.0, -400.0]]), torch.tensor([[-400.0, 0.0, 400.0]])
    terms = DKD(alpha=1.0, beta=1.0, temperature=1.0)(student.requires_grad_(), teacher, torch.tensor([0]))
    # Target: all mass against log-odds 400. Others: all mass on the last class against a difference of 400.
    assert terms["target"].item() == pytest.approx(400.0) and terms["non_target"].item() == pytest.approx(400.0)
    (grad,) = torch.autograd.grad(sum(terms.values()), student)
    assert grad.tolist() == [[1.0, 0.0, -1.0]]


def test_negative_weights_are_refused():
    with pytest.raises(ValueError) as caught:
        DKD(beta=-1)
    assert str(caught.value) == "DKD: beta must be >= 0, got -1; 0 switches the non-target term off."
