from __future__ import annotations

import pytest
import torch

from kdvit.losses import AT
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_at")


def single(**options) -> AT:
    return AT(student_stages=(-1,), teacher_stages=(-1,), **options)


def value(student: torch.Tensor, teacher: torch.Tensor, **options) -> float:
    return single(**options)((student,), (teacher,)).item()


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    students = tuple(case[f"in.s{i}"].requires_grad_() for i in range(2))
    teachers = tuple(case[f"in.t{i}"] for i in range(2))
    loss = AT(student_stages=(0.5, 1.0), teacher_stages=(0.5, 1.0))(students, teachers)
    assert_close(loss, case["out.loss"], 1e-5)
    for i in range(2):
        assert_close(single()(students[i : i + 1], teachers[i : i + 1]), case[f"out.loss{i}"], 1e-5)
    loss.backward()
    for i in range(2):
        assert_close(students[i].grad, case[f"grad.s{i}"], 1e-5)


def test_value_by_hand():
    student = torch.tensor([3.0, 4.0]).sqrt().view(1, 1, 2, 1)  # energies 3 and 4: (0.6, 0.8)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 2, 2, 1)  # (1, 0)
    assert value(student, teacher) == pytest.approx((0.4**2 + 0.8**2) / 2)


def test_equals_a_plain_loop():
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 2, 4, seed=1)
    pooled = (student[:, :, 0::2] + student[:, :, 1::2]) / 2
    total = 0.0
    for image in range(2):
        energies = []
        for x in (pooled, teacher):
            energy = [sum(v**2 for v in x[image, :, h, w].tolist()) for h in range(2) for w in range(4)]
            length = sum(e**2 for e in energy) ** 0.5
            energies.append([e / length for e in energy])
        total += sum((s - t) ** 2 for s, t in zip(*energies, strict=True))
    assert value(student, teacher) == pytest.approx(total / (2 * 8), rel=1e-9)


def test_channels_may_be_mixed_and_maps_scaled():
    teacher = maps(2, 6, 3, 3)
    rotation = torch.linalg.qr(maps(6, 6, seed=1)).Q
    student = 7 * torch.einsum("cd,bdhw->bchw", rotation, teacher)
    assert value(student, teacher) == pytest.approx(0, abs=1e-12)
    assert value(student, teacher, power=4) > 1e-4  # only squares survive a rotation


def test_pairs_are_added():
    student, teacher = (maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)), (maps(2, 5, 4, 4, seed=2),) * 2
    both = AT(student_stages=(0, 1), teacher_stages=(0, 1))(student, teacher).item()
    assert both == pytest.approx(value(student[0], teacher[0]) + value(student[1], teacher[1]))


def test_options_change_the_value():
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 7, 7, seed=1)
    values = [value(student, teacher, **o) for o in ({}, {"power": 1}, {"power": 3}, {"resize": "bilinear"})]
    values += [value(student, teacher, resize=how) for how in ("bicubic", "nearest")]
    assert len({round(v, 6) for v in values}) == 6


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_every_power_is_finite_for_large_activations_and_for_none(power):
    for student in (1e4 * maps(2, 3, 4, 4).float(), torch.zeros(2, 3, 4, 4)):
        student.requires_grad_()
        loss = single(power=power)((student,), (1e4 * maps(2, 3, 4, 4, seed=1).float(),))
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()


def test_stages_are_where_it_reads():
    loss = AT(student_stages=(0, "layer2"), teacher_stages=(0.5, -1))
    assert loss.locations() == {"student_feature_map": (0, "layer2"), "teacher_feature_map": (0.5, -1)}
    assert AT().locations()["student_feature_map"] == (0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"power": 0}, ValueError, "AT: power must be > 0, got 0; the published value is 2."),
        ({"power": 2.0}, TypeError, "AT: power must be an integer > 0, got 2.0; the published value is 2."),
        (
            {"resize": "pol"},
            ValueError,
            "AT: resize must be a known one, got 'pol'; did you mean 'pool'? Known: pool, bilinear, bicubic, nearest.",
        ),
        (
            {"student_stages": (0, 1)},
            ValueError,
            "AT: teacher_stages must be as many as student_stages, got 4 for 2; they are paired in order.",
        ),
        ({"student_stages": -1}, TypeError, "AT: student_stages must be a sequence, got -1; write (-1,) for one."),
        ({"student_stages": 0.5}, TypeError, "AT: student_stages must be a sequence, got 0.5; write (0.5,) for one."),
        ({"student_stages": None}, TypeError, "AT: student_stages must be a sequence, got None; write (-1,) for one."),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, error, sentence):
    with pytest.raises(error) as caught:
        AT(**options)
    assert str(caught.value) == sentence


def test_wrong_inputs_are_refused():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="AT: student_feature_map must be a tuple of 1 tensors, got 2; give one for"):
        single()((x, x), (x,))
    with pytest.raises(ValueError, match=r"AT: teacher_feature_map must have shape \(B, D, h, w\), got \(2, 3\); give"):
        single()((x,), (x[:, :, 0, 0],))
    with pytest.raises(ValueError, match="AT: teacher_feature_map has B=1 but student_feature_map has B=2; give both"):
        single()((x,), (x[:1],))


def test_a_single_position_alone_is_refused():
    def info(*sides: int) -> ModelInfo:
        return ModelInfo.of(
            feature_map=tuple(SignalInfo("feature_map", "given", (3, n, n), grid=(n, n)) for n in sides)
        )

    loss = AT(student_stages=(0, -1), teacher_stages=(0, -1))
    loss.build(info(4, 4), info(2, 1))  # one pair of the two can be compared
    with pytest.raises(ValueError) as caught:
        loss.build(info(4, 4), info(1, 1))
    assert str(caught.value) == (
        "AT: grids must have more than one position in common, got 4x4 and 1x1; choose earlier stages or larger images."
    )
    one, other, wide = maps(2, 3, 1, 1), maps(2, 5, 1, 1, seed=1), maps(2, 5, 4, 4, seed=2)
    with pytest.raises(ValueError, match="grids must have more than one position in common, got 1x1 and 4x4; choose"):
        single()((one,), (wide,))
    both = loss((wide, one), (2 * wide.roll(1, dims=2), other))
    assert both.item() == pytest.approx(value(wide, wide.roll(1, dims=2)))
