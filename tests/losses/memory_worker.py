"""One of two processes that train losses with memories for some batches; started by test_memories.py.

python -m tests.losses.memory_worker RANK FOLDER
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdvit.losses import Loss, make
from tests.losses.cases import Case, built, example

BATCH_SIZE = 3  # of each process
NUM_BATCHES = 3
BOTH = slice(0, 2 * BATCH_SIZE)

#: Losses that remember batches, by name.
CASES: dict[str, Callable[[], Loss]] = {
    "crd": lambda: make("crd", dim=6, num_negatives=5),
    "cls_queue": lambda: make("cls_queue", queue_size=8),
    "cls_dense": lambda: make("cls_dense", queue_size=8),
}


def rows(rank: int) -> slice:
    """The images of a process."""
    return slice(rank * BATCH_SIZE, (rank + 1) * BATCH_SIZE)


def batches(loss: Loss) -> list[dict[str, Any]]:
    """Inputs of the joined batches; the last two have an image in common, and an image of the first one returns."""
    sample_ids = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 2, 7, 8, 9, 7], [7, 10, 11, 12, 13, 14]])
    generator = torch.Generator().manual_seed(0)
    found = []
    for ids in sample_ids:
        inputs = example(loss, batch=2 * BATCH_SIZE, dtype=torch.float64).inputs
        inputs = {
            name: torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x
            for name, x in inputs.items()
        }
        if "sample_ids" in inputs:
            inputs |= {"sample_ids": ids, "negatives": (ids[:, None] + torch.arange(1, 6)) % 20}
        found.append(inputs)
    return found


def train(case: str, part: slice) -> dict[str, Tensor | dict[str, Tensor]]:
    """Values, gradients of the losses' own parameters, and what is remembered in the end."""
    loss = built(Case(CASES[case]), dtype=torch.float64).train()
    values = []
    for inputs in batches(loss):
        terms = loss(**{name: x[part] for name, x in inputs.items()})
        values.append(torch.stack(list(terms.values())).sum() if isinstance(terms, dict) else terms)
    torch.stack(values).sum().backward()
    return {
        "values": torch.stack(values).detach(),
        "gradients": {name: p.grad for name, p in loss.named_parameters()},
        "buffers": dict(loss.named_buffers()),
    }


def main(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.save({case: train(case, rows(rank)) for case in CASES}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), Path(sys.argv[2]))
