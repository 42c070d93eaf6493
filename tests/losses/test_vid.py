from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import VID
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_vid")
ONE = {"student_stages": (-1,), "teacher_stages": (-1,)}
TWO = {"student_stages": (0.5, 1.0), "teacher_stages": (0.5, 1.0)}


def model(maps: tuple[Tensor, ...]) -> ModelInfo:
    return ModelInfo.of(feature_map=tuple(SignalInfo.of("feature_map", x) for x in maps))


def built(loss: VID, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> VID:
    torch.manual_seed(0)
    loss.build(model(student), model(teacher))
    return loss.to(student[0].dtype)


def random_maps(seed: int = 0, student_grid=(4, 6), teacher_grid=(2, 3)) -> tuple[tuple, tuple]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator, dtype=torch.float64)

    return (draw(3, *student_grid), draw(4, *student_grid)), (draw(5, *teacher_grid), draw(2, *teacher_grid))


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    student, teacher = case["in.student"].requires_grad_(), case["in.teacher"]
    loss = built(VID(case.options["init_pred_var"], case.options["eps"], **ONE), (student,), (teacher,))
    names = {"log_scale": "raw_variances.0"} | {f"regressor.{i}.weight": f"regressors.0.{i}.weight" for i in (0, 2, 4)}
    loss.load_state_dict({ours: case[f"w.{theirs}"] for theirs, ours in names.items()})
    value = loss((student,), (teacher,))
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)
    assert len(list(loss.parameters())) == len(names)
    for theirs, ours in names.items():
        assert_close(loss.get_parameter(ours).grad, case[f"wgrad.{theirs}"], 1e-5)


def test_the_variance_begins_as_given():
    student, teacher = random_maps()
    for variance in (5.0, 0.01, 1000.0):
        loss = built(VID(init_variance=variance, **TWO), student, teacher)
        for raw in loss.raw_variances:
            torch.testing.assert_close(F.softplus(raw) + loss.eps, torch.full_like(raw, variance), rtol=1e-4, atol=0)


def test_equals_a_plain_loop():
    """Two stages of other widths; the student's larger grid is averaged two by two."""
    student, teacher = random_maps()
    loss = built(VID(init_variance=2.0, eps=0.1, **TWO), student, teacher)
    for raw in loss.raw_variances:
        torch.nn.init.normal_(raw)
    total = 0.0
    for regressor, raw, s, t in zip(loss.regressors, loss.raw_variances, student, teacher, strict=True):
        first, second, third = (regressor[i].weight[:, :, 0, 0] for i in (0, 2, 4))
        for b in range(3):
            for y in range(2):
                for x in range(3):
                    pixel = s[b, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(dim=(1, 2))
                    mean = third @ (second @ (first @ pixel).relu()).relu()
                    for c in range(t.shape[1]):
                        variance = math.log1p(math.exp(raw[c].item())) + 0.1
                        square = (mean[c].item() - t[b, c, y, x].item()) ** 2
                        total += (square / variance + math.log(variance)) / 2 / t.numel()
    assert loss(student, teacher).item() == pytest.approx(total, rel=1e-10)


def test_the_best_variance_is_the_mean_squared_error():
    """With v_c trained alone it ends at the channel's squared error: what cannot be predicted counts less."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64) * torch.tensor([0.5, 3.0]).view(2, 1, 1)
    student = torch.zeros_like(teacher)
    loss = built(VID(**ONE), (student,), (teacher,))
    optimizer = torch.optim.LBFGS(loss.raw_variances, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss((student,), (teacher,))
        value.backward()
        return value

    optimizer.step(closure)
    variance = F.softplus(loss.raw_variances[0]) + loss.eps
    torch.testing.assert_close(variance, teacher.square().mean(dim=(0, 2, 3)), rtol=1e-3, atol=0)
    assert loss((student,), (teacher,)).item() == pytest.approx((1 + variance.log()).mean().item() / 2, rel=1e-6)


def test_options_change_the_value():
    def value(student_grid=(4, 6), teacher_grid=(2, 3), **options) -> float:
        student, teacher = random_maps(student_grid=student_grid, teacher_grid=teacher_grid)
        return built(VID(**TWO | options), student, teacher)(student, teacher).item()

    assert abs(value(init_variance=2.0) - value()) > 1e-2
    assert abs(value(eps=0.5) - value()) < 1e-6  # the variance begins at init_variance, whatever eps
    smaller = [value((2, 3), (4, 6), resize=resize) for resize in ("pool", "bilinear", "bicubic", "nearest")]
    assert all(abs(x - y) > 1e-6 for i, x in enumerate(smaller) for y in smaller[:i])


def test_eps_is_the_smallest_variance():
    student, teacher = random_maps()
    loss = built(VID(eps=0.25, **TWO), student, teacher)
    for raw in loss.raw_variances:
        torch.nn.init.constant_(raw, -1e4)
    expected = 0.0
    for regressor, s, t in zip(loss.regressors, student, teacher, strict=True):
        expected += ((regressor(F.adaptive_avg_pool2d(s, (2, 3))) - t).square() / 0.25 + math.log(0.25)).mean() / 2
    torch.testing.assert_close(loss(student, teacher), expected)


def test_stages_are_where_it_reads():
    locations = VID(student_stages=[2, -1], teacher_stages=("layer3", 1.0)).locations()
    assert locations == {"student_feature_map": (2, -1), "teacher_feature_map": ("layer3", 1.0)}


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"init_variance": 0}, ValueError, "VID: init_variance must be > 0, got 0; the published value is 5."),
        ({"eps": 0.0}, ValueError, "VID: eps must be > 0, got 0.0; it is the smallest variance."),
        ({"eps": "1"}, TypeError, "VID: eps must be a number > 0, got '1'; it is the smallest variance."),
        ({"eps": 6.0}, ValueError, "VID: init_variance must be > eps=6.0, got 5.0; raise it."),
        (
            {"resize": "linear"},
            ValueError,
            "VID: resize must be a known one, got 'linear'; did you mean 'bilinear'? "
            "Known: pool, bilinear, bicubic, nearest.",
        ),
        (
            {"student_stages": (1,)},
            ValueError,
            "VID: teacher_stages must be as many as student_stages, got 4 for 1; they are paired in order.",
        ),
    ],
    ids=["variance", "eps", "kind", "order", "resize", "pairs"],
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        VID(**options)
    assert str(caught.value) == sentence


def test_refuses_other_maps():
    student, teacher = random_maps()
    loss = built(VID(**TWO), student, teacher)
    with pytest.raises(ValueError) as caught:
        loss(student, (teacher[0], teacher[1][:, :1]))
    assert str(caught.value) == (
        "VID: teacher_feature_map must have D=2 as in build, got D=1; build the loss for these models."
    )
    with pytest.raises(ValueError, match="VID: teacher_feature_map must be a tuple of 2 tensors, got 1; give one for"):
        loss(student, teacher[:1])
    with pytest.raises(ValueError, match=r"VID: student_feature_map must have shape \(B, D, h, w\), got \(3, 3, 24\)"):
        loss(tuple(x.flatten(2) for x in student), teacher)


def test_must_be_built():
    with pytest.raises(RuntimeError, match="VID: build must be called before forward; put the loss into a kdvit"):
        VID()(*random_maps())
