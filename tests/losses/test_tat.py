from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdvit.losses import TaT
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_tat")
NAMES = {"to_query.0": "query.conv2d", "to_query.1": "query.l2norm", "to_value.0": "value.conv2d",
         "to_value.1": "value.l2norm"}  # fmt: skip


def official(name: str) -> str:
    """Our parameter's name in the released code."""
    layer, _, rest = name.rpartition(".")
    return f"{NAMES[layer]}.{rest}"


def built(student: Tensor, teacher: Tensor, **options) -> TaT:
    loss = TaT(**options)
    torch.manual_seed(0)
    loss.build(*(ModelInfo.of(feature_map=SignalInfo.of("feature_map", x)) for x in (student, teacher)))
    return loss.to(student.dtype)


def maps(student=(3, 4, 3, 2), teacher=(3, 6, 3, 2), dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in (student, teacher))


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    student = case["in.student"].requires_grad_()
    loss = built(student, case["in.teacher"], num_heads=case.options["heads"])
    loss.load_state_dict({name: case[f"w.{official(name)}"] for name in loss.state_dict()})
    value = loss(student, case["in.teacher"])
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)
    own = dict(loss.named_parameters())
    assert len(own) == 6
    for name, parameter in own.items():
        assert_close(parameter.grad, case[f"wgrad.{official(name)}"], 1e-4)


def test_value_by_hand():
    # One channel, two positions: the student's (-1, 1) stays so through its layers, the teacher has (0, ln 3).
    student = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    teacher = torch.tensor([1.0, 3.0], dtype=torch.float64).log().view(1, 1, 1, 2)
    loss = built(student, teacher).eval()
    for layer in (loss.to_query[0], loss.to_value[0]):
        layer.weight.data.zero_()[0, 0, 1, 1] = (1 + 1e-5) ** 0.5  # the middle of the kernel, against BatchNorm's eps
    # q = -1: weights 3/4, 1/4 on v = -1, 1: -1/2; q = 1: weights 1/4, 3/4: 1/2.
    expected = (0.5**2 + (torch.tensor(3.0).log().item() - 0.5) ** 2) / 2
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("query", "num_heads"), [("student", 1), ("student", 3), ("teacher", 2)])
def test_equals_a_plain_loop(query, num_heads):
    student, teacher = maps()
    loss = built(student, teacher, query=query, num_heads=num_heads).eval()
    q, v = loss.to_query(student), loss.to_value(student)
    places = [(i, j) for i in range(3) for j in range(2)]
    width, total = 6 // num_heads, 0.0
    for b in range(3):
        for h in range(num_heads):
            part = slice(h * width, (h + 1) * width)
            for i in places:
                asks, keys = (q, teacher) if query == "student" else (teacher, q)
                scores = torch.stack([asks[b, part, *i] @ keys[b, part, *j] for j in places])
                rebuilt = sum(a * v[b, part, *j] for a, j in zip(scores.softmax(0), places, strict=True))
                total += (rebuilt - teacher[b, part, *i]).square().sum().item()
    assert loss(student, teacher).item() == pytest.approx(total / teacher.numel(), rel=1e-12)


@pytest.mark.parametrize("query", ["student", "teacher"])
def test_every_position_learns_from_any_other(query):
    """The paper's claim, one-to-all: with 1x1 kernels, a single position of the student still rebuilds all others."""
    student, teacher = maps()
    loss = built(student, teacher, query=query).eval()
    for layer in (loss.to_query[0], loss.to_value[0]):
        layer.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    student.requires_grad_()
    loss(student, teacher * torch.eye(6, dtype=torch.float64)[0].view(3, 2)).backward()
    assert (student.grad.abs().sum(dim=1) > 0).all()


def test_positions_may_move_together():
    """Without neighbours in the kernels, the loss knows no places: the same shuffle on both sides changes nothing."""
    student, teacher = maps()
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    for query in ("student", "teacher"):
        loss = built(student, teacher, query=query).eval()
        for layer in (loss.to_query[0], loss.to_value[0]):
            layer.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        shuffled = [x.flatten(2)[:, :, order].unflatten(2, (3, 2)) for x in (student, teacher)]
        torch.testing.assert_close(loss(*shuffled), loss(student, teacher))
        # Where the teacher asks, its positions may even move alone; as released, they say where the values are.
        alone = torch.allclose(loss(student, shuffled[1]), loss(student, teacher))
        assert alone == (query == "teacher")


def test_options_change_the_value():
    student, teacher = maps((3, 4, 4, 4), (3, 6, 2, 2))
    options = [{}, {"num_heads": 2}, {"query": "teacher"}, {"resize": "bicubic"}, {"resize": "nearest"}]
    values = [built(student, teacher, **option).eval()(student, teacher).item() for option in options]
    assert len({round(x, 9) for x in values}) == len(options)


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 4), (2, 2)), ((3, 2), (6, 4)), ((1, 1), (7, 7)), ((2, 5), (3, 4))]
)
@pytest.mark.parametrize("resize", ["pool", "bilinear"])
def test_other_grids_are_resized(student, teacher, resize):
    pair = maps((2, 4, *student), (2, 6, *teacher))
    assert built(*pair, resize=resize)(*pair).isfinite()


def test_no_score_for_every_pair_is_kept_for_backward():
    student, teacher = maps((1, 8, 16, 16), (1, 8, 16, 16), torch.float32)
    loss, sizes = built(student, teacher), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        loss(student, teacher)
    assert max(sizes) < 256 * 256


def test_refuses_what_cannot_work():
    student, teacher = maps()
    with pytest.raises(ValueError, match="TaT: num_heads must divide the teacher's width 6, got 4; the published"):
        built(student, teacher, num_heads=4)
    with pytest.raises(ValueError, match="TaT: num_heads must be > 0, got 0"):
        TaT(num_heads=0)
    with pytest.raises(ValueError, match="TaT: query must be a known one, got 'pupil'; Known: student, teacher."):
        TaT(query="pupil")
    with pytest.raises(ValueError, match="TaT: resize must be a known one, got 'area'"):
        TaT(resize="area")
    with pytest.raises(RuntimeError, match="TaT: build must be called before forward"):
        TaT()(student, teacher)
    with pytest.raises(ValueError, match="TaT: teacher_feature_map must have D=6 as in build, got D=5; build the loss"):
        built(student, teacher)(student, teacher[:, :5])
    with pytest.raises(ValueError, match=r"TaT: student_feature_map must have shape \(B, D, h, w\), got \(3, 4, 6\)"):
        built(student, teacher)(student.flatten(2), teacher)


def test_stages_are_where_it_reads():
    assert TaT(student_stage=2, teacher_stage="layer3").locations() == {
        "student_feature_map": 2,
        "teacher_feature_map": "layer3",
    }
