from __future__ import annotations

import pytest
import torch

from kdvit.losses import DKD, KD, DeiT, FitNet, NormKD, Standardized, make
from kdvit.losses.standardized import standardize
from tests.losses.golden import assert_close, assert_matches, golden, tolerance

CASES = golden("response_logitstd")


def test_cases_were_found():
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    options = case.options
    if "alpha" in options:
        assert_matches(case, Standardized(DKD(**options)), labels="target")
        return
    loss, weight = Standardized(KD(temperature=options["temperature"])), options.get("extra_weight", 1)
    assert_matches(case, lambda student, teacher: weight * loss(student, teacher))


@pytest.mark.parametrize("case", [c for c in CASES.values() if "out.z_student" in c.tensors], ids=lambda c: c.name)
def test_logits_equal_the_official_ones(case):
    for side in ("student", "teacher"):
        expected = case[f"out.z_{side}"]
        assert_close(standardize(case[f"in.{side}_logits"], eps=1e-7), expected, tolerance(expected))


def test_value_by_hand():
    z = standardize(torch.tensor([[2.0, 4.0, 6.0]]), eps=1e-7)  # mean 4, unbiased std 2
    torch.testing.assert_close(z, torch.tensor([[-1.0, 0.0, 1.0]]))
    wide = standardize(torch.tensor([[2.0, 4.0, 6.0]]), eps=2.0)
    torch.testing.assert_close(wide, torch.tensor([[-0.5, 0.0, 0.5]]))


def test_same_distributions_as_normkd():
    """NormKD at t equals standardised KD at T = t, but for its weight: the teacher's std squared."""
    student, teacher = torch.randn(2, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = Standardized(KD(temperature=2.0), eps=1e-12)(student, teacher)
    assert NormKD(2.0)(student, teacher).item() == pytest.approx((plain * teacher.var()).item(), rel=1e-9)


def test_made_by_an_option():
    loss = make("kd", standardize=True, temperature=2)
    assert repr(loss) == "Standardized(loss=KD(temperature=2.0), eps=1e-07)"
    assert loss.name == "standardized_kd"
    assert loss.inputs() == ("student_logits", "teacher_logits")


def test_every_kind_of_logits_is_standardised_and_nothing_else():
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    loss = Standardized(DeiT(kind="soft"))
    expected = DeiT(kind="soft")(standardize(student, 1e-7), standardize(teacher, 1e-7))
    torch.testing.assert_close(loss(student_dist_logits=student, teacher_logits=teacher), expected)
    torch.testing.assert_close(loss(student, teacher), expected)
    soft_labels = torch.tensor([[0.9, 0.1, 0, 0, 0], [0, 0, 0, 0.4, 0.6], [0, 1.0, 0, 0, 0]])
    dkd = DKD()(standardize(student, 1e-7), standardize(teacher, 1e-7), soft_labels)
    torch.testing.assert_close(Standardized(DKD())(student, teacher, soft_labels), dkd)


def test_refuses_what_reads_no_logits():
    with pytest.raises(ValueError) as caught:
        Standardized(FitNet())
    assert str(caught.value) == (
        "Standardized: loss must read logits, got FitNet which reads student_feature_map, teacher_feature_map; "
        "drop standardize for it."
    )
    with pytest.raises(TypeError, match="Standardized: loss must be a kdvit.losses.Loss, got 'kd'; make one"):
        Standardized("kd")
