"""One of two processes that build a cache and train from it; started by test_training.py.

python -m tests.cache.store_worker RANK FOLDER
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from kdvit import Trainer
from kdvit.cache import StoredTeacher, build, builder
from kdvit.data import open_data
from tests.cache.conftest import SHARD_MIB, distiller, settings, teacher

LOSSES = ["kd", "fitnet"]
MIXING = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}


def join(rank: int, folder: Path) -> None:
    """The other process; they meet through a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)


def main(rank: int, folder: Path) -> None:
    join(rank, folder)
    data, built, write = open_data("fashion-mnist-sample").subset(36, 12), 0, builder.write_shard

    def counted(*arguments: Any) -> Any:
        nonlocal built
        built += 1
        return write(*arguments)

    builder.write_shard = counted
    live = distiller(teacher(), LOSSES)
    build(folder / "two", live, data, settings(**MIXING), form="fp32", shard_mib=SHARD_MIB, quiet=True)
    results: dict[str, Any] = {"built": built}
    for name, taught_by in (("live", teacher()), ("stored", StoredTeacher(folder / "two"))):
        trainer = Trainer(distiller(taught_by, LOSSES), data, settings(**MIXING), folder / name, quiet=True)
        trainer.fit()
        results[name], results["steps"] = trainer.plain.state_dict(), trainer.step
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), Path(sys.argv[2]))
