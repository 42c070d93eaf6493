from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kdvit.losses import NST
from kdvit.losses.nst import between_channels, between_positions
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_nst")


def single(**options) -> NST:
    return NST(student_stages=(-1,), teacher_stages=(-1,), **options)


def value(student: Tensor, teacher: Tensor, **options) -> float:
    return single(**options)((student,), (teacher,)).item()


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    students = tuple(case[f"in.s{i}"].requires_grad_() for i in range(2))
    teachers = tuple(case[f"in.t{i}"] for i in range(2))
    loss = NST(student_stages=(0.5, 1.0), teacher_stages=(0.5, 1.0))(students, teachers)
    assert_close(loss, case["out.loss"], 1e-5)
    for i in range(2):
        assert_close(single()(students[i : i + 1], teachers[i : i + 1]), case[f"out.loss{i}"], 1e-5)
    loss.backward()
    for i in range(2):
        assert_close(students[i].grad, case[f"grad.s{i}"], 1e-5)


def test_value_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # a channel for either position
    teacher = torch.tensor([1.0, 1.0]).view(1, 1, 1, 2)  # one channel for both
    assert value(student, teacher) == pytest.approx(1 / 2 + 1 - 2 * 1 / 2)


def test_equals_a_plain_loop():
    student, teacher = maps(2, 3, 2, 3), maps(2, 4, 2, 3, seed=1)

    def kernel(x: Tensor, y: Tensor) -> float:
        pairs = [((a / a.norm()) * (b / b.norm())).sum().item() ** 2 for a in x.flatten(1) for b in y.flatten(1)]
        return sum(pairs) / len(pairs)

    loop = sum(kernel(s, s) + kernel(t, t) - 2 * kernel(s, t) for s, t in zip(student, teacher, strict=True)) / 2
    assert value(student, teacher) == pytest.approx(loop, rel=1e-9)


def test_both_forms_are_the_same_number():
    x, y = (F.normalize(maps(2, dim, 9, seed=dim), dim=2).requires_grad_() for dim in (5, 7))
    first, second = between_channels(x, y), between_positions(x, y)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(torch.autograd.grad(first, x), torch.autograd.grad(second, x))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.numel = max([self.numel, *(x.numel() for x in made if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize(("dims", "side"), [((24, 32), 3), ((4, 6), 10)], ids=["few positions", "few channels"])
def test_the_smaller_matrices_are_held(dims, side):
    student, teacher = maps(2, dims[0], side, side).requires_grad_(), maps(2, dims[1], side, side)
    with Largest() as largest:
        single()((student,), (teacher,)).backward()
    assert largest.numel == teacher.numel()  # nothing is larger than what came in


def test_channels_may_be_reordered_scaled_and_repeated():
    teacher = maps(2, 6, 3, 3)
    scales = torch.tensor([1.0, -2.0, 3.0, 0.5, -0.1, 9.0]).view(6, 1, 1)
    student = torch.cat([(teacher * scales).flip(1), teacher], dim=1)
    assert value(student, teacher) == pytest.approx(0, abs=1e-12)
    assert value(student[:, :7], teacher) > 1e-3


def test_options_change_the_value():
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 7, 7, seed=1)
    values = [value(student, teacher, resize=how) for how in ("pool", "bilinear", "bicubic", "nearest")]
    assert len({round(v, 6) for v in values}) == 4


def test_the_larger_map_is_pooled_whoever_has_it():
    student, teacher = maps(2, 3, 6, 6), maps(2, 5, 3, 3, seed=1)
    pooled = F.avg_pool2d(student, 2)
    assert value(student, teacher) == pytest.approx(value(pooled, teacher), rel=1e-9)
    assert value(teacher, student) == pytest.approx(value(teacher, pooled), rel=1e-9)


def test_pairs_are_added_and_read_where_they_are_named():
    student, teacher = (maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)), (maps(2, 5, 4, 4, seed=2),) * 2
    loss = NST(student_stages=(0, "layer2"), teacher_stages=(0.5, -1))
    separate = value(student[0], teacher[0]) + value(student[1], teacher[1])
    assert loss(student, teacher).item() == pytest.approx(separate)
    assert loss.locations() == {"student_feature_map": (0, "layer2"), "teacher_feature_map": (0.5, -1)}


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="NST: resize must be a known one, got 'polo'; did you mean 'pool'?"):
        NST(resize="polo")
    with pytest.raises(ValueError, match="NST: teacher_stages must be as many as student_stages, got 4 for 1; they"):
        NST(student_stages=(1,))
    with pytest.raises(TypeError, match=r"NST: teacher_stages must be a sequence, got 'layer4'; write \('layer4',\)"):
        NST(teacher_stages="layer4")


def test_wrong_inputs_are_refused():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="NST: teacher_feature_map must be a tuple of 1 tensors, got Tensor; give one"):
        single()((x,), x)
    with pytest.raises(ValueError, match=r"NST: student_feature_map must have shape \(B, D, h, w\), got \(2, 3, 4\)"):
        single()((x[..., 0],), (x,))
    with pytest.raises(ValueError, match="NST: teacher_feature_map has B=1 but student_feature_map has B=2; give both"):
        single()((x,), (x[:1],))


def test_a_single_position_alone_is_refused():
    def info(*sides: int) -> ModelInfo:
        return ModelInfo.of(
            feature_map=tuple(SignalInfo("feature_map", "given", (3, n, n), grid=(n, n)) for n in sides)
        )

    loss = NST(student_stages=(0, -1), teacher_stages=(0, -1))
    loss.build(info(4, 4), info(2, 1))  # one pair of the two can be compared
    with pytest.raises(ValueError) as caught:
        loss.build(info(4, 4), info(1, 1))
    assert str(caught.value) == (
        "NST: grids must have more than one position in common, got 4x4 and 1x1; "
        "choose earlier stages or larger images."
    )
    one, other, wide = maps(2, 3, 1, 1), maps(2, 5, 1, 1, seed=1), maps(2, 5, 4, 4, seed=2)
    with pytest.raises(ValueError, match="grids must have more than one position in common, got 1x1 and 4x4; choose"):
        single()((one,), (wide,))
    both = loss((wide, one), (2 * wide.roll(1, dims=2), other))
    assert both.item() == pytest.approx(value(wide, wide.roll(1, dims=2)))
