from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdvit.losses import MGD
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_mgd")
MASK = {"cls": "channel", "det": "spatial"}


def built(loss: MGD, student: Tensor, teacher: Tensor) -> MGD:
    torch.manual_seed(0)
    loss.build(*(ModelInfo.of(feature_map=SignalInfo.of("feature_map", x)) for x in (student, teacher)))
    return loss.to(student.dtype)


def random_maps(
    seed: int = 0, student=(2, 3, 2, 3), teacher=(2, 4, 2, 3), dtype=torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in (student, teacher))


def test_cases_were_found():
    assert len(CASES) == 2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    """The released alpha is the weight outside."""
    student, teacher = case["in.student"].requires_grad_(), case["in.teacher"]
    loss = built(MGD(case.options["mask_ratio"], MASK[case.name[:3]]), student, teacher)
    loss.load_state_dict(case.group("w"))
    value = case.options["alpha"] * loss(student, teacher, noise=case["rng.rand"].flatten(1))
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)
    expected = case.group("wgrad")
    assert expected.keys() == dict(loss.named_parameters()).keys()
    for name, parameter in loss.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-5)


def test_value_by_hand():
    """One channel, generation that copies: what is masked is missing, and all four positions count."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)
    loss = built(MGD(mask_ratio=0.5), x, x)
    for conv in (loss.generation[0], loss.generation[2]):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    noise = torch.tensor([[0.4, 0.6, 0.5, 0.9]])  # kept: 1 and 3
    assert loss(x, x, noise=noise).item() == 2**2 + 4**2
    assert loss(x, x + 1, noise=noise).item() == 1 + 3**2 + 1 + 5**2


@pytest.mark.parametrize("mask", ["spatial", "channel"])
def test_equals_a_plain_loop(mask):
    student, teacher = random_maps()
    loss = built(MGD(mask_ratio=0.4, mask=mask), student, teacher)
    noise = torch.rand(2, 6 if mask == "spatial" else 4, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for b in range(2):
        image = torch.zeros(1, 4, 2, 3, dtype=torch.float64)
        for c in range(4):
            for y in range(2):
                for x in range(3):
                    if noise[b, 3 * y + x] <= 0.6 if mask == "spatial" else noise[b, c] >= 0.4:
                        weight, bias = loss.align[0].weight[c, :, 0, 0], loss.align[0].bias[c]
                        image[0, c, y, x] = weight @ student[b, :, y, x] + bias
        made = loss.generation(image)[0]
        total += sum((x - y) ** 2 for x, y in zip(made.flatten(), teacher[b].flatten()))
    torch.testing.assert_close(loss(student, teacher, noise=noise), total / 2)


def test_a_projector_exists_only_where_widths_differ():
    equal = random_maps(student=(2, 4, 2, 3))
    assert {name.partition(".")[0] for name, _ in built(MGD(), *equal).named_parameters()} == {"generation"}
    other = built(MGD(), *random_maps())
    assert {name.partition(".")[0] for name, _ in other.named_parameters()} == {"align", "generation"}


@pytest.mark.parametrize("grids", [((2, 3), (4, 6)), ((4, 6), (2, 3)), ((4, 3), (2, 6))], ids=str)
def test_other_grids(grids):
    """The mask is on the grid that both are brought to; interpolation goes to the teacher's."""
    student, teacher = random_maps(student=(2, 3, *grids[0]), teacher=(2, 4, *grids[1]))
    loss = built(MGD(), student, teacher)
    assert loss(student, teacher, noise=torch.rand(2, 6)).isfinite()
    loss = built(MGD(resize="bilinear"), student, teacher)
    assert loss(student, teacher, noise=torch.rand(2, grids[1][0] * grids[1][1])).isfinite()


@pytest.mark.parametrize("mask", ["spatial", "channel"])
def test_what_is_masked_has_no_gradient(mask):
    student, teacher = random_maps(student=(2, 4, 2, 3))
    student.requires_grad_()
    noise = torch.tensor([[0.1, 0.9, 0.1, 0.9, 0.1, 0.9], [0.9, 0.9, 0.9, 0.1, 0.1, 0.1]])
    noise = noise if mask == "spatial" else noise[:, :4]
    built(MGD(mask_ratio=0.5, mask=mask), student, teacher)(student, teacher, noise=noise).backward()
    reached = student.grad.abs().sum(dim=1).flatten(1) if mask == "spatial" else student.grad.abs().sum(dim=(2, 3))
    kept = noise < 0.5 if mask == "spatial" else noise > 0.5
    assert torch.equal(reached > 0, kept)


@pytest.mark.parametrize("mask", ["spatial", "channel"])
def test_the_mask_ratio_is_the_share_that_is_masked(mask):
    student, teacher = torch.ones(50, 20, 5, 4), torch.zeros(50, 20, 5, 4)
    loss = built(MGD(mask_ratio=0.3, mask=mask), student, teacher)
    seen = []
    loss.generation.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    loss.generator = torch.Generator().manual_seed(0)
    loss(student, teacher)
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.04)
    constant = seen[0].amax(dim=1) == seen[0].amin(dim=1) if mask == "spatial" else seen[0].std(dim=(2, 3)) == 0
    assert constant.all()


def test_options_change_the_value():
    def value(noise: Tensor | None = None, student=(2, 3, 2, 3), **options) -> float:
        maps = random_maps(student=student)
        loss = built(MGD(**options), *maps)
        noise = torch.linspace(0, 1, 12).view(2, 6) if noise is None else noise
        return loss(*maps, noise=noise).item()

    assert abs(value(mask_ratio=0.5) - value()) > 1e-3
    assert abs(value(noise=torch.linspace(1, 0, 12).view(2, 6)) - value()) > 1e-3
    assert abs(value(noise=torch.linspace(0, 1, 8).view(2, 4), mask="channel") - value()) > 1e-3
    larger = [value(student=(2, 3, 4, 5), resize=resize) for resize in ("pool", "bilinear", "bicubic", "nearest")]
    assert all(abs(x - y) > 1e-6 for i, x in enumerate(larger) for y in larger[:i])
    assert MGD(student_stage=0.5, teacher_stage="layer3").locations() == {
        "student_feature_map": 0.5,
        "teacher_feature_map": "layer3",
    }
    assert MGD.mismatch.depth == "one stage of each"


@pytest.mark.parametrize("mask", ["spatial", "channel"])
def test_generator_draws_the_mask(mask):
    maps = random_maps(student=(2, 3, 4, 4), teacher=(2, 16, 4, 4))
    loss = built(MGD(mask_ratio=0.5, mask=mask), *maps)
    values = []
    for seed in (7, 7, 8):
        loss.generator = torch.Generator().manual_seed(seed)
        values.append(loss(*maps).item())
    assert values[0] == values[1] != values[2]
    torch.manual_seed(1)
    loss.generator = None
    assert loss(*maps) != loss(*maps)


def test_channel_masks_keep_half_precision_and_single_images_finite():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        maps = random_maps(student=(1, 3, 1, 1), teacher=(1, 4, 1, 1))
        student, teacher = (x.to(dtype).requires_grad_() for x in maps)
        loss = built(MGD(mask="channel"), student, teacher).float()
        value = loss(student, teacher)
        value.backward()
        assert value.dtype == torch.float32 and value.isfinite() and student.grad.isfinite().all()
        assert teacher.grad is None


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"mask_ratio": 1}, ValueError, "MGD: mask_ratio must be in (0, 1), got 1; the published value is 0.15."),
        (
            {"mask": "chanel"},
            ValueError,
            "MGD: mask must be a known one, got 'chanel'; did you mean 'channel'? Known: spatial, channel.",
        ),
        (
            {"resize": "pol"},
            ValueError,
            "MGD: resize must be a known one, got 'pol'; did you mean 'pool'? Known: pool, bilinear, bicubic, nearest.",
        ),
    ],
    ids=["mask_ratio", "mask", "resize"],
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        MGD(**options)
    assert str(caught.value) == sentence


def test_refuses_other_inputs():
    student, teacher = random_maps()
    loss = built(MGD(), student, teacher)
    with pytest.raises(ValueError) as caught:
        loss(student, teacher[:, :3])
    assert str(caught.value) == (
        "MGD: teacher_feature_map must have D=4 as in build, got D=3; build the loss for these models."
    )
    with pytest.raises(ValueError) as caught:
        loss(student, teacher, noise=torch.rand(2, 4))
    assert str(caught.value) == (
        "MGD: noise must have shape (2, 6) for mask='spatial', got (2, 4); "
        "draw one number for each entry that may be masked."
    )


def test_must_be_built():
    with pytest.raises(RuntimeError, match="MGD: build must be called before forward; put the loss into a kdvit"):
        MGD()(*random_maps())
