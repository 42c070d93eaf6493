"""Attention between the tokens of two models, in full precision and without a score for every pair in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * query key^T) value: (B, H, N, d), (B, H, M, d), (B, H, M, e) -> (B, H, N, e).

    Autocast is switched off, because scores of unscaled features lose too much in half precision.
    """
    # The kernels that do not keep the scores want channels side by side.
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    with torch.autocast(query.device.type, enabled=False):
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


def split_channels(feature_map: Tensor, num_heads: int) -> Tensor:
    """Positions of a map as tokens, its channels in consecutive heads: (B, H * d, h, w) -> (B, H, N, d)."""
    return feature_map.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3)
