"""Sample images with the heat of both models' maps, as pictures inside the page."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from kdvit.report.run import Insight

#: From cold to hot: dark violet, magenta, orange, pale yellow. Colour-blind readers see it as dark to bright.
_HEAT = np.array([(20, 10, 60), (130, 28, 115), (226, 74, 64), (250, 160, 40), (252, 244, 164)], dtype=float)
#: How much of the picture the coldest and the hottest place hide.
_COVER = (0.55, 0.8)
#: Pixels along an axis that a small picture or map is enlarged to, so that every browser shows it alike.
_SIZE = 112


@dataclass(frozen=True)
class Guess:
    """A model's likeliest classes for one image, and whether the first is the label."""

    classes: Sequence[tuple[str, float]]
    right: bool


@dataclass(frozen=True)
class Sample:
    """One image: pictures are data URIs; ``heat`` holds a picture for each layer of each model."""

    label: str
    picture: str
    heat: Mapping[str, Sequence[str]]
    guesses: Mapping[str, Guess | None]


def samples_of(insight: Insight) -> list[Sample]:
    """The images that the run kept, with what both models made of them."""
    models = {side: insight.facts[side] for side in ("teacher", "student") if insight.facts[side]}
    found = []
    for index, label in enumerate(insight.facts["labels"]):
        heat = {
            side: [_overlay(insight.tensors[f"{side}.{layer}"][index]) for layer, _ in enumerate(model["layers"])]
            for side, model in models.items()
        }
        guesses = {side: _guess(model["predictions"], index, label) for side, model in models.items()}
        found.append(Sample(label, _picture(insight.tensors["images"][index]), heat, guesses))
    return found


def _guess(predictions: Sequence[Any] | None, index: int, label: str) -> Guess | None:
    if predictions is None:
        return None
    classes = [(str(name), float(share)) for name, share in predictions[index]]
    return Guess(classes, classes[0][0] == label)


def _picture(pixels: np.ndarray) -> str:
    """(1 or 3, h, w) uint8 -> a data URI; photographs as JPEG, small images pixel by pixel."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    if max(image.size) >= _SIZE:
        return _uri(image, "JPEG", quality=88)
    times = -(-_SIZE // max(image.size))
    return _uri(image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST), "PNG")


def _overlay(values: np.ndarray) -> str:
    """(h, w) -> a half transparent picture, from the map's lowest to its highest value, on the map's own grid."""
    values = np.nan_to_num(values.astype(float), posinf=0.0, neginf=0.0)
    span = values.max() - values.min()
    heat = (values - values.min()) / span if span > 0 else np.zeros_like(values)
    place = heat * (len(_HEAT) - 1)
    colour = np.stack([np.interp(place, range(len(_HEAT)), channel) for channel in _HEAT.T], axis=-1)
    cover = 255 * (_COVER[0] + (_COVER[1] - _COVER[0]) * heat)
    image = Image.fromarray(np.concatenate([colour, cover[..., None]], axis=-1).round().astype(np.uint8))
    times = -(-_SIZE // max(image.size))
    return _uri(image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST), "PNG")


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{b64encode(buffer.getvalue()).decode()}"
