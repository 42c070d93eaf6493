"""Pictures in local folders: one folder a class, or the four idx files of the MNIST family."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import numpy as np

from kdvit.data.splits import ArrayImages, FileImages, RawSplit

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("val", "valid", "validation", "test")
IDX_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def open_image_folder(folder: Path) -> tuple[RawSplit, RawSplit | None]:
    """train/ and one of val, valid, validation, test (the first there is); or class folders directly."""
    if os.path.isdir(folder / "train"):
        test = next((folder / name for name in TEST_FOLDERS if os.path.isdir(folder / name)), None)
        return _class_folders(folder / "train"), None if test is None else _class_folders(test)
    return _class_folders(folder), None


def _class_folders(folder: Path) -> RawSplit:
    """List the pictures of each class without opening them; sorted, so that the order is the same everywhere."""
    classes = sorted(entry.name for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(
            f"data: folder '{folder}' must hold one folder a class (such as cat/, dog/), got none; "
            f"put the images of each class into a folder of its own."
        )
    paths, labels = [], []
    for label, class_name in enumerate(classes):
        found = sorted(_images_below(folder / class_name))
        if not found:
            raise ValueError(
                f"data: class folder '{folder / class_name}' must hold images ({' '.join(IMAGE_SUFFIXES)}), got none; "
                f"add images or remove the folder."
            )
        paths += found
        labels += [label] * len(found)
    return RawSplit(FileImages(paths), np.array(labels), tuple(classes))


def _images_below(folder: Path) -> list[str]:
    found = []
    for entry in _entries(folder):
        if entry.is_dir():
            found += _images_below(Path(entry.path))
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith("."):
            found.append(entry.path)
    return found


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(
            f"data: folder '{folder}' must be readable, got '{error.strerror}'; check its path and permissions."
        ) from error


def holds_idx(folder: Path) -> bool:
    return any(_idx_path(folder, stem) for stem in IDX_STEMS)


def open_idx(folder: Path, classes: tuple[str, ...] | None = None) -> tuple[RawSplit, RawSplit]:
    """The four idx files (.gz or not) of MNIST, Fashion-MNIST and the like."""
    for stem in IDX_STEMS:
        if not _idx_path(folder, stem):
            raise ValueError(
                f"data: folder '{folder}' must hold {stem} or {stem}.gz, got neither; all four idx files are needed: "
                f"{', '.join(IDX_STEMS)}."
            )
    splits = []
    for images_stem, labels_stem in (IDX_STEMS[:2], IDX_STEMS[2:]):
        path = _idx_path(folder, images_stem)
        images, labels = _read_idx(path, num_axes=3), _read_idx(_idx_path(folder, labels_stem), num_axes=1)
        if len(images) != len(labels):
            raise ValueError(
                f"data: '{path}' and its labels must be of equal length, got {len(images)} images and {len(labels)} "
                f"labels; fetch both again."
            )
        splits.append(RawSplit(ArrayImages(images, str(path)), labels.astype(np.int64), classes))
    return splits[0], splits[1]


def _idx_path(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if os.path.isfile(path)), None)


def _read_idx(path: Path, num_axes: int) -> np.ndarray:
    """idx: bytes 0, 0, 8 (uint8), number of axes; the sizes as big-endian int32; the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data: '{path}' must be a readable file, got {error}; fetch it again.") from error
    header = 4 + 4 * num_axes
    shape = tuple(np.frombuffer(content[4:header], dtype=">i4").tolist()) if len(content) >= header else (-1,)
    if content[:4] != bytes((0, 0, 8, num_axes)) or len(content) != header + int(np.prod(shape)):
        raise ValueError(
            f"data: '{path}' must be a complete idx file of uint8 values with {num_axes} axes, "
            f"got {len(content)} bytes that are not one; fetch it again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
