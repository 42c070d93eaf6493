"""Pictures in tar shards as webdataset writes them: ``000123.jpg`` beside ``000123.cls`` or ``000123.json``.

Webdataset reads shards as a stream, in an order that depends on buffers and workers. Here the headers are read once,
and a picture is then read where it lies: order, augmentation and resuming stay functions of (seed, epoch, index), and
memory holds the places of the pictures, not the pictures.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from kdvit.data.folders import IMAGE_SUFFIXES
from kdvit.data.splits import RawSplit

#: In front of a file's name: the first kind that is there is the test split.
TEST_PREFIXES = ("val", "valid", "validation", "test")
LABEL_KEYS = ("label", "cls", "class", "target")
_CLASS_NAMES = "classes.txt"


class TarImages:
    """Pictures at known places of tar files.

    Args:
        files: the archives.
        places: (rows, 3) whole numbers: which file, the first byte, the number of bytes.
    """

    def __init__(self, files: list[Path], places: np.ndarray):
        self.files, self.places = [str(file) for file in files], places

    def read(self, row: int) -> Image.Image:
        number, offset, size = self.places[row].tolist()
        with open(self.files[number], "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"{len(content)} of {size} bytes")
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return image

    def where(self, row: int) -> str:
        number, offset, _ = self.places[row].tolist()
        return f"the member at byte {offset} of {self.files[number]}"


def tar_files(folder: Path) -> list[Path]:
    """The archives of a folder, by name."""
    return sorted(folder.glob("*.tar")) if os.access(folder, os.R_OK) else []


def open_archives(files: list[Path]) -> tuple[RawSplit, RawSplit | None]:
    """train* archives and the first kind of val*, valid*, validation*, test* archives; else all of them as one split.

    Labels are whole numbers, or names. Names of numbered classes come from ``classes.txt`` beside the archives, one a
    line.

    Raises:
        ValueError: an archive is damaged or compressed, or an image has no label.
    """
    test_kind = next((kind for kind in TEST_PREFIXES if any(file.name.startswith(kind) for file in files)), None)
    test = [file for file in files if test_kind and file.name.startswith(test_kind)]
    train = [file for file in files if file.name.startswith("train")]
    names = _class_names(files[0].parent)
    if not train or not test:
        return _read(train or files, names), None
    return _read(train, names), _read(test, names)


def _class_names(folder: Path) -> tuple[str, ...] | None:
    path = folder / _CLASS_NAMES
    if not path.is_file():
        return None
    return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())


def _read(files: list[Path], class_names: tuple[str, ...] | None) -> RawSplit:
    places: list[tuple[int, int, int]] = []
    labels: list[int | str] = []
    for number, file in enumerate(files):
        found, given = _members(file)
        for stem, place in found.items():
            if stem not in given:
                raise ValueError(
                    f"data: '{stem}' in '{file}' must have a label beside it, got none; add {stem}.cls (a class id or "
                    f"name) or {stem}.json with one of {', '.join(LABEL_KEYS)}."
                )
            places.append((number, *place))
            labels.append(given[stem])
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise ValueError(
            f"data: labels of '{files[0].parent}' must be of one kind, got whole numbers and names; write them all in "
            "one way."
        )
    values = np.array(labels) if kinds == {str} else np.array(labels, dtype=np.int64)
    return RawSplit(
        TarImages(files, np.array(places, dtype=np.int64).reshape(-1, 3)),
        values,
        None if kinds == {str} else class_names,
    )


def _members(file: Path) -> tuple[dict[str, tuple[int, int]], dict[str, int | str]]:
    """({stem: (first byte, bytes) of its picture}, {stem: label}); a picture's bytes are not read."""
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, int | str] = {}
    try:
        # Without "r:*": a compressed archive can be read from the front alone.
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")  # as webdataset: the key ends at the first dot
                stem, suffix = f"{folder}/{stem}".removeprefix("/").removeprefix("./"), f".{suffix.lower()}"
                if not member.isreg() or name.startswith("."):
                    continue
                if suffix in IMAGE_SUFFIXES:
                    if stem in pictures:
                        raise ValueError(
                            f"data: '{file}' must hold one picture a name, got two for '{stem}'; remove one."
                        )
                    pictures[stem] = member.offset_data, member.size
                elif suffix in (".cls", ".json"):
                    labels.setdefault(stem, _label(archive.extractfile(member).read(), member.name, file))
            if pictures and max(map(sum, pictures.values())) > file.stat().st_size:
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"data: '{file}' must be a whole tar archive, not compressed, got {str(error).rstrip('.')}; make it again."
        ) from error
    return pictures, labels


def _label(content: bytes, member: str, file: Path) -> int | str:
    """The label in a member, ``.cls``: a number or a name; ``.json``: an object that has one."""
    try:
        text = content.decode()
        if member.lower().endswith(".json"):
            entry = json.loads(text)
            value = next(entry[key] for key in LABEL_KEYS if key in entry)
        else:
            value = int(text) if text.strip().isdecimal() else text.strip()
    except (ValueError, TypeError, StopIteration):
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise ValueError(
            f"data: '{member}' in '{file}' must hold a label, a class id or name, got {content[:40]!r}; for JSON, an "
            f"object with one of {', '.join(LABEL_KEYS)}."
        )
    return value
