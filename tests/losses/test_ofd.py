from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import kdvit.losses
from kdvit.losses import OFD, batch_norm_margin
from kdvit.losses.loss import calibration_inputs
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_ofd")
ONE = {"student_stages": (-1,), "teacher_stages": (-1,)}
TWO = {"student_stages": (0.5, 1.0), "teacher_stages": (0.5, 1.0)}
OFFICIAL = {f"connector.{name}": f"connectors.0.{name}" for name in ("0.weight", "1.weight", "1.bias")}
Maps = tuple[Tensor, ...]


def model(maps: Maps) -> ModelInfo:
    return ModelInfo.of("tiny", pre_activation=tuple(SignalInfo.of("pre_activation", x) for x in maps))


def built(loss: OFD, student: Maps, teacher: Maps) -> OFD:
    torch.manual_seed(0)
    loss.build(model(student), model(teacher))
    return loss.to(student[0].dtype)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def official_norm(case) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(case["in.teacher"].shape[1])
    prefix = "teacher_bn."
    norm.load_state_dict({k.removeprefix(prefix): x for k, x in case.group("w").items() if k.startswith(prefix)})
    return norm


class Same(nn.Module):
    """A connector that leaves the map as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def plain(margins: list, student: Maps, teacher: Maps, **options) -> OFD:
    """With the student's own maps instead of connected ones."""
    loss = built(OFD(margins, **options), student, teacher)
    loss.connectors = nn.ModuleList(Same() for _ in student)
    return loss


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    """One layer; the released loss is divided by the batch size outside."""
    student, teacher = case["in.student"].requires_grad_(), case["in.teacher"]
    margin = batch_norm_margin(official_norm(case))
    assert_close(margin, case["out.margin"].flatten(), 1e-6)
    loss = built(OFD([margin], **ONE), (student,), (teacher,))
    state = {ours: case[f"w.{theirs}"] for theirs, ours in OFFICIAL.items()}
    assert not loss.load_state_dict(state, strict=False).unexpected_keys
    value = loss((student,), (teacher,)) * len(student)
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)
    assert {name for name, _ in loss.named_parameters()} == set(OFFICIAL.values())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_wrong_margin_is_not_the_official_loss(case):
    """The parity above depends on the margins."""
    student, teacher = case["in.student"], case["in.teacher"]
    loss = built(OFD([torch.zeros(10)], **ONE), (student,), (teacher,))
    loss.load_state_dict({ours: case[f"w.{theirs}"] for theirs, ours in OFFICIAL.items()}, strict=False)
    assert abs(loss((student,), (teacher,)) * len(student) - case["out.loss"]) > 1e-3 * case["out.loss"]


@pytest.mark.parametrize(("bias", "weight"), [(0.0, 1.0), (0.7, 2.0), (-1.5, -0.5), (2.9, 1.0), (-3.0, 0.01)], ids=str)
def test_the_margin_is_the_mean_of_the_negative_part(bias, weight):
    """Against an integral over the normal distribution."""
    norm = nn.BatchNorm1d(1)
    nn.init.constant_(norm.bias, bias)
    nn.init.constant_(norm.weight, weight)
    x = torch.linspace(bias - 12 * abs(weight), 0, 200001, dtype=torch.float64)
    density = (-(((x - bias) / weight) ** 2) / 2).exp()
    assert batch_norm_margin(norm).item() == pytest.approx(((x * density).sum() / density.sum()).item(), rel=1e-3)


def test_margins_where_next_to_nothing_is_negative():
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([3.2, -1.0, 1.0, 0.0]))
        norm.weight.copy_(torch.tensor([-1.0, 0.0, 0.0, 0.0]))
    # Mean 3.2 deviations above 0: -3 deviations; a channel without deviation is what it is, where negative.
    assert batch_norm_margin(norm).tolist() == pytest.approx([-3.0, -1.0, 0.0, 0.0])
    assert batch_norm_margin(nn.BatchNorm2d(2, affine=False)).tolist() == pytest.approx([-math.sqrt(2 / math.pi)] * 2)
    assert not batch_norm_margin(norm).requires_grad


def test_value_by_hand():
    """Per element: teacher, student, and what it costs with a margin of -1."""
    rows = [
        (2.0, 0.5, 1.5**2),  # positive: any difference counts
        (2.0, 3.0, 1.0),
        (-0.5, -3.0, 0.0),  # negative: a student that is below it is right
        (-0.5, 0.5, 1.0),
        (-4.0, -0.5, 0.5**2),  # the target is the margin
        (-4.0, -2.0, 0.0),
        (0.0, -1.0, 0.0),
    ]
    teacher, student, costs = (torch.tensor(column).view(1, 1, 1, -1) for column in zip(*rows))
    loss = plain([[-1.0]], (student,), (teacher,), **ONE)
    assert loss((student,), (teacher,)).item() == pytest.approx(costs.sum().item())
    both = student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1)
    assert loss((both[0],), (both[1],)).item() == pytest.approx(costs.sum().item())  # a mean over images


def test_shallow_stages_count_half_as_much_as_the_next():
    maps = tuple(torch.full((2, 1, 1, 1), 3.0) for _ in range(3))
    zeros = tuple(torch.zeros_like(x) for x in maps)
    thirds = {"student_stages": (0.3, 0.6, 1.0), "teacher_stages": (0.3, 0.6, 1.0)}
    loss = plain([[-1.0]] * 3, maps, maps, **thirds)
    for k, weight in enumerate((1 / 4, 1 / 2, 1)):
        student = (*maps[:k], zeros[k], *maps[k + 1 :])
        assert loss(student, maps).item() == pytest.approx(9 * weight)


def test_equals_a_plain_loop():
    """Two stages; the teacher's larger grid is averaged two by two, after the margin."""
    student, teacher = (
        (draw(3, 2, 2, 3), draw(3, 3, 2, 2, seed=1)),
        (draw(3, 4, 2, 3, seed=2), draw(3, 2, 4, 4, seed=3)),
    )
    margins = [[-0.1, -0.2, -0.3, -0.4], [-0.5, -0.6]]
    loss = built(OFD(margins, **TWO), student, teacher)
    total = 0.0
    for stage, (s, t) in enumerate(zip(student, teacher, strict=True)):
        weight = loss.connectors[stage][0].weight[:, :, 0, 0]
        x = torch.einsum("dc,bcyx->bdyx", weight, s)
        x = (x - x.mean(dim=(0, 2, 3), keepdim=True)) / (x.var(dim=(0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        for b in range(3):
            for c in range(t.shape[1]):
                target = torch.tensor([[max(v, margins[stage][c]) for v in row] for row in t[b, c].tolist()])
                if stage == 1:
                    target = sum(target[i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
                for got, wanted in zip(x[b, c].flatten().tolist(), target.flatten().tolist()):
                    if got > wanted or wanted > 0:
                        total += (got - wanted) ** 2 * (0.5, 1.0)[stage] / 3
    assert loss(student, teacher).item() == pytest.approx(total, rel=1e-6)


def test_measured_margins():
    """The mean of what is negative; -3 deviations where nothing is; per channel and stage."""
    teacher = torch.tensor([[-1.0, -3.0, 5.0, 7.0], [1.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    shallow = teacher.reshape(3, 2, 1, 2).transpose(0, 1)  # channel c of both images: row c
    deep = -torch.ones(2, 1, 1, 1)
    loss = built(OFD(**TWO), (shallow, deep), (shallow, deep))
    assert loss.needs_calibration() and calibration_inputs(loss) == ("teacher_pre_activation",)
    loss.calibrate((shallow, deep))
    assert not loss.needs_calibration()
    assert loss.margin_0.tolist() == pytest.approx([-2.0, -3.0, 0.0]) and loss.margin_1.tolist() == [-1.0]


def test_a_share_of_a_thousandth_is_next_to_nothing():
    for num_negative, margin in ((1, None), (3, -5.0)):
        x = torch.ones(1, 1, 1, 2000)
        x[..., :num_negative] = -5.0
        loss = built(OFD(**ONE), (x,), (x,))
        loss.calibrate((x,))
        expected = -3 * x.std(correction=0).item() if margin is None else margin
        assert loss.margin_0.item() == pytest.approx(expected, rel=1e-5)


def test_measured_margins_agree_with_the_analytic_ones():
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([0.5, -0.5, 0.0]))
        norm.weight.copy_(torch.tensor([1.0, 0.3, 2.0]))
    teacher = norm.train()(draw(200, 3, 10, 10).float()).detach()
    loss = built(OFD(**ONE), (teacher,), (teacher,))
    loss.calibrate((teacher,))
    torch.testing.assert_close(loss.margin_0, batch_norm_margin(norm), rtol=0.05, atol=0)


def test_calibration_changes_the_value_and_is_kept():
    student, teacher = (draw(3, 2, 2, 2).float(),), (draw(3, 4, 2, 2, seed=1).float(),)
    loss = built(OFD(**ONE), student, teacher)
    before = loss(student, teacher)
    loss.calibrate(teacher)
    value = loss(student, teacher)
    assert abs(value - before) > 1e-3
    loaded = built(OFD(**ONE), student, teacher)
    loaded.load_state_dict(loss.state_dict())
    for twin in (loaded, copy.deepcopy(loss)):
        assert not twin.needs_calibration()
        torch.testing.assert_close(twin(student, teacher), value, rtol=0, atol=0)
    loss.build(model(student), model(teacher))
    assert loss.needs_calibration()


def test_given_margins_need_no_calibration():
    student, teacher = (draw(3, 2, 2, 2),), (draw(3, 4, 2, 2, seed=1),)
    loss = built(OFD(margins=[torch.tensor([-0.1, -0.2, -0.3, 0.0])], **ONE), student, teacher)
    assert not loss.needs_calibration() and calibration_inputs(loss) == ()
    twin = built(eval(repr(loss), vars(kdvit.losses)), student, teacher)
    assert repr(twin) == repr(loss) and twin.margins[0] == pytest.approx((-0.1, -0.2, -0.3, 0.0))
    torch.testing.assert_close(twin(student, teacher), loss(student, teacher), rtol=0, atol=0)
    other = built(OFD(margins=[[-1.0, -1.0, -1.0, -1.0]], **ONE), student, teacher)
    assert abs(other(student, teacher) - loss(student, teacher)) > 1e-3


def test_the_convolution_begins_as_released():
    student, teacher = (torch.zeros(2, 64, 2, 2),), (torch.zeros(2, 100, 2, 2),)
    connector = built(OFD(**ONE), student, teacher).connectors[0]
    assert connector[0].weight.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.05)
    assert connector[0].bias is None and len(connector) == 2


def test_options_change_the_value():
    def value(**options) -> float:
        maps = (draw(2, 3, 2, 2),), (draw(2, 3, 4, 5, seed=1),)
        return built(OFD([[-0.5] * 3], **ONE | options), *maps)(*maps).item()

    values = [value(resize=how) for how in ("pool", "bilinear", "bicubic", "nearest")]
    assert all(abs(x - y) > 1e-6 for i, x in enumerate(values) for y in values[:i])
    locations = OFD(student_stages=[2, -1], teacher_stages=("layer3", 1.0)).locations()
    assert locations == {"student_pre_activation": (2, -1), "teacher_pre_activation": ("layer3", 1.0)}


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"margins": [[-1.0]]},
            ValueError,
            "OFD: margins must be as many as teacher_stages, got 1 for 4; they are paired in order.",
        ),
        (
            {"margins": [[-1.0, 0.5]], **ONE},
            ValueError,
            "OFD: margins[0] must be finite numbers <= 0, one per channel, got [-1.0, 0.5]; None measures them.",
        ),
        (
            {"margins": [[[-1.0]]], **ONE},
            ValueError,
            "OFD: margins[0] must be finite numbers <= 0, one per channel, got [[-1.0]]; None measures them.",
        ),
        (
            {"margins": ["low"], **ONE},
            TypeError,
            "OFD: margins must be one list of numbers per stage, got ['low']; or pass None to measure them.",
        ),
        (
            {"margins": -1.0, **ONE},
            TypeError,
            "OFD: margins must be one list of numbers per stage, got -1.0; or pass None to measure them.",
        ),
        (
            {"resize": "none"},
            ValueError,
            "OFD: resize must be a known one, got 'none'; Known: pool, bilinear, bicubic, nearest.",
        ),
        (
            {"student_stages": (1, 2)},
            ValueError,
            "OFD: teacher_stages must be as many as student_stages, got 4 for 2; they are paired in order.",
        ),
    ],
    ids=["number", "positive", "shape", "word", "one number", "resize", "pairs"],
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        OFD(**options)
    assert str(caught.value) == sentence


def test_refuses_other_inputs():
    student, teacher = (draw(2, 3, 2, 2),), (draw(2, 4, 2, 2),)
    loss = built(OFD(**ONE), student, teacher)
    with pytest.raises(ValueError) as caught:
        loss(student, (teacher[0][:, :2],))
    assert str(caught.value) == (
        "OFD: teacher_pre_activation must have D=4 as in build, got D=2; build the loss for these models."
    )
    with pytest.raises(ValueError) as caught:
        OFD([[-1.0] * 3], **ONE).build(model(student), model(teacher))
    assert str(caught.value) == (
        "OFD: margins[0] must have D=4 numbers for 'tiny' at 'given', got 3; give one per channel."
    )
    with pytest.raises(ValueError) as caught:
        loss.calibrate((teacher[0] / 0,))
    assert str(caught.value) == (
        "OFD: teacher_pre_activation must be finite and not empty; check the calibration images."
    )
    with pytest.raises(ValueError, match="OFD: teacher_pre_activation must be finite and not empty; check the calib"):
        loss.calibrate((teacher[0][:0],))


@pytest.mark.parametrize("call", [lambda loss, x: loss(x, x), lambda loss, x: loss.calibrate(x)], ids=["run", "fit"])
def test_must_be_built(call):
    with pytest.raises(RuntimeError, match="OFD: build must be called before forward; put the loss into a kdvit"):
        call(OFD(**ONE), (draw(2, 3, 2, 2),))
