"""What a model family can give, and where it is read. The base class reads any nn.Module by dotted path."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdvit.signals import ATTENTION_SIGNALS, Grid, Location, nearest, tokens_to_map
from kdvit.taps.tap import TapPoint


@dataclass(frozen=True)
class Source:
    """Where one signal is read, and how it is made from what the taps catch there.

    Args:
        location: module path, for people.
        points: what must be caught.
        compute: the caught values, in the order of ``points``, -> the signal.
        num_prefix_tokens: P of the signal.
        grid: (h, w) of its patch tokens, where known beforehand.
    """

    location: str
    points: tuple[TapPoint, ...]
    compute: Callable[..., Any]
    num_prefix_tokens: int = 0
    grid: Grid | None = None


class Family:
    """Any nn.Module: ``logits`` from its output, everything else by dotted module path.

    Args:
        model: the model.
        name: how error sentences call it.
        num_prefix_tokens: P of token signals that are read by path; None for unknown (0).
        grid: (h, w) of the patch tokens that are read by path, where there are any.
    """

    #: What error sentences call such a model, and why it gives no attention.
    kind = "a plain module"
    no_attention = "a plain module, whose attention kdvit does not know"
    #: Signals that are read at a block index and never at a module path.
    by_index: tuple[str, ...] = ()
    #: Whether the first prefix token is a class token.
    has_cls_token = False

    def __init__(
        self, model: nn.Module, name: str, *, num_prefix_tokens: int | None = None, grid: Grid | None = None
    ) -> None:
        self.model = model
        #: What is called to run the model: itself, or its compiled form.
        self.called: nn.Module = model
        self.name = name
        self.num_prefix_tokens = num_prefix_tokens or 0
        self.has_cls_token = bool(num_prefix_tokens)
        self._grid = grid

    def is_compiled(self) -> bool:
        """Whether torch.compile holds the model or a part of it."""
        parts = any(module._compiled_call_impl is not None for module in self.model.modules())
        return parts or self.called is not self.model

    # Facts about the model; None where it does not say.

    def input_size(self) -> tuple[int, int, int] | None:
        """(channels, height, width) that the model was made for."""
        size = self._pretrained_cfg().get("input_size")
        return tuple(size) if size else None

    def takes_any_size(self) -> bool | None:
        """Whether other image sizes than `input_size` run."""
        return None

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(mean, std) of the images that the model was trained on."""
        config = self._pretrained_cfg()
        if config.get("mean") is None or config.get("std") is None:
            return None
        return tuple(config["mean"]), tuple(config["std"])

    def _pretrained_cfg(self) -> dict:
        """What a model states of its images in timm's way."""
        return getattr(self.model, "pretrained_cfg", None) or {}

    def num_blocks(self) -> int | None:
        """How many blocks (or stages) an index can name."""
        return None

    # Reading

    def classifier_layer(self) -> nn.Linear | nn.Conv2d:
        """The last layer: linear, or a 1x1 convolution over a 1x1 map.

        Raises:
            ValueError: it is neither, or this family does not know it.
        """
        raise self.cannot("head", None)

    def linear(self, layer: nn.Module) -> nn.Linear | nn.Conv2d:
        """The layer, if it is a linear one."""
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
            return layer
        raise ValueError(
            f"{self.name}: the classifier must be a linear layer to be deployed with a student, got "
            f"{type(layer).__name__}; choose another teacher, or a loss that deploys the student alone."
        )

    def source(self, signal: str, location: Location | None, input_size: tuple[int, int, int] | None) -> Source:
        """Where a signal is read.

        Raises:
            ValueError: the model cannot give it; the sentence names the model, what was asked for and what there is.
        """
        if signal == "logits":
            return Source("output", (), lambda output: logits_of(output, self.name))
        if isinstance(location, str):
            return self.by_path(signal, location)
        raise self.cannot(signal, location)

    def by_path(self, signal: str, path: str, grid: Grid | None = None) -> Source:
        """A signal as it comes out of the module at a dotted path, with the geometry that is known or was given."""
        self.check_path(path)
        points = (TapPoint(path),)
        prefix, grid = self.num_prefix_tokens, self._grid or grid

        def on_grid(out: Any) -> Any:
            x = first(out)
            return tokens_to_map(x[:, prefix:], grid) if grid and isinstance(x, Tensor) and x.ndim == 3 else x

        def part(out: Any, tokens: slice | int) -> Any:
            x = first(out)  # what is no tensor of tokens is refused when it is described
            return x[:, tokens] if isinstance(x, Tensor) and x.ndim > 1 else x

        whole = {
            "tokens": Source(path, points, first, prefix, grid),
            "patch_tokens": Source(path, points, lambda out: part(out, slice(prefix, None)), 0, grid),
            "cls_token": Source(path, points, lambda out: part(out, 0)),
            "feature_map": Source(path, points, on_grid),
        }
        if signal not in whole:
            raise self.cannot(signal, path)
        if signal == "cls_token" and not self.has_cls_token:
            raise self.no_cls_token(signal, path)
        return whole[signal]

    def check_path(self, path: str) -> None:
        known = [name for name, _ in self.model.named_modules() if name]
        if path not in known:
            hint = nearest(path, known) or f"; it starts with: {', '.join(n for n, _ in self.model.named_children())}."
            raise ValueError(f"{self.name}: module path must exist, got '{path}'{hint}")

    def index(self, location: Location | None, count: int, what: str = "block") -> int:
        """A block or stage index, counted from the front; 0.5 is where half of the blocks have run."""
        if isinstance(location, float):
            if not 0 < location <= 1:
                raise ValueError(
                    f"{self.name}: a share of the {what}s must be in (0, 1], got {location}; 0.5 is the middle."
                )
            return math.ceil(round(location * count, 6)) - 1  # 0.7 * 10 is a little above 7
        if not isinstance(location, int) or isinstance(location, bool):
            raise ValueError(
                f"{self.name}: {what} must be an index, a share of the depth or a dotted module path, "
                f"got {location!r}; it has {count} {what}s."
            )
        if not -count <= location < count:
            raise ValueError(
                f"{self.name}: {what} must be in 0..{count - 1} (or -{count}..-1 from the end), got {location}; "
                f"the model has {count} {what}s."
            )
        return location % count

    def cannot(self, signal: str, location: Location | None) -> ValueError:
        """The sentence for a signal that this model does not give."""
        where = "" if location is None else f" at {location!r}"
        if signal in self.by_index and isinstance(location, str):
            last = self.num_blocks() - 1
            return ValueError(
                f"{self.name}: {signal} must be read at a block index, 0..{last}, got {location!r}; "
                "name the block by its index."
            )
        if signal in ATTENTION_SIGNALS:
            cure = "choose a transformer (a timm or Hugging Face ViT, DeiT, DINO, BEiT, Eva, CaiT) or another loss"
            return ValueError(f"{self.name} gives no {signal}{where}: it is {self.no_attention}; {cure}.")
        if signal == "dense_logits":
            cure = "choose a timm ViT, a timm model with a global_pool module, or a loss that reads logits"
            why = "kdvit knows no way to put its classifier on one position"
            return ValueError(f"{self.name} gives no {signal}: {why}; {cure}.")
        if signal in ("dist_logits", "dense_dist_logits"):
            cure = "choose a distilled model such as deit_tiny_distilled_patch16_224, or loss 'kd'"
            return ValueError(f"{self.name} gives no {signal}: it has no distillation head; {cure}.")
        gives = "; ".join(self.gives())
        return ValueError(f"{self.name} gives no {signal}{where}: it is {self.kind} and gives {gives}.")

    def no_cls_token(self, signal: str, path: str) -> ValueError:
        """The sentence for a class token that is not there."""
        instead = "attention" if signal == "cls_attention" else "patch_tokens"
        declare = "; if it has one, pass num_prefix_tokens=" if self.num_blocks() is None else ""
        return ValueError(
            f"{self.name} gives no {signal} at '{path}': it has no class token there; read {instead} instead{declare}."
        )

    def gives(self) -> Sequence[str]:
        """The signals that this model can give."""
        cls_token = "cls_token, " if self.has_cls_token else ""
        return ("logits", f"tokens, patch_tokens, {cls_token}feature_map of a dotted module path such as 'layers.3'")


def first(output: Any) -> Any:
    """The tensor of a module that returns a tuple (Hugging Face layers)."""
    return output[0] if isinstance(output, (tuple, list)) else output


def logits_of(output: Any, name: str) -> Tensor:
    """The logits in a model's output: a tensor, a tuple, a dict or an object with ``.logits``.

    A pair of logits of one shape, as distilled models give in training, is averaged, as they do at inference.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        pair = len(output) == 2 and isinstance(output[1], Tensor) and output[0].shape == output[1].shape
        logits = torch.stack(tuple(output)).mean(0) if pair else output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{name}: the model must return logits as a tensor, a tuple, a dict or an object with .logits, "
            f"got {type(output).__name__}; choose a model with a classifier, or wrap it."
        )
    return logits
