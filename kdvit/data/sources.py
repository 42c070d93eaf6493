"""From what a user writes after `--data` to an `ImageData`."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from kdvit.data.archives import open_archives, tar_files
from kdvit.data.folders import holds_idx, open_idx, open_image_folder
from kdvit.data.randomness import check_seed
from kdvit.data.splits import ImageData, RawSplit, assemble
from kdvit.data.tables import open_hub, open_parquet, parquet_files

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_SAMPLE_FOLDER = Path(__file__).parent / "sample"
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?")
_OTHERS = "a folder of images, parquet or tar shards, a .parquet file, or a hub name as org/name"


def names() -> dict[str, str]:
    """Return the built-in data sets, each with one line that describes it."""
    return {
        "fashion-mnist-sample": "8,000 + 2,000 images of Fashion-MNIST (10 classes, 28 x 28, grey), inside the package",
        "fashion-mnist": "60,000 + 10,000 images of Fashion-MNIST, from the Hugging Face hub",
        "fashion-mnist:FOLDER": "the same from a local folder with the four idx files (Debian: dataset-fashion-mnist)",
    }


def open_data(
    source: str | os.PathLike = "fashion-mnist-sample", *, held_out_ratio: float = 0.1, seed: int = 0
) -> ImageData:
    """Open a classification data set; pictures stay where they are and are decoded on demand.

    Args:
        source: a name of `names()`; an image folder (train/ with one of val, valid, validation, test; or one folder a
            class); a folder of the four idx files; a .parquet file or a folder of them; a folder of tar shards
            (``000123.jpg`` beside ``000123.cls`` or ``000123.json``); a `datasets` name as `org/name` or
            `org/name:config`.
        held_out_ratio: where the source has no test split, this share of every class becomes one; in (0, 1).
        seed: which images are held out.
    Returns:
        ImageData with `train`, `test` and `classes`.
    Raises:
        ValueError: the source is unknown, empty, unreadable, has labels out of range, one class only, or other classes
            in test than in train; always one sentence.
    Example:
        >>> data = open_data("fashion-mnist-sample")
        >>> len(data.train), len(data.test), data.classes[9]
        (8000, 2000, 'Ankle boot')
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"open_data: source must be a str or a path, got {type(source).__name__}; give {_OTHERS}.")
    if not 0 < held_out_ratio < 1:
        raise ValueError(f"open_data: held_out_ratio must be in (0, 1), got {held_out_ratio}; try 0.1.")
    check_seed("open_data", seed)
    name = os.fspath(source)
    train, test = _open(name)
    return assemble(name, train, test, held_out_ratio=held_out_ratio, seed=seed)


def _open(name: str) -> tuple[RawSplit, RawSplit | None]:
    if name == "fashion-mnist-sample":
        return open_parquet(parquet_files(_SAMPLE_FOLDER))
    if name == "fashion-mnist":
        return open_hub("zalando-datasets/fashion_mnist")
    if name.startswith("fashion-mnist:"):
        return open_idx(_existing_folder(name.removeprefix("fashion-mnist:")), FASHION_MNIST_CLASSES)
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike Path.is_dir, not an error where the parent is unreadable
        return _open_folder(path)
    if os.path.exists(path):
        if path.suffix != ".parquet":
            raise ValueError(f"data: '{name}' must be a folder or a .parquet file, got another file; give {_OTHERS}.")
        return open_parquet([path])
    hub_name = _HUB_NAME.fullmatch(name)
    if hub_name and path.suffix != ".parquet":
        return open_hub(hub_name["name"], hub_name["config"])
    if os.sep in name or path.suffix or name.startswith((".", "~")):
        raise ValueError(f"data: '{name}' must exist, got no such file or folder; check the path, or give {_OTHERS}.")
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ValueError(f"unknown data source '{name}'; {hint}Known: {', '.join(sorted(names()))}; or give {_OTHERS}.")


def _existing_folder(text: str) -> Path:
    folder = Path(text).expanduser()
    if not os.path.isdir(folder):
        raise ValueError(f"data: folder '{text}' must exist, got none; give the folder that holds the four idx files.")
    return folder


def _open_folder(folder: Path) -> tuple[RawSplit, RawSplit | None]:
    if holds_idx(folder):
        return open_idx(folder)
    if files := parquet_files(folder):
        return open_parquet(files)
    archives = tar_files(folder)
    return open_archives(archives) if archives else open_image_folder(folder)
