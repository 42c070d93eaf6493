"""Pictures in tables: parquet files, and the data sets of the Hugging Face hub."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from kdvit.data.splits import RawSplit

if TYPE_CHECKING:
    import datasets

TEST_SPLITS = ("validation", "valid", "val", "test")
IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls")
# Up to here parquet is read into memory; beyond, `datasets` keeps a memory-mapped copy in its cache.
IN_MEMORY_MIB = 512


class RowImages:
    """Pictures in a column of a `datasets.Dataset`, stored as encoded bytes or as paths."""

    def __init__(self, dataset: datasets.Dataset, column: str, origins: Sequence[tuple[int, str]]):
        self.dataset, self.column = dataset, column
        self.origins = tuple(origins)  # (first row, file or split), ascending

    def read(self, row: int) -> Image.Image:
        cell = self.dataset[row][self.column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise ValueError("an empty cell")
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]) as image:
            image.load()
            return image

    def where(self, row: int) -> str:
        first, origin = next(entry for entry in reversed(self.origins) if entry[0] <= row)
        return f"row {row - first} of {origin}"


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a folder, or of its data/ folder (the layout of a hub snapshot)."""
    folders = [place for place in (folder, folder / "data") if os.access(place, os.R_OK)]
    return next((found for place in folders if (found := sorted(place.glob("*.parquet")))), [])


def open_parquet(files: list[Path]) -> tuple[RawSplit, RawSplit | None]:
    """train* files and the first kind of validation*, valid*, val*, test* files; else all of them as one split."""
    test_kind = next((kind for kind in TEST_SPLITS if any(file.name.startswith(kind) for file in files)), None)
    test = [file for file in files if test_kind and file.name.startswith(test_kind)]
    train = [file for file in files if file.name.startswith("train")]
    if not train or not test:
        return _read_parquet(train or files), None
    return _read_parquet(train), _read_parquet(test)


def _read_parquet(files: list[Path]) -> RawSplit:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        opened = [pyarrow.parquet.ParquetFile(file) for file in files]
        first_rows = np.cumsum([0] + [file.metadata.num_rows for file in opened])
        if sum(file.stat().st_size for file in files) <= IN_MEMORY_MIB * 2**20:
            table = datasets.Dataset(pyarrow.concat_tables([file.read() for file in opened]))
        else:
            table = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except (pyarrow.ArrowException, OSError) as error:
        names = ", ".join(f"'{file}'" for file in files[:3]) + (", ..." if len(files) > 3 else "")
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"data: {names} must be readable parquet of one schema, got {reason}; make it again."
        ) from error
    return _raw_split(table, [(int(row), str(file)) for row, file in zip(first_rows, files)], str(files[0]))


def open_hub(name: str, config: str | None = None) -> tuple[RawSplit, RawSplit | None]:
    """A data set of the hub by its name, or of the local cache of `datasets` where there is no network."""
    import datasets

    try:
        found = datasets.load_dataset(name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0].rstrip(".") or type(error).__name__
        local = "fashion-mnist:FOLDER (the four idx files) or a" if name.endswith("/fashion_mnist") else "a"
        raise ValueError(
            f"data: '{name}' must be a folder here or a data set that the Hugging Face hub can give, got {reason}; "
            f"there is no network or the name is wrong: check both, or give {local} local folder of images or parquet."
        ) from error
    names = list(found)
    train_name = "train" if "train" in names else names[0]
    test_name = next((split for split in TEST_SPLITS if split in names and split != train_name), None)
    train, test = (
        None if split is None else _raw_split(found[split], [(0, f"split '{split}' of {name}")], f"'{name}'")
        for split in (train_name, test_name)
    )
    return train, test


def _raw_split(dataset: datasets.Dataset, origins: Sequence[tuple[int, str]], origin: str) -> RawSplit:
    import datasets

    features = dataset.features
    image = _find_column(features, datasets.Image, IMAGE_COLUMNS, "image", origin)
    label = _find_column(features, datasets.ClassLabel, LABEL_COLUMNS, "label", origin)
    pictures = dataset.select_columns([image])
    try:
        pictures = pictures.cast_column(image, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"data: column '{image}' of {origin} must hold images, got {features[image]}; store encoded image bytes."
        ) from error
    values = dataset.select_columns([label]).with_format("arrow")[:][label].to_pylist()
    classes = tuple(features[label].names) if isinstance(features[label], datasets.ClassLabel) else None
    return RawSplit(RowImages(pictures, image, origins), _label_array(values, label, origin), classes)


def _find_column(features: dict[str, Any], kind: type, usual: tuple[str, ...], what: str, origin: str) -> str:
    """By type where the type decides (usual names first), else by the usual names."""
    typed = [name for name, feature in features.items() if isinstance(feature, kind)]
    named = [name for name in usual if name in (typed or features)]
    if named or len(typed) == 1:
        return named[0] if named else typed[0]
    raise ValueError(
        f"data: {origin} must have one {what} column, got columns {', '.join(features)}; "
        f"name it '{usual[0]}' or give it the type {kind.__name__}."
    )


def _label_array(values: list, column: str, origin: str) -> np.ndarray:
    kinds = {type(value) for value in values}
    if kinds <= {int} or kinds <= {bool}:
        return np.array(values, dtype=np.int64)
    if kinds == {str}:
        return np.array(values)
    raise ValueError(
        f"data: column '{column}' of {origin} must hold whole numbers or strings, got "
        f"{' and '.join(sorted(kind.__name__ for kind in kinds))}; fill or convert the labels."
    )
