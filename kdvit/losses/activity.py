"""Where a feature map is active: one number per position, whatever the width."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def activity(x: Tensor, power: int = 2) -> Tensor:
    """Mean over channels of |x|^power: (B, D, h, w) -> (B, 1, h, w)."""
    # Without abs() where it changes nothing: its gradient at 0 is no problem, its memory is.
    return (x if power % 2 == 0 else x.abs()).pow(power).mean(dim=1, keepdim=True)


def as_direction(maps: Tensor) -> Tensor:
    """Maps (B, 1, h, w) as vectors (B, h * w) of length 1; one that is 0 everywhere stays so.

    Example:
        >>> import torch
        >>> as_direction(activity(torch.tensor([3.0, 4.0]).sqrt().view(1, 1, 1, 2)))
        tensor([[0.6000, 0.8000]])
    """
    return F.normalize(maps.flatten(1), dim=1)
