from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from kdvit.losses import CC
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses import test_contract as contract
from tests.losses.cases import Case
from tests.losses.golden import assert_close, golden

CASES = golden("feature_cc")
OFFICIAL = Case(lambda: CC("official", embed_dim=5), "CC: teacher_pooled must have D=12 as in build, got D=11")


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def official(student: Tensor, teacher: Tensor, embed_dim: int) -> CC:
    """Built, with embeddings that keep the first ``embed_dim`` channels as they are."""
    loss = CC(mode="official", embed_dim=embed_dim)
    loss.build(*(ModelInfo.of(pooled=SignalInfo.of("pooled", x)) for x in (student, teacher)))
    for linear in (loss.student_embedding[0], loss.teacher_embedding[0]):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return loss.to(student.dtype)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_mode_official_equals_the_official_loss(case):
    student, teacher = case["in.student"].requires_grad_(), case["in.teacher"]  # embedded already
    loss = official(student, teacher, embed_dim=8)
    value = loss(student, teacher)
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)
    # The embeddings learn both: the bias of either gets the sum over the batch, with opposite signs.
    assert_close(loss.student_embedding[0].bias.grad, case["grad.student"].sum(dim=0), 1e-5)
    assert_close(loss.teacher_embedding[0].bias.grad, -case["grad.student"].sum(dim=0), 1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_modes_differ(case):
    correct = CC()(case["in.student"], case["in.teacher"]).item()
    assert 0 < correct < 1 < case["out.loss"].item()


def test_the_official_loss_depends_on_the_order_and_ours_does_not():
    student, teacher, order = features(5, 4), features(5, 4, seed=1), torch.tensor([3, 0, 4, 1, 2])
    loss = official(student, teacher, embed_dim=4)
    first, second = (loss(*pair).item() for pair in ((student, teacher), (student[order], teacher[order])))
    assert first != pytest.approx(second, rel=1e-2)
    first, second = (CC()(*pair).item() for pair in ((student, teacher), (student[order], teacher[order])))
    assert first == pytest.approx(second, rel=1e-9)


#: All that the contract asks of a case without labels, but for the order of the batch.
CONTRACT = {
    name: check
    for name, check in vars(contract).items()
    if name.startswith("test_")
    and "case" in inspect.signature(check).parameters
    and "labels" not in name
    and name != "test_order_of_the_batch_does_not_matter"
}


@pytest.mark.parametrize("check", CONTRACT.values(), ids=CONTRACT)
def test_mode_official_keeps_the_rest_of_the_contract(check):
    others = {"dtype": torch.bfloat16, "start": ""}
    check(OFFICIAL, **{name: x for name, x in others.items() if name in inspect.signature(check).parameters})


def test_the_contract_was_found():
    assert len(CONTRACT) >= 15


def test_value_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # cosine 0
    teacher = torch.tensor([[1.0], [-3.0]])  # cosine -1
    # e^(-0.8) * (0.8 * -1 + 0.8^2 / 2 * 1) at two of four entries
    expected = (math.exp(-0.8) * (0.8 - 0.32)) ** 2 / 2
    assert CC()(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_equals_a_plain_loop():
    student, teacher = features(4, 3), features(4, 5, seed=1)

    def kernel(a: Tensor, b: Tensor) -> float:
        cosine = (a @ b / (a.norm() * b.norm())).item()
        return sum(math.exp(-0.6) * 0.6**p / math.factorial(p) * cosine**p for p in range(4))

    loop = sum(
        (kernel(student[i], student[j]) - kernel(teacher[i], teacher[j])) ** 2 for i in range(4) for j in range(4)
    )
    assert CC(order=3, gamma=0.3)(student, teacher).item() == pytest.approx(loop / 16, rel=1e-9)


def test_a_high_order_is_the_gaussian():
    student, teacher = features(4, 3), features(4, 5, seed=1)
    units = [x / x.norm(dim=1, keepdim=True) for x in (student, teacher)]
    gaussians = [torch.exp(-0.4 * (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(dim=2)) for x in units]
    expected = (gaussians[0] - gaussians[1]).square().mean().item()
    assert CC(order=30)(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert CC()(student, teacher).item() == pytest.approx(expected, rel=0.2)


def test_features_may_be_rotated_and_each_image_scaled():
    teacher = features(5, 6)
    rotation = torch.linalg.qr(features(6, 6, seed=1)).Q
    student = teacher @ rotation * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).unsqueeze(1)
    assert CC()(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert CC()(student + 1, teacher).item() > 1e-4


def test_options_change_the_value():
    student, teacher = features(4, 3), features(4, 5, seed=1)
    values = [CC(**o)(student, teacher).item() for o in ({}, {"order": 1}, {"order": 3}, {"gamma": 1.0})]
    assert len({round(v, 6) for v in values}) == 4
    assert OFFICIAL.make().embed_dim == 5


def test_mode_official_must_be_built():
    with pytest.raises(RuntimeError, match="CC: build must be called before forward; put the loss into a kdvit.Distil"):
        CC(mode="official")(features(3, 4), features(3, 4))


def test_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="CC: mode must be a known one, got 'offical'; did you mean 'official'?"):
        CC(mode="offical")
    with pytest.raises(ValueError, match="CC: order must be > 0, got 0; the published value is 2."):
        CC(order=0)
    with pytest.raises(ValueError, match="CC: gamma must be > 0, got 0.0; the published value is 0.4."):
        CC(gamma=0.0)
    with pytest.raises(TypeError, match="CC: embed_dim must be an integer > 0, got '8'; the published value is 128."):
        CC(embed_dim="8")
    with pytest.raises(TypeError, match="CC: gather must be True or False, got 'yes'; write one of them."):
        CC(gather="yes")
    with pytest.raises(ValueError, match=r"CC: teacher_pooled must have shape \(B, D\), got \(2, 3, 1\); give the"):
        CC()(x, x.unsqueeze(2))
    with pytest.raises(ValueError, match="CC: teacher_pooled has B=1 but student_pooled has B=2; give both"):
        CC()(x, x[:1])
    with pytest.raises(ValueError, match="CC: student_pooled must have D=3 as in build, got D=2; build the loss for"):
        official(x, x, 3)(x[:, :2], x)
