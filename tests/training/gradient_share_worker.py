"""One of two processes that train with and without measuring; started by test_gradient_share.py.

python -m tests.training.gradient_share_worker RANK FOLDER
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from kdvit import Distiller
from kdvit.losses import make as make_loss
from kdvit.training.gradient_share import GradientShare, gradient_share
from tests import tiny

BATCH_SIZE = 4  # of each process
NUM_STEPS = 2


def make() -> tuple[Distiller, torch.optim.Optimizer]:
    """One loss communicates in its backward pass; float64, so that two halves of a batch are the whole."""
    losses = ["kd", (0.5, make_loss("dist", gather=True))]
    distiller = Distiller(tiny.vit(7), tiny.vit(), losses).double().train()
    return distiller, torch.optim.SGD(distiller.parameters(), lr=0.1)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return tiny.images(2 * BATCH_SIZE, seed=step).double(), tiny.labels(2 * BATCH_SIZE)


def train(accelerator: Accelerator, measure: bool) -> tuple[dict[str, Tensor], list[GradientShare | None]]:
    distiller, optimizer = accelerator.prepare(*make())
    plain = accelerator.unwrap_model(distiller)
    mine = slice(accelerator.process_index * BATCH_SIZE, (accelerator.process_index + 1) * BATCH_SIZE)
    shares = []
    for step in range(NUM_STEPS):
        images, labels = batch(step)
        out = distiller(images[mine], labels[mine])
        if measure:
            average = partial(accelerator.reduce, reduction="mean")
            shares.append(gradient_share(out.weighted, plain.student.parameters(), average=average))
            shares.append(gradient_share(out.weighted, plain.student.parameters()))
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in plain.state_dict().items()}, shares


def main(rank: int, folder: Path) -> None:
    # What a launcher sets. The address is never used, because the processes meet through a file.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    accelerator = Accelerator(cpu=True)
    plain, _ = train(accelerator, measure=False)
    measured, shares = train(accelerator, measure=True)
    found = [{"share": each.share, "cosine": each.cosine} for each in shares]
    torch.save({"plain": plain, "measured": measured, "shares": found}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), Path(sys.argv[2]))
