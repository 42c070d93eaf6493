"""timm's isotropic transformers: VisionTransformer (ViT, DeiT, DINOv2, ...), Eva (DINOv3, EVA-02), BEiT, CaiT."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kdvit.signals import ATTENTION_SIGNALS, Location, tokens_to_map
from kdvit.taps.attention import reader_for
from kdvit.taps.family import Grid, Source
from kdvit.taps.tap import TapPoint
from kdvit.taps.timm_facts import TimmFacts

CLASSES = (
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.eva.Eva",
    "timm.models.beit.Beit",
    "timm.models.cait.Cait",
)


class TimmViT(TimmFacts):
    """A timm transformer whose tokens keep one grid through ``model.blocks``."""

    kind = "a transformer with one token grid"
    by_index = (*ATTENTION_SIGNALS, "tail")

    def __init__(self, model: nn.Module, name: str, **geometry) -> None:
        super().__init__(model, name, **geometry)
        # CaiT's class token joins only in blocks_token_only: its blocks carry patch tokens alone.
        self.cls_joins_late = getattr(model, "blocks_token_only", None) is not None
        self.normed_prefix = model.num_prefix_tokens
        self.num_prefix_tokens = 0 if self.cls_joins_late else model.num_prefix_tokens
        # A model may have registers and no class token: its first prefix token is then a register.
        self.has_cls_token = model.cls_token is not None and self.num_prefix_tokens > 0

    def num_blocks(self) -> int:
        return len(self.model.blocks)

    def takes_any_size(self) -> bool:
        return not getattr(self.model.patch_embed, "strict_img_size", True) or bool(
            getattr(self.model, "dynamic_img_size", False)
        )

    def grid(self, input_size: tuple[int, int, int] | None) -> Grid:
        if input_size is None or not self.takes_any_size():
            return tuple(self.model.patch_embed.grid_size)
        return tuple(self.model.patch_embed.dynamic_feat_size(tuple(input_size[1:])))

    def source(self, signal: str, location: Location | None, input_size: tuple[int, int, int] | None) -> Source:
        if isinstance(location, str):
            return self.by_path(signal, location, self.grid(input_size))
        if signal in ("logits", "dist_logits", "pooled", "head"):
            return self.classifier_source(signal)
        grid = self.grid(input_size)
        signal = "feature_map" if signal == "pre_activation" else signal  # no block ends in a ReLU
        if signal in ("dense_logits", "dense_dist_logits"):
            return self._dense_logits(signal, grid)
        if signal.startswith("normed_"):
            # With average pooling timm norms behind the pooling; `norm` is then an Identity and gives what there is.
            return self._tokens(signal.removeprefix("normed_"), "norm", self.normed_prefix, grid)
        block = f"blocks.{self.index(location, self.num_blocks())}"
        if signal == "tail":
            return Source(block, (), lambda: self.tail(self.index(location, self.num_blocks()), grid))
        if signal in ATTENTION_SIGNALS:
            return self._attention(signal, block, grid)
        return self._tokens(signal, block, self.num_prefix_tokens, grid)

    def _tokens(self, signal: str, path: str, prefix: int, grid: Grid) -> Source:
        point = (TapPoint(path),)
        if signal == "tokens":
            return Source(path, point, lambda x: x, prefix, grid)
        if signal == "patch_tokens":
            return Source(path, point, lambda x: x[:, prefix:], 0, grid)
        if signal == "feature_map":
            return Source(path, point, lambda x: tokens_to_map(x[:, prefix:], grid), 0, grid)
        if self.model.cls_token is None or not prefix:
            raise self.no_cls_token(signal, path)
        return Source(path, point, lambda x: x[:, 0])

    def _dense_logits(self, signal: str, grid: Grid) -> Source:
        """The classifier on every patch token, normed as the pooled token is."""
        model, prefix = self.model, self.normed_prefix
        path = "head" if signal == "dense_logits" else "head_dist"
        if signal == "dense_dist_logits" and not isinstance(getattr(model, path, None), nn.Module):
            raise self.cannot(signal, None)
        if getattr(model, "attn_pool", None) is not None:  # its classifier knows the pooled query alone
            raise self.cannot(signal, None)
        head, norm = model.get_submodule(path), getattr(model, "fc_norm", nn.Identity())

        def classify(tokens: Tensor) -> Tensor:
            return tokens_to_map(head(model.head_drop(norm(tokens[:, prefix:]))), grid)

        return Source(f"norm -> {path}", (TapPoint("norm"),), classify, 0, grid)

    def _attention(self, signal: str, block: str, grid: Grid) -> Source:
        modules = dict(self.model.named_modules())
        path = f"{block}.attn" if f"{block}.attn" in modules else block
        reader = reader_for(path, modules[path])
        if reader is None:
            raise ValueError(
                f"{self.name} gives no {signal} at '{path}': kdvit cannot read the attention of "
                f"{type(modules[path]).__name__} exactly; choose another model, or a loss that reads tokens."
            )
        if signal == "cls_attention" and not self.has_cls_token:
            raise self.no_cls_token(signal, path)
        points, compute = reader.read(signal)
        return Source(path, points, compute, self.num_prefix_tokens, grid)

    def tail(self, block: int, grid: Grid) -> Callable[[Tensor], Tensor]:
        """The rest of the model behind a block: tokens (B, P+N, D) -> logits (B, C).

        Rotary and shared relative positions are made anew, as the model's forward makes them.
        """
        model = self.model

        def run(tokens: Tensor) -> Tensor:
            for index, rest in enumerate(model.blocks[block + 1 :], start=block + 1):
                tokens = rest(tokens, **self._block_context(index, grid))
            if self.cls_joins_late:
                tokens = model.forward_cls(tokens)
            return logits(model.forward_head(model.norm(tokens)))

        def logits(output: Tensor | tuple) -> Tensor:
            return torch.stack(tuple(output)).mean(0) if isinstance(output, tuple) else output

        return run

    def _block_context(self, index: int, grid: Grid) -> dict[str, Tensor]:
        """The positions that the model hands to each block."""
        rope = getattr(self.model, "rope", None)
        if rope is not None:
            fixed = not self.model.dynamic_img_size and hasattr(rope, "feat_shape")
            embed = rope.get_embed() if fixed else rope.get_embed(shape=grid)
            return {"rope": embed[index] if getattr(self.model, "rope_mixed", False) else embed}
        shared = getattr(self.model, "rel_pos_bias", None)
        return {"shared_rel_pos_bias": shared()} if shared is not None else {}

    def gives(self) -> Sequence[str]:
        cls_token = "cls_token, " if self.has_cls_token else ""
        return (
            "logits, dense_logits, pooled, head, normed_tokens",
            f"tokens, patch_tokens, {cls_token}feature_map, query, key, value, attention, tail "
            f"of blocks 0..{self.num_blocks() - 1}",
        )
