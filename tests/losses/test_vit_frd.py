from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdvit.losses import ViTFRD
from kdvit.signals import ModelInfo, SignalInfo

ONE = {"student_stages": (1.0,), "teacher_stages": (1.0,)}
TWO = {"student_stages": (0.5, 1.0), "teacher_stages": (0.3, 1.0)}


def built(loss: ViTFRD, student: tuple, teacher: tuple) -> ViTFRD:
    infos = (tuple(SignalInfo.of("feature_map", x) for x in maps) for maps in (student, teacher))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss.build(*(ModelInfo.of(feature_map=info) for info in infos))
    return loss.to(student[0].dtype)


def pair(stages: int = 2, grid=(4, 4), teacher_grid=(4, 6)) -> tuple[tuple, tuple]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, *grid), (2, 5, *teacher_grid)
    return tuple(tuple(torch.randn(s, generator=generator).double() for _ in range(stages)) for s in shapes)


def normed(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


def cells(x: Tensor, num_cells: int) -> tuple[list[Tensor], list[Tensor]]:
    """Normed positions of one image, and their means over cells; for a grid that the cells divide."""
    height, width = x.shape[1] // num_cells, x.shape[2] // num_cells
    tokens = {(i, j): normed(x[:, i, j]) for i in range(x.shape[1]) for j in range(x.shape[2])}
    seeds = []
    for r in range(num_cells):
        for c in range(num_cells):
            seeds.append(sum(t for (i, j), t in tokens.items() if (i // height, j // width) == (r, c)))
    return list(tokens.values()), [seed / (height * width) for seed in seeds]


def softmax(x: list[float]) -> list[float]:
    return [math.exp(a) / sum(map(math.exp, x)) for a in x]


def test_it_says_what_it_is():
    assert ViTFRD.__doc__.startswith("Inspired by ViT-FRD")
    text = " ".join(ViTFRD.__doc__.split())
    assert "From the paper's title" in text and "all else is ours" in text
    assert ViTFRD.mismatch.width and ViTFRD.mismatch.depth and ViTFRD.mismatch.grid


def test_value_by_hand():
    # Two positions, u = (1, -1) and -u, two groups that start from them: of cosines 1 and -1.
    teacher = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).T.reshape(1, 2, 1, 2)
    teacher = teacher.expand(1, 2, 2, 2)
    student = (torch.zeros(1, 3, 2, 2),)
    loss = built(ViTFRD(num_cells=2, temperature=1.0, **ONE), student, (teacher,))
    torch.nn.init.constant_(loss.recombine[0].value.bias, 0.5)
    # Two groups of either kind, so each gets half of what its kind has: the weights of a row still sum to 1.
    p = 1 / (1 + math.exp(-2))
    group = 2 * p - 1  # times u or -u
    expected = ((0.5 - group) ** 2 + (0.5 + group) ** 2) / 2
    assert loss(student, (teacher,)).item() == pytest.approx(expected, rel=1e-4)


def test_equals_a_plain_loop():
    student, teacher = pair()
    loss = built(ViTFRD(num_cells=2, temperature=0.4, **TWO), student, teacher)
    total = 0.0
    for recombine, students, teachers in zip(loss.recombine, student, teacher, strict=True):
        for s, t in zip(students, teachers, strict=True):
            tokens, seeds = cells(s, 2)
            ours = []
            for seed in seeds:
                weights = softmax([(recombine.query(seed) @ recombine.key(x)).item() / 3**0.5 for x in tokens])
                ours.append(sum(w * recombine.value(x) for w, x in zip(weights, tokens, strict=True)))
            tokens, seeds = cells(t, 2)
            members = [
                softmax([(seed @ x / seed.norm() / x.norm()).item() / 0.4 for seed in seeds]) for x in tokens
            ]  # per position, over groups
            for group, mine in enumerate(ours):
                share = [row[group] for row in members]
                target = sum(a * x for a, x in zip(share, tokens, strict=True)) / sum(share)
                total += ((mine - target) ** 2).sum().item() / (2 * 4 * 5)
    assert loss(student, teacher).item() == pytest.approx(total, rel=1e-9)


def test_the_scale_of_neither_model_counts():
    student, teacher = pair()
    loss = built(ViTFRD(**TWO), student, teacher)
    reference = loss(student, teacher).item()
    assert loss(tuple(5 * x + 1 for x in student), teacher).item() == pytest.approx(reference, rel=1e-3)
    assert loss(student, tuple(5 * x + 1 for x in teacher)).item() == pytest.approx(reference, rel=1e-3)


def test_cold_groups_are_the_clusters():
    """The teacher's map has two halves; with a small temperature, each group is the mean of its half."""
    left, right = torch.tensor([3.0, -1.0, -2.0]), torch.tensor([-1.0, 2.0, -1.0])
    teacher = torch.stack([left, left, right, right], dim=1)[None, :, None].expand(1, 3, 4, 4).double()
    groups = ViTFRD(num_cells=2, temperature=0.01, **ONE)._groups(teacher)
    expected = torch.stack([normed(x) for x in (left, right, left, right)]).double()
    torch.testing.assert_close(groups[0], expected, rtol=1e-4, atol=1e-6)


def test_a_group_without_members_is_finite():
    """9 positions and 16 groups, of which those between positions are no position's nearest."""
    student, teacher = pair(teacher_grid=(3, 3))
    for temperature in (1e-2, 1e-4):
        loss = built(ViTFRD(num_cells=4, temperature=temperature, **TWO), student, teacher)
        assert loss(student, teacher).isfinite()
        assert loss(student, tuple(torch.zeros_like(x) for x in teacher)).isfinite()


def test_nothing_that_is_learnt_makes_the_target():
    """With weights on both sides, a constant would be an optimum; here, the student alone has them."""
    student, teacher = pair()
    loss = built(ViTFRD(**TWO), student, teacher)
    before = loss._groups(teacher[0])
    for x in teacher:
        x.requires_grad_()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    values = []
    for _ in range(60):
        values.append(loss(student, teacher).item())
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    assert values[-1] < 0.8 * values[0] and all(x.grad is None for x in teacher)
    torch.testing.assert_close(loss._groups(teacher[0].detach()), before)


@pytest.mark.parametrize("grids", [((7, 7), (1, 1)), ((1, 1), (7, 7)), ((2, 3), (14, 14))], ids=str)
def test_any_grid_has_as_many_groups(grids):
    student, teacher = pair(grid=grids[0], teacher_grid=grids[1])
    assert built(ViTFRD(**TWO), student, teacher)(student, teacher).isfinite()


@pytest.mark.parametrize("options", [{"num_cells": 2}, {"temperature": 1.0}], ids=str)
def test_options_change_the_value(options):
    student, teacher = pair()
    values = [built(ViTFRD(**TWO | o), student, teacher)(student, teacher).item() for o in ({}, options)]
    assert abs(values[0] - values[1]) > 1e-3


def test_stages_are_added_and_where_it_reads():
    student, teacher = pair()
    loss = built(ViTFRD(**TWO), student, teacher)
    alone = []
    for k in range(2):
        one = built(ViTFRD(**ONE), student[k : k + 1], teacher[k : k + 1])
        one.recombine[0].load_state_dict(loss.recombine[k].state_dict())
        alone.append(one(student[k : k + 1], teacher[k : k + 1]))
    torch.testing.assert_close(loss(student, teacher), sum(alone))
    assert loss.locations() == {"student_feature_map": (0.5, 1.0), "teacher_feature_map": (0.3, 1.0)}


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="ViTFRD: num_cells must be > 0, got 0; 4 makes 16 groups."):
        ViTFRD(num_cells=0)
    with pytest.raises(ValueError, match="ViTFRD: temperature must be > 0, got -1; 0.1 makes groups that hardly over"):
        ViTFRD(temperature=-1)
    with pytest.raises(ValueError, match="ViTFRD: teacher_stages must be as many as student_stages, got 4 for 1; they"):
        ViTFRD(student_stages=(1.0,))
    student, teacher = pair()
    with pytest.raises(RuntimeError, match="ViTFRD: build must be called before forward"):
        ViTFRD(**TWO)(student, teacher)
    loss = built(ViTFRD(**TWO), student, teacher)
    with pytest.raises(ValueError, match="ViTFRD: teacher_feature_map must be a tuple of 2 tensors, got 1; give one"):
        loss(student, teacher[:1])
    with pytest.raises(ValueError, match="ViTFRD: teacher_feature_map has B=1 but student_feature_map has B=2; give"):
        loss(student, tuple(x[:1] for x in teacher))
    with pytest.raises(
        ValueError, match=r"ViTFRD: student_feature_map must have shape \(B, D, h, w\), got \(2, 3, 16\)"
    ):
        loss(tuple(x.flatten(2) for x in student), teacher)
    with pytest.raises(ValueError, match="ViTFRD: teacher_feature_map must have D=5 as in build, got D=4; build the"):
        loss(student, tuple(x[:, 1:] for x in teacher))
