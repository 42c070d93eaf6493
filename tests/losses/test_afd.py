from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdvit.losses import AFD
from kdvit.losses.activity import activity, as_direction
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import GoldenCase, assert_close, golden

CASES = golden("feature_afd")
PATHS = {
    "attention.linear_trans_s.key_layer": "keys",
    "attention.linear_trans_t.query_layer": "queries",
    "attention.linear_trans_s.bilinear": "bilinear",
    "attention.p_s": "student_places",
    "attention.p_t": "teacher_places",
    ".linear.": ".0.",
    ".bn.": ".1.",
}
#: Biases that a BatchNorm or the softmax takes away.
LEFT_OUT = (".linear.bias", "bilinear.bn.bias")


def ours(name: str) -> str:
    for theirs, our in PATHS.items():
        name = name.replace(theirs, our)
    return name


def built(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], **options) -> AFD:
    loss = AFD(tuple(range(len(student))), tuple(range(len(teacher))), **options)
    models = [
        ModelInfo.of(feature_map=tuple(SignalInfo.of("feature_map", x) for x in maps)) for maps in (student, teacher)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss.build(*models)
    return loss


def maps(*shapes: tuple[int, ...], batch: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)


def official(case: GoldenCase) -> tuple[AFD, tuple[Tensor, ...], tuple[Tensor, ...]]:
    inputs = case.group("in")
    student = tuple(inputs[name].requires_grad_() for name in sorted(inputs) if name.startswith("s"))
    teacher = tuple(inputs[name] for name in sorted(inputs) if name.startswith("t"))
    loss = built(student, teacher, attention_dim=case.options["qk_dim"])
    loss.load_state_dict({ours(name): x for name, x in case.group("w").items() if not name.endswith(LEFT_OUT)})
    return loss, student, teacher


def test_the_case_was_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    loss, student, teacher = official(case)
    value = loss(student, teacher)
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    for number, x in enumerate(student):
        assert_close(x.grad, case[f"grad.s{number}"], 1e-4)
    grads = {name: p.grad for name, p in loss.named_parameters()}
    expected = {ours(name): x for name, x in case.group("wgrad").items() if not name.endswith(LEFT_OUT)}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-4)
    # The biases that we leave out got nothing but rounding noise.
    largest = max(x.abs().max() for x in expected.values())
    noise = [x.abs().max() for name, x in case.group("wgrad").items() if name.endswith(LEFT_OUT)]
    assert len(noise) == 7 and max(noise) < 1e-5 * largest


def test_value_by_hand():
    # Where the student's maps are active: at the left alone, and at both alike; the teacher's: at the right alone.
    left, both, right = (torch.tensor(x).sqrt().view(1, 1, 1, 2) for x in ([4.0, 0.0], [3.0, 3.0], [0.0, 5.0]))
    loss = built((left, both), (right,), attention_dim=1).eval()
    for parameter in (loss.keys[0][0], loss.keys[1][0], loss.bilinear[0], loss.queries[0][0]):
        torch.nn.init.zeros_(parameter.weight)  # the places alone choose
    with torch.no_grad():
        loss.teacher_places.fill_(1.0)
        loss.student_places.copy_(torch.tensor([[0.0], [math.log(3)]]))  # 1/4 and 3/4
    # (1 + 1) / 2 positions, and (1/2 + (1 - 1/sqrt 2)^2) / 2
    by_hand = 0.25 * 1 + 0.75 * (0.5 + (1 - 0.5**0.5) ** 2) / 2
    assert loss((left, both), (right,)).item() == pytest.approx(by_hand, rel=1e-6)


def test_equals_a_plain_loop():
    """Maps of different widths and grids, and more of the teacher than of the student."""
    student = maps((3, 4, 4), (5, 2, 2))
    teacher = maps((4, 2, 2), (6, 4, 4), (2, 2, 2), seed=1)
    loss = built(student, teacher, attention_dim=3).double().eval()
    scale = (1 + 1e-5) ** -0.5  # BatchNorm as it is at the start, in eval mode
    keys = [
        [(k[0].weight @ x[i].mean((1, 2)) * scale).clamp_min(0) for k, x in zip(loss.keys, student)] for i in range(3)
    ]
    total = 0.0
    for t, target in enumerate(teacher):
        for i in range(3):
            query = loss.queries[t][0].weight @ target[i].mean((1, 2)) * scale
            scores = []
            for s in range(2):
                wanted = (loss.bilinear[0].weight @ keys[i][s] * scale)[3 * t : 3 * t + 3]
                scores.append((wanted @ query + loss.teacher_places[t] @ loss.student_places[s]) / 3**0.5)
            for weight, x in zip(torch.stack(scores).softmax(0), student, strict=True):
                active = torch.nn.functional.adaptive_avg_pool2d(x[i].square().mean(0)[None], target.shape[2:])
                theirs = target[i].square().mean(0)
                total += weight * (active / active.norm() - theirs / theirs.norm()).square().mean() / 3
    torch.testing.assert_close(loss(student, teacher), total)


def test_one_pair_of_the_same_activity_is_a_perfect_match():
    """Neither the width, the sign, the order of channels nor the scale of a map plays a part."""
    (teacher,) = maps((4, 3, 3))
    student = -7 * teacher[:, [3, 1, 0, 2]].repeat(1, 2, 1, 1)
    loss = built((student,), (teacher,)).double()
    assert loss((student,), (teacher,)).item() < 1e-12
    assert loss((student.flip(2),), (teacher,)).item() > 1e-3


def test_what_is_near_is_chosen_more_and_more():
    """The choice is trained by the loss: the teacher's map finds the student's that is like it."""
    near, far = maps((4, 3, 3), (4, 3, 3), batch=8)
    student = tuple(x.float() for x in (far, near))
    teacher = (student[1] + 0.1,)
    loss = built(student, teacher, attention_dim=8)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    chosen = loss._attention(student, teacher)
    assert chosen.shape == (8, 1, 2) and chosen[:, :, 1].min() > 0.8
    torch.testing.assert_close(chosen.sum(2), torch.ones(8, 1))


def test_options_change_the_value():
    student, teacher = maps((3, 4, 4), (3, 4, 4)), maps((3, 4, 4), seed=1)
    values = {built(student, teacher, attention_dim=d).double()(student, teacher).item() for d in (2, 128)}
    assert len(values) == 2
    assert AFD((0, 2), ("blocks.1",)).locations() == {
        "student_feature_map": (0, 2),
        "teacher_feature_map": ("blocks.1",),
    }


def test_activity():
    x = torch.tensor([[-3.0, 1.0], [1.0, -1.0]]).view(1, 2, 1, 2)  # two channels, two positions
    assert activity(x).flatten().tolist() == [5.0, 1.0]
    assert activity(x, 1).flatten().tolist() == [2.0, 1.0]
    assert as_direction(activity(torch.zeros(1, 2, 1, 2))).tolist() == [[0.0, 0.0]]


def test_refuses_maps_of_one_position_alone():
    student, teacher = maps((3, 4, 4)), maps((3, 1, 1), (3, 2, 1))
    assert built(student, teacher).double()(student, teacher) > 0
    with pytest.raises(ValueError) as caught:
        built(student, teacher[:1])
    assert str(caught.value) == (
        "AFD: grids must have more than one position in common, got 1x1 and 1x1; choose earlier stages or larger "
        "images."
    )
    with pytest.raises(ValueError, match="AFD: grids must have more than one position in common, got 1x1 and 1x1"):
        built(teacher[:1], student)


def test_refuses_what_does_not_fit():
    student, teacher = maps((3, 4, 4), (3, 4, 4)), maps((3, 4, 4))
    loss = built(student, teacher)
    for given, sentence in (
        ((student, teacher * 2), "AFD: teacher_feature_map must be a tuple of 1 tensors, got 2; give one for each"),
        ((student[0], teacher), "AFD: student_feature_map must be a tuple of 2 tensors, got Tensor; give one"),
        ((student, (teacher[0][:2],)), "AFD: teacher_feature_map has B=2 but student_feature_map has B=3; give both"),
        (((student[0], student[1][:2]), teacher), "AFD: teacher_feature_map has B=3 but student_feature_map has B=2;"),
        (
            (student, (teacher[0].flatten(2),)),
            r"AFD: teacher_feature_map must have shape \(B, D, h, w\), got \(3, 3, 16",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            loss(*given)


def test_errors():
    with pytest.raises(ValueError, match="AFD: attention_dim must be > 0, got 0; the published value is 128."):
        AFD(attention_dim=0)
    with pytest.raises(TypeError, match="AFD: student_stages must be a sequence, got -1; write"):
        AFD(student_stages=-1)
    with pytest.raises(ValueError, match="AFD: teacher_stages must name at least one location, got none; name the"):
        AFD(teacher_stages=())
    with pytest.raises(RuntimeError, match="AFD: build must be called before forward; put the loss into a kdvit"):
        AFD()(maps((3, 4, 4)), maps((3, 4, 4)))
