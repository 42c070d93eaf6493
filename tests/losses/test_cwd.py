from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import CWD
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_cwd")


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(student: Tensor, teacher: Tensor, **options) -> CWD:
    loss = CWD(**options)
    infos = (ModelInfo.of(**{loss.signal: SignalInfo.of(loss.signal, x)}) for x in (student, teacher))
    loss.build(*infos)
    return loss.to(student.dtype)


def value(student: Tensor, teacher: Tensor, **options) -> float:
    return built(student, teacher, **options)(student, teacher).item()


def test_cases_were_found():
    assert len(CASES) == 2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    student, teacher = case["in.student"].requires_grad_(), case["in.teacher"]
    options = {"temperature": case.options["temperature"], "norm": case.options["norm_type"]}
    loss = built(student, teacher, **options)
    result = loss(student, teacher)
    assert_close(result, case["out.loss"], 1e-5)
    result.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)
    dense = CWD(signal="dense_logits", **options)(student_dense_logits=student, teacher_dense_logits=teacher)
    assert_close(dense, case["out.loss"], 1e-5)


def test_value_by_hand():
    student = torch.tensor([[1.0, 1.0], [1.0, 3.0]]).log().view(1, 2, 1, 2)  # (1/2, 1/2) and (1/4, 3/4)
    teacher = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log().view(1, 2, 1, 2)  # (3/4, 1/4) and (1/4, 3/4)
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert value(student, teacher, temperature=1.0) == pytest.approx(first / 2, rel=1e-5)
    # Per position: (1/2, 1/2) against (3/4, 1/4), and (1/4, 3/4) against (1/4, 3/4).
    assert value(student, teacher, temperature=1.0, norm="spatial") == pytest.approx(first / 2, rel=1e-5)


@pytest.mark.parametrize("norm", ["channel", "spatial"])
def test_equals_a_plain_loop(norm):
    student, teacher, temperature = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1), 2.5
    total, count = 0.0, 0
    for image in range(2):
        for k in range(3 if norm == "channel" else 4):
            rows = [
                x[image].flatten(1)[k] if norm == "channel" else x[image].flatten(1)[:, k] for x in (student, teacher)
            ]
            weights = [[math.exp(v / temperature) for v in row.tolist()] for row in rows]
            s, t = ([w / sum(row) for w in row] for row in weights)
            total += sum(b * math.log(b / a) for a, b in zip(s, t, strict=True))
            count += 1
    expected = temperature**2 * total / count
    assert value(student, teacher, temperature=temperature, norm=norm) == pytest.approx(expected, rel=1e-9)


def test_what_an_offset_leaves_unchanged():
    teacher = maps(2, 3, 4, 4)
    per_channel, per_position = teacher + maps(2, 3, 1, 1, seed=1), teacher + maps(2, 1, 4, 4, seed=1)
    assert value(per_channel, teacher) == pytest.approx(0, abs=1e-12)
    assert value(per_position, teacher, norm="spatial") == pytest.approx(0, abs=1e-12)
    assert value(per_position, teacher) > 1e-2 and value(per_channel, teacher, norm="spatial") > 1e-2


def test_a_convolution_bridges_widths():
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    loss = built(student, teacher)
    (conv,) = loss.projector
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (3, 5, (1, 1))
    projected = F.conv2d(student, conv.weight, conv.bias)
    assert loss(student, teacher).item() == pytest.approx(value(projected, teacher), rel=1e-9)
    assert not list(built(student, student).parameters())


def test_options_change_the_value():
    student, teacher = maps(2, 3, 4, 4), maps(2, 3, 7, 7, seed=1)
    options = [{}, {"temperature": 1.0}, {"norm": "spatial"}, {"resize": "bilinear"}, {"resize": "nearest"}]
    assert len({round(value(student, teacher, **o), 5) for o in options}) == 5


def test_the_larger_map_is_pooled_whoever_has_it():
    student, teacher = maps(2, 3, 6, 6), maps(2, 3, 3, 3, seed=1)
    pooled = F.avg_pool2d(student, 2)
    assert value(student, teacher) == pytest.approx(value(pooled, teacher), rel=1e-9)
    assert value(teacher, student) == pytest.approx(value(teacher, pooled), rel=1e-9)


def test_what_it_reads():
    maps_of = CWD(student_stage=2, teacher_stage="layer3")
    assert maps_of.inputs() == ("student_feature_map", "teacher_feature_map")
    assert maps_of.locations() == {"student_feature_map": 2, "teacher_feature_map": "layer3"}
    logits = CWD(signal="dense_logits")
    assert logits.inputs() == ("student_dense_logits", "teacher_dense_logits") and logits.locations() == {}


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"temperature": 0}, ValueError, "CWD: temperature must be > 0, got 0; the published value is 4."),
        ({"temperature": "4"}, TypeError, "CWD: temperature must be a number > 0, got '4'; the published value is 4."),
        (
            {"norm": "chanel"},
            ValueError,
            "CWD: norm must be a known one, got 'chanel'; did you mean 'channel'? Known: channel, spatial.",
        ),
        (
            {"signal": "logits"},
            ValueError,
            "CWD: signal must be a known one, got 'logits'; did you mean 'dense_logits'? Known: feature_map, "
            "dense_logits.",
        ),
        (
            {"resize": "x"},
            ValueError,
            "CWD: resize must be a known one, got 'x'; Known: pool, bilinear, bicubic, nearest.",
        ),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, error, sentence):
    with pytest.raises(error) as caught:
        CWD(**options)
    assert str(caught.value) == sentence


def test_wrong_inputs_are_refused():
    x, wide = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    with pytest.raises(RuntimeError, match="CWD: build must be called before forward; put the loss into a kdvit.Dist"):
        CWD()(x, x)
    with pytest.raises(TypeError, match="CWD: student_dense_logits must be given where signal='dense_logits'; pass st"):
        CWD(signal="dense_logits")(x, x)
    with pytest.raises(ValueError, match="CWD: teacher_feature_map must have D=3 as in build, got D=5"):
        built(x, x)(x, wide)
    with pytest.raises(ValueError, match="CWD: teacher_dense_logits has C=5 but student_dense_logits has C=3; align"):
        built(x, wide, signal="dense_logits")
    with pytest.raises(
        ValueError, match=r"CWD: teacher_feature_map must have shape \(B, D, h, w\), got \(2, 3\); give"
    ):
        built(x, x)(x, x[:, :, 0, 0])
    with pytest.raises(ValueError, match="CWD: teacher_feature_map has B=1 but student_feature_map has B=2; give both"):
        built(x, x)(x, x[:1])


@pytest.mark.parametrize("signal", ["feature_map", "dense_logits"])
def test_a_single_position_is_refused(signal):
    x, y = maps(2, 3, 4, 4), maps(2, 3, 1, 1)
    with pytest.raises(ValueError) as caught:
        built(x, y, signal=signal)
    assert str(caught.value) == (
        "CWD: grids must have more than one position in common, got 4x4 and 1x1; "
        "choose earlier stages or larger images."
    )
    assert value(x, y, norm="spatial") > 1e-3
    with pytest.raises(ValueError, match="CWD: grids must have more than one position in common, got 1x1 and 4x4; ch"):
        built(x, x, signal=signal)(**{f"student_{signal}": y, f"teacher_{signal}": x})
