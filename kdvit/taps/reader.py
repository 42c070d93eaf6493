"""Read the signals that the losses ask for out of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from kdvit.signals import CALLABLE_SIGNALS, MAP_SIGNALS, Location, ModelInfo, SignalInfo
from kdvit.taps.family import Family, Grid, Source
from kdvit.taps.huggingface import MODEL_TYPES, HuggingFaceViT, layers_of
from kdvit.taps.stages import TimmStages
from kdvit.taps.tap import TapPoint, Taps
from kdvit.taps.vit import CLASSES, TimmViT

#: Axes of each signal that is a tensor, the batch axis included.
AXES = {
    **dict.fromkeys(("logits", "dist_logits", "pooled", "cls_token", "normed_cls_token"), 2),
    **dict.fromkeys(("tokens", "patch_tokens", "normed_tokens", "normed_patch_tokens", "cls_attention"), 3),
    **dict.fromkeys(("query", "key", "value", "attention", *MAP_SIGNALS), 4),
}


def family_of(model: nn.Module, name: str, *, num_prefix_tokens: int | None = None, grid: Grid | None = None) -> Family:
    """Recognise a model by the names of its classes, so that no other library is imported for it.

    Args:
        model: the model, compiled or not.
        name: how error sentences call it.
        num_prefix_tokens: class, distillation and register tokens, where the model does not say.
        grid: (h, w) of the patch tokens, where the model does not say.
    """
    called, model = model, getattr(model, "_orig_mod", model)  # torch.compile(model) wraps the model
    classes = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if any(cls in CLASSES for cls in classes):
        kind: type[Family] = TimmViT
    elif any(cls.startswith("transformers.models.") for cls in classes) and model_type in MODEL_TYPES:
        kind = HuggingFaceViT if layers_of(model) else Family
    elif any(cls.startswith("timm.models.") for cls in classes) and hasattr(model, "feature_info"):
        kind = TimmStages
    else:
        kind = Family
    family = kind(model, name, num_prefix_tokens=num_prefix_tokens, grid=grid)
    if num_prefix_tokens not in (None, family.num_prefix_tokens):
        raise ValueError(
            f"{name}: num_prefix_tokens must be {family.num_prefix_tokens}, as the model has, got {num_prefix_tokens}; "
            "leave it out."
        )
    family.called = called
    return family


@dataclass(frozen=True)
class Request:
    """One signal at one location."""

    signal: str
    location: Location | None = None


class Reader:
    """The taps of one model and the signals made from what they catch.

    Args:
        family: how to read this model, from `family_of`.
        requests: what to read.
        input_size: (channels, height, width) of the images that the model will see, where known.
        stop_early: end the forward pass behind the last tap when nothing needs the model's output.

    Raises:
        ValueError: the model cannot give a requested signal.
    """

    def __init__(
        self,
        family: Family,
        requests: Sequence[Request],
        input_size: tuple[int, int, int] | None,
        *,
        stop_early: bool = False,
    ) -> None:
        self.family = family
        self.input_size = input_size
        self.stop_early = stop_early
        self.requests = tuple(dict.fromkeys(requests))
        splits_heads = any(r.signal in ("dist_logits", "dense_dist_logits") for r in self.requests)
        self.sources = {r: self._source(r, input_size, splits_heads) for r in self.requests}
        points = [point for source in self.sources.values() for point in source.points]
        needs_output = any(
            not source.points and request.signal not in CALLABLE_SIGNALS for request, source in self.sources.items()
        )
        self.taps = Taps(family.model, points, stop_early=stop_early and not needs_output, name=family.name)

    def _source(self, request: Request, input_size: tuple[int, int, int] | None, splits_heads: bool) -> Source:
        source = self.family.source(request.signal, request.location, input_size)
        if request.signal == "logits" and splits_heads:
            # With a distillation head the task loss belongs to the class head alone; the mean is for inference.
            return self.family.class_head_source()
        return source

    def read(self, images: Tensor) -> tuple[Any, dict[Request, Any]]:
        """Run the model once: (its output, or None where it was stopped early; the signals)."""
        output, caught = self.taps.run(self.family.called, images)
        return output, {request: self._compute(request, output, caught) for request in self.requests}

    def _compute(self, request: Request, output: Any, caught: Mapping[TapPoint, Any]) -> Any:
        source = self.sources[request]
        if request.signal in CALLABLE_SIGNALS:
            return source.compute()
        if not source.points:
            return source.compute(output)
        missing = [point.path for point in source.points if point not in caught]
        if missing:
            cure = "choose a module that runs (see model.named_modules())"
            if self.family.is_compiled():  # torch ignores hooks that come after the first compiled call
                cure = "the model was compiled and called before: call torch.compiler.reset() first"
            raise ValueError(
                f"{self.family.name}: {request.signal} is read at '{missing[0]}', but the model's forward never calls "
                f"that module; {cure}."
            )
        return source.compute(*(caught[point] for point in source.points))

    def describe(self, signals: Mapping[Request, Any]) -> dict[Request, SignalInfo]:
        """What was read, in shapes and geometry; from one pass over a probe image."""
        return {request: self._info(request, value) for request, value in signals.items()}

    def _info(self, request: Request, value: Any) -> SignalInfo:
        source = self.sources[request]
        shape, grid = (), source.grid
        if request.signal not in CALLABLE_SIGNALS:
            self._check(request, source, value)
            shape = tuple(value.shape[1:])
            grid = shape[-2:] if request.signal in MAP_SIGNALS else grid
        return SignalInfo(request.signal, source.location, shape, source.num_prefix_tokens, grid, self.family.name)

    def _check(self, request: Request, source: Source, value: Any) -> None:
        wanted = AXES[request.signal]
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.ndim != wanted:
            raise ValueError(
                f"{self.family.name}: {request.signal} at '{source.location}' must be a tensor with {wanted} axes, "
                f"got {found}; choose another module or another signal."
            )
        if "tokens" in request.signal and source.grid is not None:
            prefix, (height, width) = source.num_prefix_tokens, source.grid
            if value.shape[1] != prefix + height * width:
                raise ValueError(
                    f"{self.family.name}: {request.signal} at '{source.location}' must be {prefix} prefix and "
                    f"{height}x{width} patch tokens, got {value.shape[1]}; choose another module, or pass "
                    "num_prefix_tokens= and grid= for this image size."
                )

    def remove(self) -> None:
        """Take all taps off the model."""
        self.taps.remove()

    def __reduce__(self) -> tuple:
        # A copied or unpickled reader is made anew on the copied model: its sources hold modules of this one.
        return _reader, (self.family, self.requests, self.input_size, self.stop_early)


def _reader(family: Family, requests: tuple, input_size: tuple[int, int, int] | None, stop_early: bool) -> Reader:
    return Reader(family, requests, input_size, stop_early=stop_early)


def model_info(
    name: str,
    num_classes: int | None,
    needs: Mapping[str, Location | Sequence[Location] | None],
    infos: Mapping[Request, SignalInfo],
    input_size: tuple[int, int, int] | None,
) -> ModelInfo:
    """The part of what was read that one loss asked for."""
    signals = MappingProxyType({s: pick(s, at, infos) for s, at in needs.items()})
    return ModelInfo(name, num_classes, signals, input_size)


def requests_of(signal: str, location: Location | Sequence[Location] | None) -> list[Request]:
    """The single reads behind one input of a loss."""
    several = isinstance(location, Sequence) and not isinstance(location, str)
    return [Request(signal, where) for where in (location if several else (location,))]


def pick(signal: str, location: Location | Sequence[Location] | None, values: Mapping[Request, Any]) -> Any:
    """One value, or a tuple of them where the loss reads at several locations."""
    several = isinstance(location, Sequence) and not isinstance(location, str)
    found = tuple(values[request] for request in requests_of(signal, location))
    return found if several else found[0]
