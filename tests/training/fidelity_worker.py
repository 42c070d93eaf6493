"""One of two processes that measure fidelity together; started by test_two_comparisons.py.

python -m tests.training.fidelity_worker RANK FOLDER
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator

from kdvit import Distiller, Training
from kdvit.data import open_data
from kdvit.training import Comparison, compare
from kdvit.training.fidelity import Fidelity, fidelity
from tests import tiny
from tests.training.conftest import distiller

NUM_IMAGES = 7


def measure(accelerator: Accelerator) -> Fidelity:
    """Two tiny models on a few images."""
    images, labels = tiny.images(NUM_IMAGES), tiny.labels(NUM_IMAGES)
    rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=2))
    return fidelity(tiny.vit(0), tiny.cnn(1), loader, tiny.NUM_CLASSES, accelerator)


def compared(folder: Path) -> Comparison:
    """A student of a few steps."""

    def make_distiller(seed: int, distilled: bool) -> Distiller:
        return distiller() if distilled else distiller(losses=(), teacher=None)

    settings = Training(epochs=None, steps=2, batch_size=8)
    return compare(make_distiller, open_data("fashion-mnist-sample").subset(64, 32), settings, [0], folder, quiet=True)


def main(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    facts = {"fidelity": asdict(measure(accelerator))}
    facts["comparison"] = [asdict(line) for line in compared(folder / "compare").lines()]
    torch.save(facts, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), Path(sys.argv[2]))
