from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import DMKD
from kdvit.signals import ModelInfo, SignalInfo


def built(loss: DMKD, student: Tensor, teacher: Tensor) -> DMKD:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss.build(*(ModelInfo.of(feature_map=SignalInfo.of("feature_map", x)) for x in (student, teacher)))
    return loss.to(student.dtype)


def pair(dim: int = 3, teacher_dim: int = 4, grid=(3, 4), teacher_grid=(3, 4)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, dim, *grid), (2, teacher_dim, *teacher_grid)
    student, teacher = (torch.randn(shape, generator=generator).double() for shape in shapes)
    return student, teacher


def value(student: Tensor, teacher: Tensor, **options) -> float:
    return built(DMKD(**options), student, teacher)(student, teacher).item()


def identity_generators(loss: DMKD) -> DMKD:
    """Generators that hand non-negative maps through."""
    for generator in loss.generators:
        for conv in (generator[0], generator[2]):
            torch.nn.init.dirac_(conv.weight)
            torch.nn.init.zeros_(conv.bias)
    return loss


def test_value_by_hand():
    # Two channels on 1x2 positions. Activity by position: (2, 1); by channel: (2, 1).
    teacher = torch.tensor([[2.0, 2.0], [2.0, 0.0]]).view(1, 2, 1, 2)
    student = torch.tensor([[4.0, 3.0], [2.0, 1.0]]).view(1, 2, 1, 2)
    loss = identity_generators(built(DMKD(), student, teacher))
    loss.fusion.data.copy_(torch.tensor([1.0, 10.0]))
    # The first position is hidden from the first generator, the first channel from the second:
    # 1 * [[0, 3], [0, 1]] + 10 * [[0, 0], [2, 1]] = [[0, 3], [20, 11]], against [[2, 2], [2, 0]].
    assert loss(student, teacher).item() == pytest.approx((4 + 1 + 18**2 + 11**2) / 4)


def test_equals_a_plain_loop():
    student, teacher = pair()
    loss = built(DMKD(temperature=0.3, threshold=1.1), student, teacher)
    loss.fusion.data.copy_(torch.tensor([0.7, -0.4]))
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        x = torch.einsum("od,dhw->ohw", loss.projector[0].weight[:, :, 0, 0], s) + loss.projector[0].bias[:, None, None]
        by_position = [[sum(abs(t[d, i, j].item()) for d in range(4)) / 4 for j in range(4)] for i in range(3)]
        by_channel = [sum(abs(v) for v in t[d].flatten().tolist()) / 12 for d in range(4)]
        positions = sum(math.exp(a / 0.3) for row in by_position for a in row)
        channels = sum(math.exp(a / 0.3) for a in by_channel)
        spatial, channel = x.clone(), x.clone()
        for i in range(3):
            for j in range(4):
                if 12 * math.exp(by_position[i][j] / 0.3) / positions > 1.1:
                    spatial[:, i, j] = 0
        for d in range(4):
            if 4 * math.exp(by_channel[d] / 0.3) / channels > 1.1:
                channel[d] = 0
        assert (spatial == 0).any() and (channel == 0).any() and (spatial != 0).any() and (channel != 0).any()
        fused = 0.7 * loss.generators[0](spatial[None])[0] - 0.4 * loss.generators[1](channel[None])[0]
        total += ((fused - t) ** 2).sum().item()
    assert loss(student, teacher).item() == pytest.approx(total / teacher.numel(), rel=1e-9)


def test_what_matters_most_to_the_teacher_is_not_seen():
    """Neither generator's gradient comes through what is hidden from it; the position is hidden in all channels."""
    student, teacher = torch.randn(1, 4, 3, 3), 0.1 * torch.randn(1, 4, 3, 3)
    teacher[0, :, 1, 2] = 9.0
    teacher[0, 3] += 20.0
    loss = built(DMKD(), student, teacher)
    for fusion, hidden in (((1.0, 0.0), (slice(None), 1, 2)), ((0.0, 1.0), (3,))):
        loss.fusion.data.copy_(torch.tensor(fusion))
        student = student.detach().requires_grad_()
        loss(student, teacher).backward()
        seen = torch.ones(4, 3, 3, dtype=torch.bool)
        seen[hidden] = False
        assert (student.grad[0][~seen] == 0).all() and (student.grad[0][seen] != 0).any()


def test_without_contrast_nothing_is_hidden():
    student, teacher = torch.rand(2, 4, 3, 3), torch.full((2, 4, 3, 3), 3.7)
    loss = identity_generators(built(DMKD(), student, teacher))
    assert loss(student, teacher).item() == pytest.approx(F.mse_loss(student, teacher).item(), rel=1e-5)


def test_the_masks_count_by_size_not_by_sign():
    student, teacher = pair()
    loss = built(DMKD(), student, teacher)
    for x in (teacher, -teacher):
        masks = loss._kept(x.abs().mean(1, keepdim=True)), loss._kept(x.abs().mean((2, 3), True))
        assert [mask.shape for mask in masks] == [(2, 1, 3, 4), (2, 4, 1, 1)]
        assert all(set(mask.unique().tolist()) == {0.0, 1.0} for mask in masks)
    assert value(student, 3 * teacher) != value(student, teacher)


def test_weights_start_at_one_half_and_learn():
    student, teacher = pair()
    loss = built(DMKD(), student, teacher)
    assert loss.fusion.tolist() == [0.5, 0.5]
    loss(student, teacher).backward()
    assert (loss.fusion.grad != 0).all()
    names = {name.partition(".")[0] for name, _ in loss.named_parameters()}
    assert names == {"projector", "generators", "fusion"}
    assert not list(built(DMKD(), teacher, teacher).projector.parameters())


@pytest.mark.parametrize(("grid", "teacher_grid"), [((4, 6), (2, 3)), ((2, 3), (4, 6)), ((4, 2), (2, 5))], ids=str)
def test_grids_that_differ_are_averaged_to_the_smaller(grid, teacher_grid):
    student, teacher = pair(grid=grid, teacher_grid=teacher_grid)
    smaller = tuple(map(min, grid, teacher_grid))
    pooled = (F.adaptive_avg_pool2d(x, smaller) for x in (student, teacher))
    assert value(student, teacher) == pytest.approx(value(*pooled), rel=1e-9)


@pytest.mark.parametrize("options", [{"temperature": 5.0}, {"threshold": 2.0}, {"resize": "bilinear"}], ids=str)
def test_options_change_the_value(options):
    student, teacher = pair(grid=(6, 6))
    assert abs(value(student, teacher, **options) - value(student, teacher)) > 1e-4


def test_stages_are_where_it_reads():
    locations = DMKD(student_stage=0.5, teacher_stage="layer3").locations()
    assert locations == {"student_feature_map": 0.5, "teacher_feature_map": "layer3"}
    assert DMKD.mismatch.width and DMKD.mismatch.depth and DMKD.mismatch.grid


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="DMKD: temperature must be > 0, got 0; 0.5 is what FGD has."):
        DMKD(temperature=0)
    with pytest.raises(ValueError, match="DMKD: threshold must be > 0, got -1; 1.0 hides what is above the mean."):
        DMKD(threshold=-1)
    with pytest.raises(ValueError, match="DMKD: resize must be a known one, got 'pol'; did you mean 'pool'"):
        DMKD(resize="pol")
    student, teacher = pair()
    with pytest.raises(RuntimeError, match="DMKD: build must be called before forward"):
        DMKD()(student, teacher)
    loss = built(DMKD(), student, teacher)
    with pytest.raises(ValueError, match=r"DMKD: teacher_feature_map must have shape \(B, D, h, w\), got \(2, 4, 12\)"):
        loss(student, teacher.flatten(2))
    with pytest.raises(ValueError, match="DMKD: teacher_feature_map has B=1 but student_feature_map has B=2; give"):
        loss(student, teacher[:1])
    with pytest.raises(ValueError, match="DMKD: teacher_feature_map must have D=4 as in build, got D=3;"):
        loss(student, teacher[:, 1:])
