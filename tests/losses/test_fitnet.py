from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdvit.losses import FitNet
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_fitnet")


def built(student: Tensor, teacher: Tensor) -> FitNet:
    loss = FitNet()
    infos = (ModelInfo.of(feature_map=SignalInfo.of("feature_map", x)) for x in (student, teacher))
    loss.build(*infos)
    return loss


def test_cases_were_found():
    assert len(CASES) == 2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    student = case["in.student"].requires_grad_()
    loss = built(student, case["in.teacher"])
    weights = {name.replace("bn.", "norm."): x for name, x in case.group("w").items() if name != "conv.bias"}
    loss.load_state_dict(weights)
    value = loss(student, case["in.teacher"])
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-4)
    for name in ("conv.weight", "bn.weight", "bn.bias"):
        assert_close(loss.get_parameter(name.replace("bn.", "norm.")).grad, case[f"wgrad.{name}"], 1e-4)
    # The bias that we leave out got nothing but rounding noise.
    assert case["wgrad.conv.bias"].abs().max() < 1e-5 * case["wgrad.conv.weight"].abs().max()


@pytest.mark.parametrize(
    ("student", "teacher", "layer"),
    [
        ((8, 8), (8, 8), (torch.nn.Conv2d, (1, 1), (1, 1))),
        ((8, 16), (4, 8), (torch.nn.Conv2d, (3, 3), (2, 2))),
        ((4, 4), (8, 8), (torch.nn.ConvTranspose2d, (4, 4), (2, 2))),
        ((8, 7), (6, 6), (torch.nn.Conv2d, (3, 2), (1, 1))),
    ],
    ids=["equal", "twice", "half", "larger"],
)
def test_the_convolution_bridges_the_grids(student, teacher, layer):
    loss = built(torch.rand(2, 5, *student), torch.rand(2, 6, *teacher))
    assert (type(loss.conv), loss.conv.kernel_size, loss.conv.stride) == layer
    assert loss(torch.rand(2, 5, *student), torch.rand(2, 6, *teacher)).item() > 0


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 4), (7, 7)), ((4, 4), (16, 16)), ((8, 4), (4, 8)), ((4, 4), (8, 4))], ids=str
)
def test_refuses_other_grids(student, teacher):
    with pytest.raises(ValueError) as caught:
        built(torch.rand(2, 5, *student), torch.rand(2, 6, *teacher))
    assert str(caught.value) == (
        "FitNet: student grid must be half the teacher's or at least as large, got "
        f"{student[0]}x{student[1]} for {teacher[0]}x{teacher[1]}; choose stages whose grids fit."
    )


def test_value_by_hand():
    student = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    loss = built(student, student)
    loss.conv.weight.data.fill_(3.0)
    # (-3, 3) is normalised to (-1, 1) (but for eps) and rectified to (0, 1); against (-1, 1): (1 + 0) / 2.
    assert loss(student, student).item() == pytest.approx(0.5, abs=1e-4)


def test_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 2, 2, 2, generator=generator), torch.randn(3, 4, 2, 2, generator=generator)
    loss = built(student, teacher)
    weight = loss.conv.weight[:, :, 0, 0]
    loop = 0.0
    for c in range(4):
        x = weight[c, 0] * student[:, 0] + weight[c, 1] * student[:, 1]
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        for got, wanted in zip(x.flatten().tolist(), teacher[:, c].flatten().tolist(), strict=True):
            loop += (max(got, 0.0) - wanted) ** 2 / teacher.numel()
    assert loss(student, teacher).item() == pytest.approx(loop, rel=1e-5)


def test_stages_are_where_it_reads():
    assert FitNet(student_stage=2, teacher_stage="layer3").locations() == {
        "student_feature_map": 2,
        "teacher_feature_map": "layer3",
    }


def test_must_be_built():
    with pytest.raises(RuntimeError, match="FitNet: build must be called before forward; put the loss into a kdvit"):
        FitNet()(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4))
