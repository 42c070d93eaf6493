"""Reads every picture of a data set, and prints how many MiB of memory of its own (not of files) that took.

python -m tests.data.memory_worker SOURCE
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kdvit.data import open_data, tables


def own_mib() -> float:
    """Anonymous memory: pages of mapped files, which the system takes back when it needs them, do not count."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def main(source: str) -> None:
    tables.IN_MEMORY_MIB = 16
    import datasets
    import pyarrow.parquet  # noqa: F401, before the first measurement

    datasets.disable_progress_bars()
    before = own_mib()
    data = open_data(source)
    opened = own_mib()
    num_pixels = 0
    for split in (data.train, data.test):
        for index in range(len(split)):
            image = split.image(index)
            num_pixels += image.width * image.height
    print(f"{opened - before:.0f} {own_mib() - before:.0f} {num_pixels}")


if __name__ == "__main__":
    main(sys.argv[1])
