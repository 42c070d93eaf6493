from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdvit.losses import PKD
from kdvit.losses.pkd import standardized_channels
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = {name: case for name, case in golden("feature_crosskd").items() if name.startswith("pkd")}
ONE = {"student_stages": (-1,), "teacher_stages": (-1,)}
TWO = {"student_stages": (0.5, 1.0), "teacher_stages": (0.5, 1.0)}


def model(maps: tuple[Tensor, ...]) -> ModelInfo:
    return ModelInfo.of(feature_map=tuple(SignalInfo.of("feature_map", x) for x in maps))


def built(loss: PKD, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> PKD:
    torch.manual_seed(0)
    loss.build(model(student), model(teacher))
    return loss.to(student[0].dtype)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    student, teacher = case["in.student"].requires_grad_(), case["in.teacher"]
    loss = built(PKD(**ONE), (student,), (teacher,))
    assert not list(loss.parameters()) and case.options["loss_weight"] == 1
    value = loss((student,), (teacher,))
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)


def test_equals_a_plain_loop():
    """Two stages; at the second the widths differ, and the teacher's larger grid is averaged two by two."""
    student, teacher = (
        (draw(2, 3, 2, 3), draw(2, 3, 2, 2, seed=1)),
        (draw(2, 3, 2, 3, seed=2), draw(2, 4, 4, 4, seed=3)),
    )
    loss = built(PKD(eps=0.2, **TWO), student, teacher)
    weight, bias = loss.projectors[1][0].weight[:, :, 0, 0], loss.projectors[1][0].bias
    projected = torch.einsum("dc,bcyx->bdyx", weight, student[1]) + bias[:, None, None]
    averaged = sum(teacher[1][:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    total = 0.0
    for s, t in ((student[0], teacher[0]), (projected, averaged)):
        for c in range(s.shape[1]):
            pair = []
            for x in (s[:, c].flatten(), t[:, c].flatten()):
                mean = x.sum() / len(x)
                deviation = (sum((v - mean) ** 2 for v in x) / (len(x) - 1)) ** 0.5
                pair.append((x - mean) / (deviation + 0.2))
            total += sum((a - b) ** 2 for a, b in zip(*pair)) / 2 / s.numel()
    torch.testing.assert_close(loss(student, teacher), total)


def test_it_is_the_pearson_correlation_of_each_channel():
    student, teacher = draw(3, 5, 2, 2), draw(3, 5, 2, 2, seed=1)
    rows = [x.transpose(0, 1).flatten(1) for x in (student, teacher)]
    r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows)])
    loss = built(PKD(eps=1e-15, **ONE), (student,), (teacher,))
    torch.testing.assert_close(loss((student,), (teacher,)), (1 - r).mean() * 11 / 12)


def test_scale_and_offset_of_a_channel_do_not_matter():
    student, teacher = draw(3, 5, 2, 2), draw(3, 5, 2, 2, seed=1)
    loss = built(PKD(eps=1e-15, **ONE), (student,), (teacher,))
    scale, offset = torch.tensor([0.1, 1.0, 3.0, 10.0, 0.5]).view(5, 1, 1), torch.arange(5.0).view(5, 1, 1)
    expected = loss((student,), (teacher,))
    torch.testing.assert_close(loss((scale * student + offset,), (teacher,)), expected)
    torch.testing.assert_close(loss((student,), (scale * teacher + offset,)), expected)
    assert loss((scale * teacher + offset,), (teacher,)).item() == pytest.approx(0.0, abs=1e-10)
    assert abs(loss((-student,), (teacher,)) - expected) > 1e-3


def test_a_constant_channel_is_finite():
    """A dead channel of the student costs half of what uncorrelated ones do, and gets no gradient; of both, nothing."""
    student, teacher = draw(3, 2, 2, 2), draw(3, 2, 2, 2, seed=1)
    student[:, 0] = 0.3
    student.requires_grad_()
    loss = built(PKD(**ONE), (student,), (teacher,))
    value = loss((student,), (teacher,))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    dead = torch.zeros(3, 1, 2, 2).double()
    one = built(PKD(**ONE), (dead,), (dead,))
    assert one((dead,), (teacher[:, :1],)).item() == pytest.approx(11 / 12 / 2, rel=1e-5)
    assert one((dead,), (dead,)).item() == 0


def test_a_single_value_is_zero():
    student, teacher = draw(1, 3, 1, 1).requires_grad_(), draw(1, 3, 1, 1, seed=1)
    value = built(PKD(**ONE), (student,), (teacher,))((student,), (teacher,))
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0


def test_channels_are_standardised():
    rows = standardized_channels(7 * draw(3, 4, 2, 5) + 2, eps=1e-12)
    assert rows.shape == (4, 30)
    torch.testing.assert_close(rows.mean(dim=1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.std(dim=1), torch.ones(4).double())


def test_options_change_the_value():
    def value(student=(2, 3, 2, 3), teacher=(2, 3, 2, 3), **options) -> float:
        maps = (draw(*student),), (draw(*teacher, seed=1),)
        return built(PKD(**ONE | options), *maps)(*maps).item()

    assert abs(value(eps=0.1) - value()) > 1e-3
    smaller = [value((2, 3, 2, 2), (2, 3, 4, 5), resize=how) for how in ("pool", "bilinear", "bicubic", "nearest")]
    assert all(abs(x - y) > 1e-6 for i, x in enumerate(smaller) for y in smaller[:i])
    assert value(gather=True) == value()  # one process; two are compared in test_gathering.py
    locations = PKD(student_stages=[2, -1], teacher_stages=("layer3", 1.0)).locations()
    assert locations == {"student_feature_map": (2, -1), "teacher_feature_map": ("layer3", 1.0)}


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"eps": 0}, ValueError, "PKD: eps must be > 0, got 0; it keeps constant channels finite."),
        ({"gather": "no"}, TypeError, "PKD: gather must be True or False, got 'no'; write one of them."),
        (
            {"resize": "bicubik"},
            ValueError,
            "PKD: resize must be a known one, got 'bicubik'; did you mean 'bicubic'? "
            "Known: pool, bilinear, bicubic, nearest.",
        ),
        (
            {"teacher_stages": (0, 1)},
            ValueError,
            "PKD: teacher_stages must be as many as student_stages, got 2 for 4; they are paired in order.",
        ),
    ],
    ids=["eps", "gather", "resize", "pairs"],
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        PKD(**options)
    assert str(caught.value) == sentence


def test_refuses_other_maps():
    student, teacher = (draw(2, 3, 2, 2),), (draw(2, 4, 2, 2),)
    loss = built(PKD(**ONE), student, teacher)
    with pytest.raises(ValueError) as caught:
        loss(student, (teacher[0][:, :2],))
    assert str(caught.value) == (
        "PKD: teacher_feature_map must have D=4 as in build, got D=2; build the loss for these models."
    )
    with pytest.raises(ValueError, match="PKD: student_feature_map must be a tuple of 1 tensors, got 2; give one for"):
        loss(student * 2, teacher)


def test_must_be_built():
    with pytest.raises(RuntimeError, match="PKD: build must be called before forward; put the loss into a kdvit"):
        PKD(**ONE)((draw(2, 3, 2, 2),), (draw(2, 3, 2, 2),))
