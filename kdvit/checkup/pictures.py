"""What can be seen in a data set before any model: classes, blank pictures, pictures in both splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from kdvit.checkup.findings import Finding
from kdvit.checkup.wording import counted, listed
from kdvit.data import ImageData, ImageSplit

#: Pixels that are decoded for each split: all of a CIFAR, some hundreds of photographs; seconds in either case.
MAX_PIXELS = 60_000_000
#: So many times the images of the smallest class make the largest one too large.
MAX_IMBALANCE = 10


def look_at_data(data: ImageData) -> Iterator[Finding]:
    """Whether the classes and the pictures of a data set are what they should be.

    Raises:
        ValueError: a picture cannot be decoded; the sentence names it.
    """
    sampled = [(split, _sample(split)) for split in (data.train, data.test)]
    looked_at = sum(len(indices) for _, indices in sampled)
    total = len(data.train) + len(data.test)
    seen = f"all {total:,} pictures" if looked_at == total else f"{looked_at:,} of {total:,} pictures"
    troubles = [*_classes(data), *_pictures(data, sampled, seen)]
    yield from troubles
    if not troubles:
        counts = np.bincount(data.train.labels, minlength=len(data.classes))
        each = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
        yield Finding(
            "ok",
            "data",
            f"{len(data.train):,} training images, {each} a class; {len(data.test):,} test images; {seen} "
            "looked at: none blank, none in both",
        )


def _classes(data: ImageData) -> Iterator[Finding]:
    for split in (data.train, data.test):
        counts = np.bincount(split.labels, minlength=len(data.classes))
        missing = [data.classes[label] for label in np.flatnonzero(counts == 0)]
        if missing:
            cost = "they cannot be learned" if split is data.train else "nobody will see how they are learned"
            yield Finding(
                "warning",
                "classes",
                f"{len(missing)} of {len(data.classes)} classes have no image in {split.name}: {listed(missing)}; "
                f"{cost}.",
                "add images of them, or leave the classes out.",
            )
    counts = np.bincount(data.train.labels, minlength=len(data.classes))
    present = counts[counts > 0]
    if present.max() >= MAX_IMBALANCE * present.min():
        most, least = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max() + 1).argmin())
        yield Finding(
            "warning",
            "classes",
            f"they are far from equal in train: {counts[most]:,} images of '{data.classes[most]}', "
            f"{counts[least]:,} of '{data.classes[least]}'.",
            "look at the accuracy of each class, not at the mean alone; add images of the rare ones.",
        )


def _pictures(data: ImageData, sampled: Sequence[tuple[ImageSplit, np.ndarray]], looked_at: str) -> Iterator[Finding]:
    seen: dict[bytes, int] = {}
    blank: list[str] = []
    twice: list[tuple[int, int]] = []
    for split, indices in sampled:
        for index in indices.tolist():
            image = split.image(index)
            if _is_blank(image):
                blank.append(split.where(index))
                continue
            digest = hashlib.blake2b(f"{image.mode} {image.size}".encode() + image.tobytes(), digest_size=16).digest()
            if split is data.train:
                seen.setdefault(digest, index)
            elif digest in seen:
                twice.append((index, seen[digest]))
    if blank:
        yield Finding(
            "warning",
            "data",
            f"of {looked_at}, {len(blank)} have one colour throughout: {listed(blank)}.",
            "look at them, and remove them.",
        )
    if twice:
        test, train = twice[0]
        yield Finding(
            "warning",
            "data",
            f"of {looked_at}, {counted(len(twice), 'test picture')} are training pictures too (first: "
            f"{data.test.where(test)} = {data.train.where(train)}): the test accuracy will be too good.",
            "remove them from one of the splits.",
        )


def _sample(split: ImageSplit) -> np.ndarray:
    """Evenly spaced indices of as many pictures as `MAX_PIXELS` allow; all of them where they are small."""
    some = np.linspace(0, len(split) - 1, min(16, len(split))).astype(np.int64)
    area = np.mean([width * height for width, height in (split.image(int(index)).size for index in some)])
    count = min(len(split), max(1, int(MAX_PIXELS / area)))
    return np.linspace(0, len(split) - 1, count).astype(np.int64)


def _is_blank(image: Image.Image) -> bool:
    extrema = image.getextrema()  # one pair, or one for each channel
    bands = [extrema] if isinstance(extrema[0], (int, float)) else extrema
    return all(low == high for low, high in bands)
