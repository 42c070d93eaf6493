from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import KD, DeiT
from tests.losses.golden import assert_close, golden, tolerance

CASES = golden("response_deit")


def task_loss(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """What the official run used on the class head: soft labels, label smoothing 0.1, or plain cross-entropy."""
    return F.cross_entropy(logits, labels, label_smoothing=0.1 if kind == "ls" else 0.0)


def test_cases_were_found():
    assert len(CASES) == 12


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_total_equals_the_official_loss(case):
    options = case.options
    cls_logits, dist_logits = (case[f"in.{name}"].requires_grad_() for name in ("cls_logits", "dist_logits"))
    distillation = DeiT(kind=options["distillation_type"], temperature=options["tau"])
    task = task_loss(options["base_criterion"], cls_logits, case["in.labels"])
    alpha = options["alpha"]
    total = (1 - alpha) * task + alpha * distillation(dist_logits, case["in.teacher_logits"])
    assert_close(total, case["out.loss"], tolerance(total))
    for name, grad in zip(("cls", "dist"), torch.autograd.grad(total, (cls_logits, dist_logits)), strict=True):
        assert_close(grad, case[f"grad.{name}_logits"], tolerance(grad))


def test_values_by_hand():
    student, teacher = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log(), torch.tensor([[0.0, 9.0], [5.0, 0.0]])
    # The student gives 1/4 and 1/2 to the teacher's decisions.
    assert DeiT()(student, teacher).item() == pytest.approx((math.log(4) + math.log(2)) / 2, rel=1e-6)
    uniform = torch.zeros(2, 2)
    # Soft: KL of row 0 is 1/2 ln((1/2) / (3/4)) + 1/2 ln((1/2) / (1/4)), of row 1 zero; over B * C = 4.
    by_hand = (0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 4
    assert DeiT(kind="soft")(student, uniform).item() == pytest.approx(by_hand, rel=1e-6)


def test_equals_a_plain_loop():
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loop = 0.0
    for s, t in zip(student, teacher, strict=True):
        loop -= s.softmax(0)[int(t.argmax())].log().item() / len(student)
    assert DeiT()(student, teacher).item() == pytest.approx(loop, rel=1e-12)


def test_options_change_the_value():
    student, teacher = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.0, 3.0, 1.0]])
    losses = DeiT(kind="hard"), DeiT(kind="soft"), DeiT(kind="soft", temperature=3.0)
    assert len({round(loss(student, teacher).item(), 4) for loss in losses}) == 3


def test_soft_is_weaker_than_kd_by_the_number_of_classes():
    student, teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    soft, kd = DeiT(kind="soft", temperature=3.0)(student, teacher), KD(temperature=3.0)(student, teacher)
    assert (kd / soft).item() == pytest.approx(5, rel=1e-5)


def test_refuses_an_unknown_kind():
    with pytest.raises(ValueError) as caught:
        DeiT(kind="hrad")
    assert str(caught.value) == "DeiT: kind must be a known one, got 'hrad'; did you mean 'hard'? Known: hard, soft."
