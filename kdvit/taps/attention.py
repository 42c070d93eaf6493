"""Query, key, value and probabilities of timm's attention modules, as the attention product really uses them.

Fused kernels never hold the probabilities, so they are recomputed, and only for the blocks (or rows) asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.taps.tap import TapPoint

Read = tuple[tuple[TapPoint, ...], Callable[..., Tensor]]


def scores_of(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """scale * q k^T, in float32 at least: autocast would round the scores, which a fused kernel does not."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return (query.to(dtype) * scale) @ key.to(dtype).transpose(-2, -1)


class AttentionReader:
    """Reads one timm attention module with fused or separate projections, q/k norm, rotary embedding and masks.

    Args:
        path: the module's path in the model.
        module: the attention module, of a class in `READABLE`.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self.module = module
        self.num_heads = module.num_heads
        # Eva and BEiT add a separate bias inside F.linear, so their qkv module is never called and a hook on it
        # would stay silent: the projection is then repeated from the attention's input.
        self.calls_qkv = module.qkv is not None and getattr(module, "q_bias", None) is None
        self.has_norms = hasattr(module, "q_norm")

    def read(self, signal: str) -> Read:
        """(tap points, function of what they catch) for query, key, value, attention or cls_attention."""
        if signal in ("query", "key"):
            return self._rotated(signal)
        if signal == "value":
            return self._value()
        (query_points, query), (key_points, key) = self._rotated("query"), self._rotated("key")
        bias_points, bias = self._bias()
        only_cls = signal == "cls_attention"

        def probabilities(*caught: Any) -> Tensor:
            q = query(*caught[: len(query_points)])
            k = key(*caught[len(query_points) : len(query_points) + len(key_points)])
            b = bias(q, *caught[len(query_points) + len(key_points) :])
            if only_cls:
                q, b = q[:, :, :1], b if b is None or b.shape[-2] == 1 else b[..., :1, :]
            attention = self.softmax(q, k, b)
            return attention[:, :, 0] if only_cls else attention

        return query_points + key_points + bias_points, probabilities

    def softmax(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(scale * q k^T + bias) over the keys, in float32 at least."""
        scores = scores_of(query, key, self.module.scale)
        if bias is not None and bias.dtype == torch.bool:
            scores = scores.masked_fill(~bias, float("-inf"))
        elif bias is not None:
            scores = scores + bias.to(scores.dtype)
        return scores.softmax(-1)

    def _input(self) -> TapPoint:
        return TapPoint(self.path, "input")

    def _projected(self, part: int) -> Read:
        """Query (0), key (1) or value (2) right after the projection, (B, H, P+N, d)."""
        module, split = self.module, self._split
        if module.qkv is None:
            return (TapPoint(f"{self.path}.{'qkv'[part]}_proj"),), split
        if self.calls_qkv:
            return (TapPoint(f"{self.path}.qkv"),), lambda qkv: split(qkv.chunk(3, dim=-1)[part])

        def project(call: tuple) -> Tensor:
            weight = module.qkv.weight.chunk(3)[part]
            return split(F.linear(call[0][0], weight, (module.q_bias, module.k_bias, module.v_bias)[part]))

        return (self._input(),), project

    def _split(self, x: Tensor) -> Tensor:
        batch, num_tokens, dim = x.shape
        # Grouped-query attention has fewer key and value heads, all of the same width as the query's.
        head_dim = getattr(self.module, "head_dim", None) or self.module.qkv.weight.shape[0] // (3 * self.num_heads)
        return x.reshape(batch, num_tokens, dim // head_dim, head_dim).transpose(1, 2)

    def _rotated(self, signal: str) -> Read:
        """Query or key after q/k norm and rotary embedding."""
        part = 0 if signal == "query" else 1
        if self.has_norms:
            points, base = (TapPoint(f"{self.path}.{signal[0]}_norm"),), lambda x: x
        else:
            points, base = self._projected(part)
        groups = self._groups() if part else 1
        if not hasattr(self.module, "rotate_half"):  # no rotary embedding in this class
            return points, base
        num_prefix, half = self.module.num_prefix_tokens, self.module.rotate_half

        def rotate(x: Any, call: tuple) -> Tensor:
            from timm.layers import apply_rot_embed_cat  # only reached for a timm model

            x = base(x)
            args, kwargs = call
            rope = kwargs.get("rope", args[1] if len(args) > 1 else None)
            if rope is not None:
                patches = apply_rot_embed_cat(x[:, :, num_prefix:], rope, half=half)
                x = torch.cat([x[:, :, :num_prefix], patches], dim=2).type_as(x)
            return x.repeat_interleave(groups, dim=1) if groups > 1 else x

        return (*points, self._input()), rotate

    def _value(self) -> Read:
        points, base = self._projected(2)
        groups = self._groups()
        if groups == 1:
            return points, base
        return points, lambda x: base(x).repeat_interleave(groups, dim=1)

    def _groups(self) -> int:
        return getattr(self.module, "num_kv_groups", 1)

    def _bias(self) -> tuple[tuple[TapPoint, ...], Callable[..., Tensor | None]]:
        """What is added to the scores: BEiT's relative position bias, or a mask given to the module."""
        module = self.module

        def bias(query: Tensor, call: tuple) -> Tensor | None:
            args, kwargs = call
            added = kwargs.get("attn_mask", kwargs.get("shared_rel_pos_bias"))
            if kwargs.get("is_causal"):
                length = query.shape[2]
                added = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
            if getattr(module, "relative_position_bias_table", None) is not None:
                table = module._get_rel_pos_bias()
                added = table if added is None else table + added
            return added

        return (self._input(),), bias


class TalkingHeadsReader(AttentionReader):
    """CaiT: heads are mixed before the softmax; the mix after it belongs to the value product and is left out."""

    def softmax(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        scores, mix = scores_of(query, key, self.module.scale), self.module.proj_l
        with torch.autocast(scores.device.type, enabled=False):
            weight, added = mix.weight.to(scores.dtype), mix.bias.to(scores.dtype)
            return F.linear(scores.permute(0, 2, 3, 1), weight, added).permute(0, 3, 1, 2).softmax(-1)


#: Attention classes that are known to compute what these readers repeat; any other is refused.
READABLE: dict[str, type[AttentionReader]] = {
    "timm.layers.attention.Attention": AttentionReader,
    "timm.layers.attention.AttentionRope": AttentionReader,
    "timm.models.eva.EvaAttention": AttentionReader,
    "timm.models.beit.Attention": AttentionReader,
    "timm.models.cait.TalkingHeadAttn": TalkingHeadsReader,
}


def reader_for(path: str, module: nn.Module) -> AttentionReader | None:
    """The reader of an attention module, or None where its class is not known."""
    cls = type(module)
    reader = READABLE.get(f"{cls.__module__}.{cls.__qualname__}")
    return reader(path, module) if reader else None
