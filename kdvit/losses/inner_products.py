"""Inner products of all pairs of rows, in the precision of the rows."""

from __future__ import annotations

import torch
from torch import Tensor


def inner_products(x: Tensor, y: Tensor | None = None) -> Tensor:
    """(..., M, D), (..., N, D) -> (..., M, N), without ``y`` of ``x`` with itself; not in half precision by autocast.

    Example:
        >>> inner_products(torch.tensor([[1.0, 2.0], [0.0, 3.0]])).tolist()
        [[5.0, 6.0], [6.0, 9.0]]
    """
    with torch.autocast(x.device.type, enabled=False):
        return x @ (x if y is None else y).transpose(-2, -1)
