from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import SAMNet
from kdvit.signals import ModelInfo, SignalInfo


def built(loss: SAMNet, student: Tensor, teacher: Tensor) -> SAMNet:
    torch.manual_seed(0)
    loss.build(*(ModelInfo.of(feature_map=SignalInfo.of("feature_map", x)) for x in (student, teacher)))
    return loss.to(student.dtype)


def pair(dim: int = 4, teacher_dim: int = 4, grid=(2, 3), teacher_grid=(2, 3), batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, dim, *grid), (batch, teacher_dim, *teacher_grid)
    student, teacher = (torch.randn(shape, generator=generator).double() for shape in shapes)
    return student, teacher


def value(student: Tensor, teacher: Tensor, **options) -> float:
    return built(SAMNet(**options), student, teacher)(student, teacher).item()


def test_it_says_what_it_is():
    assert SAMNet.__doc__.startswith("Inspired by SAM-Net")
    assert "From the paper:" in SAMNet.__doc__ and "All else is ours" in " ".join(SAMNet.__doc__.split())
    assert SAMNet.mismatch.width and SAMNet.mismatch.depth and SAMNet.mismatch.grid and not SAMNet.mismatch.heads


def test_value_by_hand():
    # Two positions, u = (1, -1) and -u, so correlations are 1 and -1: a query u finds p u - (1 - p) u.
    teacher = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).T.view(1, 2, 1, 2)
    student = teacher[..., :1].expand(1, 2, 1, 2)  # u at both positions
    p = 1 / (1 + math.exp(-2 / 0.5))
    found = 2 * p - 1
    # Right at the first position; at the second it finds (2p - 1) u for the teacher's -(2p - 1) u.
    assert value(student, teacher, temperature=0.5) == pytest.approx((2 * found) ** 2 / 2, rel=1e-4)


def test_equals_a_plain_loop():
    student, teacher = pair(dim=3)
    loss = built(SAMNet(temperature=0.3), student, teacher)

    def normed(x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    total = 0.0
    for image, target in zip(loss.projector(student), teacher, strict=True):
        x, y = ([normed(z.flatten(1)[:, n]) for n in range(6)] for z in (image, target))

        def found(query: Tensor, y: list[Tensor]) -> Tensor:
            weights = [math.exp((query @ key).item() / 4 / 0.3) for key in y]
            return sum(w * z for w, z in zip(weights, y, strict=True)) / sum(weights)

        total += sum(((found(a, y) - found(b, y)) ** 2).sum().item() for a, b in zip(x, y, strict=True))
    assert loss(student, teacher).item() == pytest.approx(total / teacher.numel(), rel=1e-9)


def test_only_the_direction_at_a_position_counts():
    student, teacher = pair()
    scale = torch.rand(2, 1, 2, 3, dtype=torch.float64) + 0.5
    offset = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    reference = value(student, teacher)
    assert value(scale * student + offset, teacher) == pytest.approx(reference, rel=1e-3)
    assert value(student, scale * teacher + offset) == pytest.approx(reference, rel=1e-3)
    assert value(scale * teacher + offset, teacher) == pytest.approx(0, abs=1e-6)
    assert reference > 0.1


def test_positions_are_looked_up_not_matched_by_place():
    """Positions reordered in both models alike change nothing; in the student alone they do."""
    student, teacher = pair()
    order = torch.tensor([4, 2, 0, 5, 1, 3])

    def reordered(x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, order].view_as(x)

    assert value(reordered(student), reordered(teacher)) == pytest.approx(value(student, teacher), rel=1e-9)
    assert value(reordered(teacher), teacher) > 0.1


def test_the_projector_learns_and_the_target_stays():
    """A student with the teacher's features in another basis and width comes near to a match."""
    _, teacher = pair()
    basis = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()
    student = torch.einsum("od,bdhw->bohw", basis, teacher)
    loss = built(SAMNet(temperature=0.5), student, teacher)
    assert {name for name, _ in loss.named_parameters()} == {"projector.0.weight", "projector.0.bias"}
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    teacher.requires_grad_()
    values = []
    for _ in range(150):
        values.append(loss(student, teacher).item())
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    assert values[-1] < 0.05 * values[0] and teacher.grad is None


@pytest.mark.parametrize(("grid", "teacher_grid"), [((4, 6), (2, 3)), ((2, 3), (4, 6)), ((4, 2), (2, 5))], ids=str)
def test_grids_that_differ_are_averaged_to_the_smaller(grid, teacher_grid):
    student, teacher = pair(grid=grid, teacher_grid=teacher_grid)
    smaller = tuple(map(min, grid, teacher_grid))
    pooled = (F.adaptive_avg_pool2d(x, smaller) for x in (student, teacher))
    assert value(student, teacher) == pytest.approx(value(*pooled), rel=1e-9)


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"resize": "bilinear"}, {"resize": "nearest"}], ids=str)
def test_options_change_the_value(options):
    student, teacher = pair(grid=(3, 3))
    assert abs(value(student, teacher, **options) - value(student, teacher)) > 1e-3


def test_stages_are_where_it_reads():
    locations = SAMNet(student_stage=0.5, teacher_stage="layer3").locations()
    assert locations == {"student_feature_map": 0.5, "teacher_feature_map": "layer3"}


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="SAMNet: temperature must be > 0, got 0; 0.1 looks for a few positions."):
        SAMNet(temperature=0)
    with pytest.raises(ValueError, match="SAMNet: resize must be a known one, got 'bilinar'; did you mean 'bilinear'"):
        SAMNet(resize="bilinar")
    student, teacher = pair()
    with pytest.raises(RuntimeError, match="SAMNet: build must be called before forward"):
        SAMNet()(student, teacher)
    loss = built(SAMNet(), student, teacher)
    with pytest.raises(
        ValueError, match=r"SAMNet: student_feature_map must have shape \(B, D, h, w\), got \(2, 4, 6\)"
    ):
        loss(student.flatten(2), teacher)
    with pytest.raises(ValueError, match="SAMNet: teacher_feature_map has B=1 but student_feature_map has B=2; give"):
        loss(student, teacher[:1])
    with pytest.raises(ValueError, match="SAMNet: teacher_feature_map must have D=4 as in build, got D=3"):
        loss(student, teacher[:, 1:])


@pytest.mark.parametrize(("grid", "teacher_grid"), [((1, 1), (7, 7)), ((7, 1), (1, 7))], ids=str)
def test_a_single_position_is_refused(grid, teacher_grid):
    """Where there is one position to find, every student finds it."""
    student, teacher = pair(grid=grid, teacher_grid=teacher_grid)
    with pytest.raises(ValueError) as caught:
        built(SAMNet(), student, teacher)
    assert str(caught.value) == (
        f"SAMNet: the common grid must have at least 2 positions, got 1x1 for {grid} and {teacher_grid}; "
        "choose stages before the last, or larger images."
    )
    assert value(student, teacher, resize="nearest") > 0
