from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdvit.losses import Dense
from kdvit.signals import ModelInfo, SignalInfo, tokens_to_map
from tests.losses.golden import assert_close, golden

CASES = {name: case for name, case in golden("feature_lightly_distill").items() if name.startswith("v2_")}


def info(signal: str, *maps: Tensor, many: bool = False) -> ModelInfo:
    infos = tuple(SignalInfo.of(signal, x) for x in maps)
    return ModelInfo.of(**{signal: infos if many else infos[0]})


def built(student: Tensor, *teacher: Tensor, **options) -> Dense:
    loss = Dense(**{"teacher_stages": tuple(range(len(teacher)))} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        loss.build(info("feature_map", student), info("feature_map", *teacher, many=True))
    return loss


def maps(*shapes: tuple[int, int, int], batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    """The official loss is given projected tokens: the head is made an identity."""
    tokens = case["in.student"].clone().requires_grad_()
    student, teacher = (tokens_to_map(x, (3, 3)) for x in (tokens, case["in.teacher"]))
    loss = built(student, teacher, standardize=False)
    loss.head[0].load_state_dict({"weight": torch.eye(20), "bias": torch.zeros(20)})
    value = loss(student, (teacher,))
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(tokens.grad, case["grad.student"], 1e-5)


def test_equals_a_plain_loop():
    student, shallow, deep = (x.double() for x in maps((3, 2, 2), (4, 2, 2), (5, 2, 2)))
    loss = built(student, shallow, deep).double()
    loss.requires_grad_(False)
    value = 0.0
    for i in range(2):
        for y in range(2):
            for x in range(2):
                got = loss.head[0].weight @ student[i, :, y, x] + loss.head[0].bias
                wanted = []
                for teacher in (shallow, deep):
                    z = teacher[i, :, y, x]
                    wanted.append((z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt())
                value += sum((a - b) ** 2 for a, b in zip(got, torch.cat(wanted), strict=True)) / (2 * 4 * 9)
    torch.testing.assert_close(loss(student, (shallow, deep)), value)


def test_the_students_map_is_interpolated_behind_the_head():
    student, teacher = maps((3, 2, 2), (4, 4, 6))
    loss = built(student, teacher, standardize=False)
    projected = torch.einsum("dc,bchw->bdhw", loss.head[0].weight, student) + loss.head[0].bias[:, None, None]
    wanted = torch.nn.functional.interpolate(projected, size=(4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(loss(student, (teacher,)), (wanted - teacher).square().mean())


def test_pool_brings_the_larger_map_to_the_smaller_grid():
    student, teacher = maps((3, 2, 2), (4, 4, 4))
    loss = built(student, teacher, standardize=False, resize="pool")
    small = torch.nn.functional.avg_pool2d(teacher, 2)
    torch.testing.assert_close(loss(student, (teacher,)), loss(student, (small,)))


def test_teacher_maps_of_other_grids_come_to_that_of_the_last():
    student, shallow, deep = maps((3, 2, 2), (4, 6, 6), (5, 3, 3))
    loss = built(student, shallow, deep, standardize=False)
    resized = torch.nn.functional.interpolate(shallow, size=(3, 3), mode="bilinear", align_corners=False)
    torch.testing.assert_close(loss(student, (shallow, deep)), loss(student, (resized, deep)))
    assert (loss(student, (shallow, deep)) - loss(student, (shallow[:, :, ::2, ::2], deep))).abs() > 1e-3
    pooled = built(student, shallow, deep, standardize=False, resize="pool")
    small = torch.nn.functional.avg_pool2d(shallow, 2)
    torch.testing.assert_close(pooled(student, (shallow, deep)), pooled(student, (small, deep)))


def test_scale_and_offset_of_the_teacher_do_not_matter_when_standardized():
    student, teacher = maps((3, 2, 2), (64, 2, 2))
    loss = built(student, teacher)
    value = loss(student, (teacher,))
    torch.testing.assert_close(loss(student, (100 * teacher + 7,)), value, rtol=1e-3, atol=0)
    plain = built(student, teacher, standardize=False)
    assert plain(student, (100 * teacher + 7,)) > 100 * value


def test_a_linear_function_of_the_student_is_met_exactly():
    student, _ = maps((3, 2, 2), (4, 2, 2))
    weight, bias = torch.randn(4, 3), torch.randn(4)
    teacher = torch.einsum("dc,bchw->bdhw", weight, student) + bias[:, None, None]
    loss = built(student, teacher, standardize=False)
    loss.head[0].load_state_dict({"weight": weight, "bias": bias})
    assert loss(student, (teacher,)).item() < 1e-10


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_tokens_behind_the_final_norm(num_prefix):
    """They come without prefix tokens, however many the model has, and are compared as they are."""
    student, teacher = maps((3, 2, 2), (4, 2, 2))
    tokens = teacher.flatten(2).transpose(1, 2)
    loss = Dense(normed_teacher=True)
    geometry = SignalInfo("normed_patch_tokens", "norm", (4, 4), num_prefix_tokens=num_prefix, grid=(2, 2))
    loss.build(info("feature_map", student), ModelInfo.of(normed_patch_tokens=geometry))
    twin = built(student, teacher, standardize=False)
    twin.load_state_dict(loss.state_dict())
    assert loss.inputs() == ("student_feature_map", "teacher_normed_patch_tokens")
    assert loss.locations() == {"student_feature_map": -1}
    value = loss(student, teacher_normed_patch_tokens=tokens)
    torch.testing.assert_close(value, twin(student, (teacher,)))


def test_stages_are_where_it_reads():
    loss = Dense(student_stage=0.5, teacher_stages=["layer3", -1])
    assert loss.locations() == {"student_feature_map": 0.5, "teacher_feature_map": ("layer3", -1)}


@pytest.mark.parametrize("how", ["bicubic", "nearest", "pool"])
def test_resize_changes_the_value(how):
    student, teacher = maps((3, 3, 3), (4, 4, 4))
    values = [built(student, teacher, resize=x)(student, (teacher,)) for x in ("bilinear", how)]
    assert (values[0] - values[1]).abs() > 1e-5


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"resize": "area"}, ValueError,
         "Dense: resize must be a known one, got 'area'; did you mean 'nearest'? Known: pool, bilinear, bicubic, "
         "nearest."),
        ({"teacher_stages": -1}, TypeError,
         "Dense: teacher_stages must be a sequence, got -1; write (-1,) for one."),
        ({"standardize": 1}, TypeError, "Dense: standardize must be True or False, got 1; write one of them."),
        ({"normed_teacher": 0}, TypeError, "Dense: normed_teacher must be True or False, got 0; write one of them."),
    ],
    ids=str,
)  # fmt: skip
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        Dense(**options)
    assert str(caught.value) == sentence


def test_refuses_other_inputs():
    student, teacher = maps((3, 2, 2), (4, 2, 2))
    loss = built(student, teacher)
    with pytest.raises(ValueError) as caught:
        loss(student, (teacher[:, :3],))
    assert str(caught.value) == (
        "Dense: teacher_feature_map must have D=4 as in build, got D=3; build the loss for these models."
    )
    with pytest.raises(ValueError, match="Dense: teacher_feature_map must be a tuple of 1 tensors, got 2; give one"):
        loss(student, (teacher, teacher))
    with pytest.raises(ValueError, match="Dense: teacher_feature_map has B=1 but student_feature_map has B=2; give"):
        loss(student, (teacher[:1],))
    with pytest.raises(TypeError) as caught:
        loss(student)
    assert str(caught.value) == "Dense: teacher_feature_map must be given for normed_teacher=False; pass it by name."


def test_refuses_tokens_without_a_grid():
    tokens = SignalInfo("normed_patch_tokens", "norm", (4, 4))
    with pytest.raises(ValueError) as caught:
        Dense(normed_teacher=True).build(info("feature_map", torch.rand(1, 3, 2, 2)),
                                         ModelInfo.of("cnn", normed_patch_tokens=tokens))  # fmt: skip
    assert str(caught.value) == (
        "Dense: teacher must have a patch grid, got none for normed_patch_tokens of 'cnn'; choose a model of patch "
        "tokens, or pass grid=."
    )


def test_must_be_built():
    with pytest.raises(RuntimeError, match="Dense: build must be called before forward; put the loss into a kdvit"):
        Dense()(torch.rand(2, 3, 4, 4), (torch.rand(2, 3, 4, 4),))
