"""One of two processes that compute losses of the whole batch; started by test_gathering.py, which compares.

python -m tests.losses.gather_worker RANK FOLDER
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
from tests.losses.cases import Case, built, example, teacher_heads

BATCH_SIZE = 4  # of each process
BOTH = slice(0, 2 * BATCH_SIZE)

#: Every loss with a `gather` option, by name; test_gathering.py checks that none is missing.
CASES: dict[str, Callable[[bool], Loss]] = {
    "cc": lambda gather: make("cc", gather=gather),
    "cc official": lambda gather: make("cc", mode="official", embed_dim=5, gather=gather),
    "cfd": lambda gather: make("cfd", beta=0.5, gather=gather),
    # Without the patches that chance draws.
    "dino_heads": lambda gather: make(
        "dino_heads",
        **teacher_heads(),
        patch_weight=0.0,
        gram_weight=1.0,
        hidden_dim=16,
        bottleneck_dim=4,
        gather=gather,
    ),
    "dist": lambda gather: make("dist", temperature=2.0, gather=gather),
    "manifold": lambda gather: make("manifold", gather=gather),
    "mlld": lambda gather: make("mlld", gather=gather),
    "mlld official": lambda gather: make("mlld", mode="official", standardize_kd=True, gather=gather),
    "pkd": lambda gather: make("pkd", gather=gather),
    "pkt": lambda gather: make("pkt", gather=gather),
    "rkd": lambda gather: make("rkd", gather=gather),
    "sp": lambda gather: make("sp", gather=gather),
    "uskd": lambda gather: make("uskd", gather=gather),
}


def rows(rank: int) -> slice:
    """The images of a process."""
    return slice(rank * BATCH_SIZE, (rank + 1) * BATCH_SIZE)


def share(x: Any, part: slice) -> Any:
    """Some images' part of an input; a tuple is one tensor per location."""
    if isinstance(x, tuple):
        return tuple(share(item, part) for item in x)
    return x[part].clone() if isinstance(x, Tensor) else x


def leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the inputs, those of a tuple with their index."""
    flat = {f"{name} {i}": x for name, value in inputs.items() if isinstance(value, tuple) for i, x in enumerate(value)}
    return {name: x for name, x in (inputs | flat).items() if isinstance(x, Tensor)}


def measure(case: str, gather: bool, part: slice) -> dict[str, Tensor | dict[str, Tensor]]:
    """A loss of some of the joined batch's images: its value, and gradients of inputs and of own parameters by name."""
    loss = built(Case(lambda: CASES[case](gather)), dtype=torch.float64)
    inputs = example(loss, batch=2 * BATCH_SIZE, dtype=torch.float64).inputs
    inputs = {name: share(x, part) for name, x in inputs.items()}
    student = {name: x.requires_grad_() for name, x in leaves(inputs).items() if "student_" in name}
    value = loss(**inputs)
    value = torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
    value.backward()
    return {
        "value": value.detach(),
        "inputs": {name: x.grad for name, x in student.items() if x.grad is not None},
        "parameters": {name: p.grad for name, p in loss.named_parameters() if p.grad is not None},
    }


def main(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    results = {(case, gather): measure(case, gather, rows(rank)) for case in CASES for gather in (False, True)}
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), Path(sys.argv[2]))
