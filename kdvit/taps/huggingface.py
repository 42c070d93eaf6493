"""Hugging Face ViT, DeiT and DINOv2 (with registers too), recognised without importing transformers.

Module names differ between transformers 4 (``encoder.layer.0.attention.attention.query``) and 5
(``layers.0.attention.q_proj``): they are looked up, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdvit.signals import ATTENTION_SIGNALS, Location, tokens_to_map
from kdvit.taps.attention import scores_of
from kdvit.taps.family import Family, Grid, Source, first, logits_of
from kdvit.taps.tap import TapPoint

MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers")


def layers_of(model: nn.Module) -> str | None:
    """The path of the transformer layers, or None in a model of somebody's own with such a config."""
    paths = {path for path, _ in model.named_modules()}
    names = ("layers", "encoder.layer", "encoder.layers")
    return next((_base(model) + name for name in names if _base(model) + name in paths), None)


def _base(model: nn.Module) -> str:
    return f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""


class HuggingFaceViT(Family):
    """A transformers model of one of `MODEL_TYPES`, with or without a classifier."""

    kind = "a Hugging Face transformer with one token grid"
    by_index = (*ATTENTION_SIGNALS, "tail")

    def __init__(self, model: nn.Module, name: str, **geometry) -> None:
        super().__init__(model, name, **geometry)
        self.config = model.config
        registers = getattr(self.config, "num_register_tokens", 0)
        self.num_prefix_tokens = {"deit": 2}.get(self.config.model_type, 1) + registers
        self.has_cls_token = True
        # With a distillation head the class head is called cls_classifier.
        heads = [n for n in ("classifier", "cls_classifier") if isinstance(getattr(model, n, None), nn.Module)]
        self.classifier = heads[0] if heads else None
        self.layers = layers_of(model)
        self.norm = f"{_base(model)}layernorm"
        layer = f"{self.layers}.0."
        names = [path.removeprefix(layer) for path, _ in model.named_modules() if path.startswith(layer)]
        self.projections = {
            signal: next(n for n in names if n.endswith((f".{signal}", f".{signal[0]}_proj")))
            for signal in ("query", "key", "value")
        }

    def input_size(self) -> tuple[int, int, int]:
        size = self.config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return self.config.num_channels, height, width

    def takes_any_size(self) -> bool:
        return self.config.model_type.startswith("dinov2")  # it interpolates its positions

    def num_blocks(self) -> int:
        return len(self.model.get_submodule(self.layers))

    def grid(self, input_size: tuple[int, int, int] | None) -> Grid:
        _, height, width = input_size or self.input_size()
        patch = self.config.patch_size
        patch_height, patch_width = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        return height // patch_height, width // patch_width

    def source(self, signal: str, location: Location | None, input_size: tuple[int, int, int] | None) -> Source:
        if isinstance(location, str):
            return self.by_path(signal, location, self.grid(input_size))
        if signal in ("logits", "dist_logits", "pooled", "head"):
            return self._classifier(signal)
        grid = self.grid(input_size)
        if signal in ("dense_logits", "dense_dist_logits"):
            return self._dense_logits(signal, grid)
        if signal.startswith("normed_"):
            return self._tokens(signal.removeprefix("normed_"), self.norm, grid)
        signal = "feature_map" if signal == "pre_activation" else signal  # no layer ends in a ReLU
        block = self.index(location, self.num_blocks())
        path = f"{self.layers}.{block}"
        if signal == "tail":
            if self.classifier is None:
                raise self.cannot(signal, None)
            return Source(path, (), lambda: self.tail(block))
        if signal in ATTENTION_SIGNALS:
            return self._attention(signal, path, grid)
        return self._tokens(signal, path, grid)

    def class_head_source(self) -> Source:
        return Source("output.cls_logits", (), lambda output: output.cls_logits)

    def _classifier(self, signal: str) -> Source:
        if signal == "logits":
            return Source("output", (), lambda output: logits_of(output, self.name))
        if signal == "dist_logits":
            if not hasattr(self.model, "distillation_classifier"):
                raise self.cannot(signal, None)
            return Source("output.distillation_logits", (), lambda output: output.distillation_logits)
        if self.classifier is None:
            raise self.cannot(signal, None)
        if signal == "pooled":
            return Source(self.classifier, (TapPoint(self.classifier, "input"),), lambda call: call[0][0])
        classifier = self.model.get_submodule(self.classifier)
        return Source(self.classifier, (), lambda: classifier)

    def classifier_layer(self) -> nn.Linear | nn.Conv2d:
        if self.classifier is None:
            raise self.cannot("head", None)
        return self.linear(self.model.get_submodule(self.classifier))

    def _dense_logits(self, signal: str, grid: Grid) -> Source:
        """The classifier on every normed patch token. DINOv2's takes the class token and a mean: on no single token."""
        path = self.classifier if signal == "dense_logits" else "distillation_classifier"
        if path is None or self.config.model_type.startswith("dinov2"):
            raise self.cannot("dense_logits", None)
        if not hasattr(self.model, path):
            raise self.cannot(signal, None)
        head, prefix = self.model.get_submodule(path), self.num_prefix_tokens

        def classify(tokens: Tensor) -> Tensor:
            return tokens_to_map(head(first(tokens)[:, prefix:]), grid)

        return Source(f"{self.norm} -> {path}", (TapPoint(self.norm),), classify, 0, grid)

    def _tokens(self, signal: str, path: str, grid: Grid) -> Source:
        point, prefix = (TapPoint(path),), self.num_prefix_tokens
        if signal == "tokens":
            return Source(path, point, first, prefix, grid)
        if signal == "patch_tokens":
            return Source(path, point, lambda x: first(x)[:, prefix:], 0, grid)
        if signal == "feature_map":
            return Source(path, point, lambda x: tokens_to_map(first(x)[:, prefix:], grid), 0, grid)
        return Source(path, point, lambda x: first(x)[:, 0])

    def _attention(self, signal: str, layer: str, grid: Grid) -> Source:
        num_heads = self.config.num_attention_heads

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

        def probabilities(query: Tensor, key: Tensor) -> Tensor:
            rows = heads(query)[:, :, :1] if signal == "cls_attention" else heads(query)
            attention = scores_of(rows, heads(key), rows.shape[-1] ** -0.5).softmax(-1)
            return attention[:, :, 0] if signal == "cls_attention" else attention

        wanted = ("query", "key") if signal in ("attention", "cls_attention") else (signal,)
        points = tuple(TapPoint(f"{layer}.{self.projections[name]}") for name in wanted)
        compute: Callable[..., Any] = probabilities if len(wanted) == 2 else heads
        return Source(f"{layer}.attention", points, compute, self.num_prefix_tokens, grid)

    def tail(self, block: int) -> Callable[[Tensor], Tensor]:
        """The rest of the model behind a layer: tokens (B, P+N, D) -> logits (B, C)."""
        model, prefix = self.model, self.num_prefix_tokens

        def run(tokens: Tensor) -> Tensor:
            for layer in model.get_submodule(self.layers)[block + 1 :]:
                tokens = first(layer(tokens))
            normed = model.get_submodule(self.norm)(tokens)
            if hasattr(model, "distillation_classifier"):
                return (model.cls_classifier(normed[:, 0]) + model.distillation_classifier(normed[:, 1])) / 2
            pooled = normed[:, 0]
            if self.config.model_type.startswith("dinov2"):
                pooled = torch.cat([pooled, normed[:, prefix:].mean(1)], dim=1)
            return model.classifier(pooled)

        return run

    def gives(self) -> Sequence[str]:
        whole, tail = ("logits, dense_logits, pooled, head, ", ", tail") if self.classifier else ("", "")
        return (
            f"{whole}normed_tokens",
            f"tokens, patch_tokens, cls_token, feature_map, query, key, value, attention{tail} "
            f"of blocks 0..{self.num_blocks() - 1}",
        )
