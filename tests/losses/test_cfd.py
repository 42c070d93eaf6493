from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdvit.losses import CFD, Scheduled, make
from kdvit.schedules import Linear
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_cfd")


def built(loss: CFD, student: Tensor, teacher: Tensor) -> CFD:
    loss.build(*(ModelInfo.of(pooled=SignalInfo.of("pooled", x)) for x in (student, teacher)))
    return loss.to(student.dtype)


def pair(batch: int = 4, dim: int = 6, teacher_dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(batch, d, generator=generator).double() for d in (dim, teacher_dim))
    return student, teacher


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    student = case["in.feat_s"].requires_grad_()
    names = {"temp": "temperature", "alpha": "beta", "beta": "gamma"}
    loss = built(CFD(**{names[name]: x for name, x in case.options.items()}), student, case["in.feat_t"])
    assert loss.inputs() == ("student_pooled", "teacher_pooled") and not list(loss.parameters())
    (value,) = loss(student, case["in.feat_t"]).values()
    assert_close(value, case["out.feat"], 1e-5)
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.feat_s"], 1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_entropies_equal_the_official_ones(case):
    student = case["in.feat_s"]
    loss = built(CFD(beta=2.0, gamma=0.25), student, case["in.feat_t"])
    terms = loss(student, case["in.feat_t"], lambda pooled: case["in.p_s"])
    assert_close(terms["feature"], case["out.feat"], 1e-5)
    assert_close(terms["entropy"], 0.5 * case["out.entropy"], 1e-5)
    assert_close(terms["diversity"], 1.5 * case["out.div"], 1e-5)


def test_value_by_hand():
    # The teacher's (3/4, 1/4) is sharpened to (9/10, 1/10); the student's (1/2, 1/2) is not changed by T.
    student, teacher = torch.zeros(2, 2), torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    loss = built(CFD(temperature=0.5, beta=1.0, gamma=0.5), student, teacher)
    terms = loss(student, teacher, lambda x: torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log())
    assert terms["feature"].item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert terms["entropy"].item() == pytest.approx(0.5 * entropy, rel=1e-5)
    assert terms["diversity"].item() == pytest.approx(-0.5 * math.log(2), rel=1e-5)  # the mean is (1/2, 1/2)


def test_equals_a_plain_loop():
    student, teacher = pair(dim=5, teacher_dim=3)
    loss = built(CFD(temperature=0.7, beta=3.0, gamma=0.2), student, teacher)
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double()
    feature = entropy = 0.0
    mean = [0.0] * 4
    for s, t in zip(student, teacher, strict=True):
        s = loss.projector(s)
        p, q = (t / 0.7).softmax(0).tolist(), s.softmax(0).tolist()
        feature += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 4
        predicted = (weight @ s).softmax(0).tolist()
        entropy -= sum(a * math.log(a) for a in predicted) / 4
        mean = [a + b / 4 for a, b in zip(mean, predicted, strict=True)]
    terms = {name: value.item() for name, value in loss(student, teacher, lambda x: x @ weight.T).items()}
    expected = {
        "feature": feature,
        "entropy": 3 * 0.2 * entropy,
        "diversity": 3 * 0.8 * sum(a * math.log(a) for a in mean),
    }
    assert terms == pytest.approx(expected, rel=1e-12)


def test_temperature_sharpens_the_teacher_alone():
    """At the optimum the student's logits are the teacher's over T: below 1, a sharper distribution."""
    _, teacher = pair()
    loss = built(CFD(temperature=0.5), teacher, teacher)
    assert loss(2 * teacher + 3, teacher)["feature"].item() == pytest.approx(0, abs=1e-12)
    assert loss(teacher, teacher)["feature"].item() > 0.01


def test_entropies_ask_for_sure_and_different_predictions():
    pooled = torch.zeros(3, 3)
    loss = built(CFD(beta=1.0, gamma=0.5), pooled, pooled)

    def extra(predictions: Tensor) -> float:
        terms = loss(pooled, pooled, lambda x: 50 * predictions)
        return (terms["entropy"] + terms["diversity"]).item()

    best = extra(torch.eye(3))
    assert best == pytest.approx(-0.5 * math.log(3), rel=1e-5)
    assert best < extra(torch.eye(3)[[0, 0, 1]]) < extra(torch.eye(3)[[0, 0, 0]]) == pytest.approx(0, abs=1e-6)
    assert extra(torch.zeros(3, 3)) == pytest.approx(0, abs=1e-6)  # unsure, and spread


def test_gradient_passes_through_the_head():
    student, teacher = pair()
    head = torch.nn.Linear(6, 4).double().requires_grad_(False)
    student.requires_grad_()
    loss = built(CFD(beta=1.0), student, teacher)
    loss(student, teacher, head)["entropy"].backward()
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("option", [{"temperature": 0.5}, {"beta": 2.0}, {"gamma": 0.1}], ids=str)
def test_options_change_the_value(option):
    student, teacher = pair()
    head = torch.nn.Linear(6, 4).double().requires_grad_(False)
    values = [
        sum(built(CFD(**{"beta": 1.0} | options), student, teacher)(student, teacher, head).values())
        for options in ({}, option)
    ]
    assert (values[0] - values[1]).abs() > 1e-3


def test_the_head_is_read_only_with_beta():
    assert CFD().inputs() == ("student_pooled", "teacher_pooled")
    assert CFD(beta=0.1).inputs() == ("student_pooled", "teacher_pooled", "teacher_head")
    student, teacher = pair()
    assert built(CFD(), student, teacher)(student, teacher).keys() == {"feature"}
    assert CFD.mismatch.width == "linear layer where they differ"


def test_no_schedule_changes_what_is_read():
    """A beta that grows from 0 would ask for a head that nobody reads, in the middle of training."""
    with pytest.raises(ValueError) as caught:
        make("cfd", beta=Linear(0.0, 0.5))
    assert str(caught.value) == ("Scheduled: options must be numbers of CFD, got 'beta'; Known: temperature, gamma.")
    assert isinstance(make("cfd", beta=0.1, temperature=Linear(1.0, 0.9), gamma=Linear(1.0, 0.5)), Scheduled)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"temperature": 0},
            ValueError,
            "CFD: temperature must be > 0, got 0; 1.0 leaves the teacher's feature as it ",
        ),
        ({"beta": -1}, ValueError, "CFD: beta must be >= 0, got -1; 0 switches the entropies off."),
        ({"gamma": 1.5}, ValueError, "CFD: gamma must be at most 1, got 1.5; the diversity's share is 1 - gamma."),
        ({"gather": 1}, TypeError, "CFD: gather must be True or False, got 1; write one of them."),
    ],
    ids=str,
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        CFD(**options)
    assert str(caught.value).startswith(sentence)


def test_refuses_other_inputs():
    student, teacher = pair(dim=5)
    with pytest.raises(RuntimeError, match="CFD: build must be called before forward"):
        CFD()(student, teacher)
    with pytest.raises(TypeError) as caught:
        built(CFD(beta=1.0), student, teacher)(student, teacher)
    assert str(caught.value) == (
        "CFD: teacher_head must be given with beta > 0, got none; pass the teacher's classifier."
    )
    with pytest.raises(ValueError) as caught:
        built(CFD(), student, teacher)(student, teacher[:, 1:])
    assert str(caught.value) == (
        "CFD: teacher_pooled must have D=6 as in build, got D=5; build the loss for these models."
    )
    with pytest.raises(ValueError, match=r"CFD: student_pooled must have shape \(B, D\), got \(4, 5, 1\); give the"):
        built(CFD(), student, teacher)(student[..., None], teacher)
