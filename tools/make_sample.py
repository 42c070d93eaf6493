"""Make the embedded sample, kdvit/data/sample/*.parquet, from the original Fashion-MNIST files.

    python tools/make_sample.py FOLDER_OF_THE_FOUR_IDX_FILES [OUTPUT_FOLDER]

Takes 800 of the 60,000 training images and 200 of the 10,000 test images of each class, by a fixed seed, in their
original order. The originals: Debian package dataset-fashion-mnist, or
https://github.com/zalandoresearch/fashion-mnist.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet

from kdvit.data import ImageSplit, open_data

SEED = 20240607
NUM_PER_CLASS = {"train": 800, "test": 200}


def choose(labels: np.ndarray, num_per_class: int, generator: np.random.RandomState) -> np.ndarray:
    chosen = [generator.permutation(np.flatnonzero(labels == label))[:num_per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def png(split: ImageSplit, index: int) -> bytes:
    buffer = io.BytesIO()
    split.image(index).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("originals", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path(__file__).parents[1] / "kdvit/data/sample")
    arguments = parser.parse_args()
    data = open_data(f"fashion-mnist:{arguments.originals}")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(data.classes)))
    generator = np.random.RandomState(SEED)  # the generator whose stream NumPy guarantees for ever
    for name, split in (("train", data.train), ("test", data.test)):
        indices = choose(split.labels, NUM_PER_CLASS[name], generator)
        rows = {
            "image": [{"bytes": png(split, index), "path": None} for index in indices.tolist()],
            "label": split.labels[indices].tolist(),
        }
        path = arguments.output / f"{name}.parquet"
        table = datasets.Dataset.from_dict(rows, features=features).data.table  # its schema carries the features
        pyarrow.parquet.write_table(table, path, compression="zstd", compression_level=19)
        print(f"{path}: {len(indices)} images, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
