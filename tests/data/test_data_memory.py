"""Data sets larger than memory: reading all of one takes memory for some pictures, not for the data set."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

NUM_IMAGES, SIZE = 2600, 210  # 330 MiB of noise, which nothing can compress
MOST_MIB = 100


def pictures() -> Iterator[bytes]:
    generator = np.random.RandomState(0)
    for _ in range(NUM_IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(generator.randint(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(buffer, "BMP")
        yield buffer.getvalue()


def write_parquet(folder: Path) -> None:
    schema = pyarrow.schema(
        [
            ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            ("label", pyarrow.int64()),
        ]
    )
    with pyarrow.parquet.ParquetWriter(folder / "train.parquet", schema) as writer:
        rows = [{"image": {"bytes": content, "path": None}, "label": n % 5} for n, content in enumerate(pictures())]
        for first in range(0, NUM_IMAGES, 200):
            writer.write_table(pyarrow.Table.from_pylist(rows[first : first + 200], schema=schema))


def write_tar(folder: Path) -> None:
    with tarfile.open(folder / "train.tar", "w") as archive:
        for n, content in enumerate(pictures()):
            for name, member in ((f"{n}.bmp", content), (f"{n}.cls", b"%d" % (n % 5))):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                archive.addfile(info, io.BytesIO(member))


def write_folder(folder: Path) -> None:
    for n, content in enumerate(pictures()):
        path = folder / f"class{n % 5}" / f"{n}.bmp"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not say what memory is whose")
@pytest.mark.parametrize("write", [write_parquet, write_tar, write_folder], ids=lambda write: write.__name__)
def test_memory_does_not_grow_with_the_data(write, tmp_path):
    source = tmp_path / "data"
    source.mkdir()
    write(source)
    assert sum(file.stat().st_size for file in source.rglob("*") if file.is_file()) > 300 * 2**20
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.data.memory_worker", str(source)]
    # The first time `datasets` writes parquet into its cache, a thousand rows at a time; later it finds it there.
    for most_mib in (MOST_MIB + 1000 * SIZE**2 * 3 // 2**20, MOST_MIB):
        done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        opened, read, num_pixels = map(int, done.stdout.split())
        assert num_pixels == NUM_IMAGES * SIZE**2
        assert opened < most_mib and read - opened < 40, (opened, read)
