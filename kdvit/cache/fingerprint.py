"""What a cache was made of, and in what a job differs from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdvit.models import uncompiled

if TYPE_CHECKING:
    from kdvit.bridge import ImageBridge
    from kdvit.data import ImageSplit, TransformSettings
    from kdvit.training import Training
    from kdvit.wrappers import Teacher

#: Images whose pixels stand for all.
NUM_IMAGES = 16
#: Augmentations of one picture that stand for all.
NUM_DRAWS = 8


def of_teacher(teacher: Teacher) -> dict[str, Any]:
    """The model that taught."""
    digest = hashlib.sha256()
    for name, weight in sorted(uncompiled(teacher.model).state_dict().items()):
        weight = weight.detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy())
    return {
        "teacher_weights": digest.hexdigest(),
        "teacher_class_map": teacher.class_map.tolist() if teacher.class_map is not None else None,
        "teacher_dtype": str(teacher.dtype) if teacher.dtype is not None else None,
    }


def of_bridge(bridge: ImageBridge, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """What was done to the student's images for the teacher. They are resized where their size is another."""
    return {
        "teacher_input_size": list(input_size),
        "channels_repeated_to": bridge.channels,
        "normalisation_scale": bridge.scale.flatten().tolist() if bridge.scale is not None else None,
        "normalisation_shift": bridge.shift.flatten().tolist() if bridge.shift is not None else None,
    }


def of_images(bridge: ImageBridge, input_size: tuple[int, int, int], image_size: Sequence[int]) -> dict[str, Any]:
    """What the teacher was shown, of images of the student of (height, width) `image_size`."""
    return {"image_size": list(image_size), **of_bridge(bridge, input_size)}


def of_job(split: ImageSplit, transform: TransformSettings, settings: Training, *, holds_out: bool) -> dict[str, Any]:
    """What a row depends on besides the teacher: images, augmentation, order and mixing.

    Args:
        split: the images that are trained on, without those that are held out.
        transform: of training.
        settings: of training.
        holds_out: whether some training images are held out.
    """
    mixes = bool(settings.mixup_alpha or settings.cutmix_alpha)
    return {
        "data": {
            "num_images": len(split),
            "classes": _sha256("\n".join(split.classes).encode()),
            "labels": _sha256(split.labels.tobytes()),
            "pixels": _pixels(split),
        },
        "transform": _plain(asdict(transform)),
        "augmentation": _augmentation(transform),
        "seed": settings.seed,
        "held_out_ratio": settings.held_out_ratio if holds_out else None,
        "mixup_alpha": float(settings.mixup_alpha),
        "cutmix_alpha": float(settings.cutmix_alpha),
        # Without mixing an image does not know what it shares a batch with.
        "batch_size": settings.batch_size if mixes else None,
    }


def differences(stored: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """In words, ``seed is 0 there and 1 here``; "" where all is equal."""
    stored, found = dict(leaves(stored)), dict(leaves(found))
    return ", ".join(
        f"{name} is {_short(stored.get(name))} there and {_short(found.get(name))} here"
        for name in {**stored, **found}
        if stored.get(name) != found.get(name)
    )


def leaves(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(``transform.image_size``, its value) and so on, of nested facts."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    """A checksum is recognised by its beginning."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def _pixels(split: ImageSplit) -> str:
    digest = hashlib.sha256()
    for index in np.linspace(0, len(split) - 1, min(NUM_IMAGES, len(split))).astype(np.int64):
        image = split.image(int(index))
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def _augmentation(transform: TransformSettings) -> str:
    """What the transform makes of a made-up picture; other versions of timm, torchvision or Pillow may differ in it."""
    from PIL import Image

    from kdvit.data.randomness import preserved_generators, seed_generators

    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (80, 96, 3), dtype=np.uint8))
    augment, digest = transform.training(), hashlib.sha256()
    with preserved_generators():
        for draw in range(NUM_DRAWS):
            seed_generators(draw)
            digest.update(augment(picture).numpy().tobytes())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
