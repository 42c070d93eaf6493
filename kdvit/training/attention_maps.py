"""Where a model looks on given images: its attention, or the strength of its activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.signals import SignalInfo
from kdvit.taps.reader import Request
from kdvit.wrappers import Teacher, Wrapper

#: Where the maps are read: behind a third, two thirds and all of the blocks or stages.
DEPTHS = (1 / 3, 2 / 3, 1.0)
#: What is shown, best first, and the signal that it is made from.
KINDS = {
    "attention of the class token": "cls_attention",
    "attention, mean over all tokens": "attention",
    "activation, mean square over the channels": "feature_map",
}
#: Positions along an axis at most; the first stages of a CNN have more.
_MAX_GRID = 64


@dataclass(frozen=True)
class AttentionMaps:
    """Where one model looks, image by image.

    Args:
        kind: one of `KINDS`.
        layers: module path of each map, front to back.
        maps: (n, h, w) float32 >= 0 a layer, on the model's own grid.
    """

    kind: str
    layers: tuple[str, ...]
    maps: tuple[Tensor, ...]


@torch.no_grad()
def attention_maps(wrapper: Wrapper, images: Tensor) -> AttentionMaps:
    """Attention over the patches, averaged over heads; activations of a model that has no attention over one grid.

    The taps are this function's own, and are taken off again. The model must be in eval mode.

    Args:
        wrapper: a `Student`, or a `Teacher` that a Distiller has paired with one.
        images: (n, C, H, W), normalised for the student; a teacher's bridge applies.

    Raises:
        ValueError: the model is neither a transformer nor made of stages, its maps are single positions, or taps do not
            fire (it was compiled).
    """
    taught = isinstance(wrapper, Teacher)
    ear = wrapper.own()
    # The grid of a model that takes several sizes follows from the images at hand.
    size, ear.input_size = ear.input_size, tuple((wrapper.bridge(images[:1]) if taught else images).shape[1:])
    try:
        kind, infos = _listen(ear)
        signals = ear(images) if taught else ear(images)[1]
        found = {info.location: _map(signals[request].float(), info) for request, info in infos.items()}
    finally:
        ear.deafen()
        ear.input_size = size
    # A CNN on small images may end in a single position, which shows nothing.
    found = {layer: values for layer, values in found.items() if values[0].numel() > 1}
    if not found:
        raise ValueError(
            f"attention_maps: the layers of '{wrapper.name}' must have more than one position, got one for images of "
            f"{'x'.join(map(str, images.shape[2:]))}; there is nothing to see."
        )
    return AttentionMaps(kind, tuple(found), tuple(found.values()))


def _listen(ear: Wrapper) -> tuple[str, dict[Request, SignalInfo]]:
    """Tap for the best kind that the model gives; the last kind's refusal is the one that is raised."""
    *others, last = KINDS.items()
    for kind, signal in others:
        try:
            return kind, ear.listen([Request(signal, depth) for depth in DEPTHS])
        except ValueError:  # it has no attention, or no class token
            continue
    kind, signal = last
    return kind, ear.listen([Request(signal, depth) for depth in DEPTHS])


def _map(signal: Tensor, info: SignalInfo) -> Tensor:
    """One signal as (n, h, w)."""
    if info.signal == "feature_map":
        strength = signal.square().mean(1)
        return F.adaptive_avg_pool2d(strength, [min(axis, _MAX_GRID) for axis in strength.shape[1:]])
    if info.signal == "attention":
        signal = signal.mean(2)  # over the queries: (n, H, P+N)
    return signal.mean(1)[:, info.num_prefix_tokens :].unflatten(1, info.grid)
