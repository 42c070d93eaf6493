from __future__ import annotations

import pytest
import torch

from kdvit.losses import DKD, KD, NormKD
from tests.losses.golden import assert_matches, golden

CASES = golden("response_normkd")


def test_cases_were_found():
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    assert_matches(case, NormKD(**case.options), labels="target" if "alpha" in case.options else None)


def test_value_by_hand():
    # Standard deviations 1 and 2: temperatures 2 and 4, and the same softened logits but for their order.
    student, teacher = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[-2.0, 0.0, 2.0]])
    p = torch.tensor([-0.5, 0.0, 0.5]).softmax(0)
    by_hand = 4**2 * (p[2] - p[0]) * 1.0  # sum p log(p / reversed p) = p2 * 1 + p0 * (-1)
    assert NormKD()(student, teacher).item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("weights", [{}, {"alpha": 2.0, "beta": 3.0}], ids=["kd", "dkd"])
def test_equals_a_plain_loop(weights):
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 4, 2, 1])
    loop = 0.0
    for i in range(4):
        s, t, label = student[i : i + 1], teacher[i : i + 1], labels[i : i + 1]
        temperature = 1.5 * t.std()
        softened = s / (1.5 * s.std()), t / temperature
        value = sum(DKD(**weights, temperature=1.0)(*softened, label).values()) if weights else KD(1.0)(*softened)
        loop += (temperature**2 * value).item() / 4
    value = NormKD(temperature_norm=1.5, **weights)(student, teacher, *([labels] if weights else []))
    assert (sum(value.values()) if weights else value).item() == pytest.approx(loop, rel=1e-12)


@pytest.mark.parametrize("option", ["temperature_norm", "alpha", "beta", "min_std"])
def test_options_change_the_value(option):
    student, teacher = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.0, 3.0, 1.0]])
    defaults = {"alpha": 1.0, "beta": 8.0}
    values = [
        sum(NormKD(**options)(student, teacher, torch.tensor([1])).values())
        for options in (defaults, defaults | {option: 5.0})
    ]
    assert (values[0] - values[1]).abs() > 1e-3


def test_a_small_spread_on_a_large_offset_is_kept():
    student, teacher = 1000 + 0.05 * torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    exact = NormKD()(student.double(), teacher.double())
    assert NormKD()(student, teacher).item() == pytest.approx(exact.item(), rel=1e-5)


def test_reads_labels_only_with_dkd():
    assert NormKD().inputs() == ("student_logits", "teacher_logits")
    assert NormKD(alpha=1.0, beta=2.0).inputs() == ("student_logits", "teacher_logits", "labels")
    with pytest.raises(TypeError, match="NormKD: labels must be given where alpha and beta are; pass labels."):
        NormKD(alpha=1.0, beta=2.0)(torch.rand(2, 3), torch.rand(2, 3))


def test_one_weight_alone_is_refused():
    with pytest.raises(ValueError, match="alpha and beta must be given together, got alpha=1.0 and beta=None; "):
        NormKD(alpha=1.0)
