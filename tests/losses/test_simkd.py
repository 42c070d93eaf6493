from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdvit.losses import SimKD
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

#: The others of the file are SRRL's (test_srrl.py).
CASES = {name: case for name, case in golden("feature_simkd").items() if not name.startswith("srrl")}


def built(student: Tensor, teacher: Tensor, pooled: Tensor | None = None, **options) -> SimKD:
    loss = SimKD(**options)
    pooled = teacher.mean(dim=(2, 3)) if pooled is None else pooled
    signals = {"pooled": SignalInfo.of("pooled", pooled)}
    if loss.feature == "feature_map":
        signals["feature_map"] = SignalInfo.of("feature_map", teacher)
    loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", student)), ModelInfo.of("teacher", **signals))
    return loss.to(student.dtype)


def call(loss: SimKD, student: Tensor, teacher: Tensor) -> Tensor:
    return loss(student, teacher.mean(dim=(2, 3)), teacher)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss_and_deploys_its_logits(case):
    student, teacher = case["in.student"].requires_grad_(), case["in.teacher"]
    loss = built(student, teacher, factor=case.options["factor"])
    weights = {name.removeprefix("transfer."): x for name, x in case.group("w").items() if name.startswith("transfer")}
    loss.projector.load_state_dict(weights)
    value = call(loss, student, teacher)
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)
    grads = {name.removeprefix("transfer."): x for name, x in case.group("wgrad").items()}
    assert grads.keys() == {name for name, _ in loss.projector.named_parameters()}
    for name, grad in grads.items():
        assert_close(loss.projector.get_parameter(name).grad, grad, 1e-5)
    head = nn.Linear(*reversed(case["w.head.weight"].shape)).requires_grad_(False)
    head.load_state_dict({"weight": case["w.head.weight"], "bias": case["w.head.bias"]})
    loss.adopt_head(head)
    assert_close(loss.predict(student), case["out.logits"], 1e-5)  # with BatchNorm's batch, as the case was made


def by_loop(loss: SimKD, x: Tensor) -> Tensor:
    """The projector on (B, D, h, w), position by position."""
    for conv, norm in ((0, 1), (3, 4), (6, 7)):
        weight = loss.projector[conv].weight
        size = weight.shape[-1]
        padded = nn.functional.pad(x, (size // 2,) * 4)
        batch, _, height, width = x.shape
        out = torch.zeros(batch, len(weight), height, width, dtype=x.dtype)
        for i in range(batch):
            for r in range(height):
                for c in range(width):
                    out[i, :, r, c] = (weight * padded[i, :, r : r + size, c : c + size]).sum(dim=(1, 2, 3))
        mean, var = out.mean(dim=(0, 2, 3)), out.var(dim=(0, 2, 3), unbiased=False)
        x = (out - mean[:, None, None]) / (var[:, None, None] + loss.projector[norm].eps) ** 0.5
        x = x.clamp_min(0) if norm < 7 or loss.relu else x
    return x


@pytest.mark.parametrize("options", [{}, {"factor": 3}, {"relu": False}], ids=str)
def test_equals_a_plain_loop(options):
    student, teacher = drawn(2, 3, 3, 2, dtype=torch.float64), drawn(2, 6, 3, 2, seed=1, dtype=torch.float64)
    loss = built(student, teacher, **options)
    squares = [(got - t) ** 2 for got, t in zip(by_loop(loss, student).flatten(), teacher.flatten(), strict=True)]
    torch.testing.assert_close(call(loss, student, teacher), torch.stack(squares).sum() / 72)
    pooled = built(student, teacher, feature="pooled", **options)
    pooled.load_state_dict(loss.state_dict())
    vector = drawn(2, 6, seed=2, dtype=torch.float64)
    expected = (by_loop(loss, student).mean(dim=(2, 3)) - vector).square().sum() / 12
    torch.testing.assert_close(pooled(student, vector), expected)


def test_value_by_hand():
    student = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    loss = built(student, student, factor=1)
    for conv in (0, 3, 6):
        loss.projector[conv].weight.data.fill_(3.0)
    # (-1, 1) is normalised and rectified to (0, 1), and again twice: against (-1, 1): (1 + 0) / 2.
    assert call(loss, student, student).item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("relu", [True, False])
def test_middle_of_the_projector_is_narrower(relu):
    loss = built(drawn(2, 5, 4, 4), drawn(2, 12, 4, 4), factor=4, relu=relu)
    shapes = [tuple(layer.weight.shape) for layer in loss.projector if isinstance(layer, nn.Conv2d)]
    assert shapes == [(3, 5, 1, 1), (3, 3, 3, 3), (12, 3, 1, 1)]
    assert isinstance(loss.projector[-1], nn.ReLU) == relu


@pytest.mark.parametrize(
    ("student", "teacher", "options", "grid"),
    [
        ((4, 4), (7, 7), {}, (4, 4)),
        ((8, 6), (4, 4), {}, (4, 4)),
        ((8, 2), (4, 4), {}, (4, 2)),
        ((4, 4), (7, 5), {"resize": "bilinear"}, (7, 5)),
        ((4, 4), (7, 5), {"feature": "pooled"}, (4, 4)),
    ],
    ids=str,
)
def test_deployed_student_is_projected_on_the_grid_of_training(student, teacher, options, grid):
    student, teacher = drawn(2, 3, *student), drawn(2, 6, *teacher, seed=1)
    loss = built(student, teacher, **options)
    grids = []
    loss.projector.register_forward_pre_hook(lambda _, inputs: grids.append(tuple(inputs[0].shape[2:])))
    call(loss, student, teacher)
    loss.adopt_head(nn.Linear(6, 5))
    assert loss.predict(student).shape == (2, 5)
    assert grids == [grid, grid]


def test_a_student_that_equals_the_teacher_is_deployed_with_the_teachers_logits():
    student, teacher = drawn(3, 4, 2, 2), drawn(3, 6, 2, 2, seed=1).relu()
    loss = built(student, teacher)
    loss.projector = nn.Sequential(nn.Conv2d(4, 6, 1))
    loss.projector.forward = lambda x: teacher  # a perfect projector
    loss.adopt_head(nn.Linear(6, 5))
    assert call(loss, student, teacher).item() == 0
    torch.testing.assert_close(loss.predict(student), loss.head(teacher.mean(dim=(2, 3))))


def test_prediction_is_in_the_precision_of_the_classifier():
    student, teacher = drawn(2, 4, 2, 2), drawn(2, 6, 2, 2, seed=1)
    loss = built(student, teacher).eval()
    loss.adopt_head(nn.Linear(6, 5))
    assert loss.predict(student.bfloat16()).dtype == torch.float32
    expected = loss.head(loss.projector(student).mean(dim=(2, 3)))
    torch.testing.assert_close(loss.predict(student), expected)


def value(teacher_grid: tuple[int, int] = (2, 2), **options) -> float:
    student, teacher = drawn(4, 3, 4, 4), drawn(4, 8, *teacher_grid, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = built(student, teacher, **options)
    return call(loss, student, teacher).item()


@pytest.mark.parametrize(
    "options", [{"feature": "pooled"}, {"factor": 4}, {"resize": "nearest"}, {"relu": False}], ids=str
)
def test_options_change_the_value(options):
    assert abs(value(**options) - value()) > 1e-4


def test_reads_what_feature_says():
    loss = SimKD(student_stage=2, teacher_stage="layer3")
    assert loss.inputs() == ("student_feature_map", "teacher_pooled", "teacher_feature_map")
    assert loss.locations() == {"student_feature_map": 2, "teacher_feature_map": "layer3"}
    assert SimKD.mismatch.depth == "one stage of each"
    loss = SimKD(feature="pooled", student_stage=2)
    assert loss.inputs() == ("student_feature_map", "teacher_pooled")
    assert loss.locations() == {"student_feature_map": 2}


REFUSAL = (
    "SimKD: teacher_pooled must be the mean over positions of teacher_feature_map, got {}; pass feature='pooled' for "
    "this teacher, or the teacher_stage that its classifier averages."
)


def test_refuses_a_classifier_that_does_not_see_the_mean_of_the_map():
    student, teacher = drawn(2, 4, 2, 2), drawn(2, 6, 2, 2, seed=1)
    loss, pooled = built(student, teacher).eval(), teacher.mean(dim=(2, 3))
    assert loss(student, pooled, teacher).isfinite()
    assert loss(student, pooled.bfloat16(), teacher).isfinite()  # rounded, but that mean
    for other in (drawn(2, 6, seed=2), nn.functional.layer_norm(pooled, (6,)), teacher[:, :, 0, 0], 1.1 * pooled):
        with pytest.raises(ValueError) as caught:
            loss(student, other, teacher)
        assert str(caught.value) == REFUSAL.format("another vector")
    assert loss.train()(student, drawn(2, 6, seed=2), teacher).isfinite()  # seen once is enough


def test_the_first_step_decides_where_blank_images_do_not_tell():
    """A teacher without biases, such as a ConvNeXt of random weights, gives zeros for zeros."""
    student, teacher = drawn(2, 4, 2, 2), drawn(2, 6, 2, 2, seed=1)
    loss, pooled, other = built(student, teacher).eval(), teacher.mean(dim=(2, 3)), drawn(2, 6, seed=2)
    assert loss(0 * student, 0 * pooled, 0 * teacher).isfinite()
    with pytest.raises(ValueError) as caught:
        loss.train()(student, other, teacher)
    assert str(caught.value) == REFUSAL.format("another vector")
    assert loss(student, pooled, teacher).isfinite()
    assert loss(student, other, teacher).isfinite()  # seen once is enough


def test_refuses_a_classifier_that_is_wider_than_the_map():
    with pytest.raises(ValueError) as caught:
        built(drawn(2, 4, 2, 2), drawn(2, 6, 2, 2), pooled=drawn(2, 20))
    assert str(caught.value) == REFUSAL.format("widths 20 and 6")
    assert built(drawn(2, 4, 2, 2), drawn(2, 6, 2, 2), pooled=drawn(2, 20), feature="pooled").dim == 20


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"feature": "pool"},
            ValueError,
            "SimKD: feature must be a known one, got 'pool'; did you mean 'pooled'? Known: feature_map, pooled.",
        ),
        ({"factor": 0}, ValueError, "SimKD: factor must be > 0, got 0; the published value is 2."),
        ({"factor": 2.0}, TypeError, "SimKD: factor must be an integer > 0, got 2.0; the published value is 2."),
        (
            {"resize": "linear"},
            ValueError,
            "SimKD: resize must be a known one, got 'linear'; did you mean 'bilinear'? Known: pool, bilinear, bicubic, "
            "nearest.",
        ),
        ({"relu": 1}, TypeError, "SimKD: relu must be True or False, got 1; write one of them."),
    ],
    ids=["feature", "factor", "factor type", "resize", "relu"],
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        SimKD(**options)
    assert str(caught.value) == sentence


def test_refuses_a_factor_that_leaves_nothing():
    with pytest.raises(ValueError) as caught:
        built(drawn(2, 4, 2, 2), drawn(2, 6, 2, 2), factor=7)
    assert str(caught.value) == "SimKD: factor must be at most the teacher's width 6, got 7; the published value is 2."


@pytest.mark.parametrize(
    ("pooled", "teacher", "sentence"),
    [
        (
            drawn(2, 5),
            drawn(2, 6, 2, 2),
            "SimKD: teacher_pooled must have D=6 as in build, got D=5; build the loss for these models.",
        ),
        (
            drawn(2, 6),
            drawn(2, 5, 2, 2),
            "SimKD: teacher_feature_map must have D=6 as in build, got D=5; build the loss for these models.",
        ),
        (
            drawn(2, 6),
            drawn(3, 6, 2, 2),
            "SimKD: teacher_feature_map has B=3 but student_feature_map has B=2; give both the same batch.",
        ),
    ],
    ids=["pooled", "map", "batch"],
)
def test_refuses_other_features(pooled, teacher, sentence):
    loss = built(drawn(2, 4, 2, 2), drawn(2, 6, 2, 2))
    with pytest.raises(ValueError) as caught:
        loss(drawn(2, 4, 2, 2), pooled, teacher)
    assert str(caught.value) == sentence


def test_must_be_given_the_map():
    loss = built(drawn(2, 4, 2, 2), drawn(2, 6, 2, 2))
    with pytest.raises(TypeError, match="SimKD: teacher_feature_map must be given where feature says so, got none; pa"):
        loss(drawn(2, 4, 2, 2), drawn(2, 6))


def test_must_be_built_and_have_a_classifier():
    for method in (SimKD().predict, lambda x: call(SimKD(), x, x)):
        with pytest.raises(RuntimeError, match="SimKD: build must be called before forward; put the loss into a kdvit"):
            method(drawn(2, 4, 2, 2))
    with pytest.raises(RuntimeError, match="SimKD: adopt_head must be called before predict; put the loss into a kdv"):
        built(drawn(2, 4, 2, 2), drawn(2, 6, 2, 2)).predict(drawn(2, 4, 2, 2))
