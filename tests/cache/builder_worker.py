"""Builds a cache until it is killed, or whole; started by test_building.py.

python -m tests.cache.builder_worker FOLDER [SECONDS_FOR_EACH_SHARD]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from kdvit.cache import build, builder
from kdvit.data import open_data
from tests.cache.conftest import SHARD_MIB, distiller, settings, teacher


def main(folder: Path, delay: float) -> None:
    torch.set_num_threads(1)
    write = builder.write_shard

    def slowly(*arguments):
        time.sleep(delay)
        return write(*arguments)

    builder.write_shard = slowly
    data = open_data("fashion-mnist-sample").subset(36, 12)
    build(folder, distiller(teacher(), ["fitnet"]), data, settings(), shard_mib=SHARD_MIB, quiet=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
