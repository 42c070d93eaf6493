"""Two feature maps on one grid, by a stated rule."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdvit.signals import Grid

#: What a loss may do where the grids differ.
RESIZES = ("pool", "bilinear", "bicubic", "nearest")


def resize(x: Tensor, grid: Grid, how: str) -> Tensor:
    """(B, D, h, w) -> (B, D, *grid), by adaptive average pooling or interpolation; the same tensor where it fits."""
    if tuple(x.shape[2:]) == tuple(grid):
        return x
    if how == "pool":
        return F.adaptive_avg_pool2d(x, grid)
    return F.interpolate(x, size=grid, mode=how, align_corners=None if how == "nearest" else False)


def match_grids(student: Tensor, teacher: Tensor, how: str = "pool") -> tuple[Tensor, Tensor]:
    """Both maps on one grid.

    ``"pool"``, the rule of the classical feature losses: the larger side of each axis is average-pooled to the smaller,
    whoever has it. The others interpolate the student's map to the teacher's grid.

    Example:
        >>> import torch
        >>> student, teacher = match_grids(torch.rand(1, 3, 14, 14), torch.rand(1, 5, 7, 7))
        >>> student.shape
        torch.Size([1, 3, 7, 7])
    """
    if how != "pool":
        return resize(student, tuple(teacher.shape[2:]), how), teacher
    grid = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return resize(student, grid, how), resize(teacher, grid, how)
