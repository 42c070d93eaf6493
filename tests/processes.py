"""Two processes of a worker, started as a launcher would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[1]


def run_two(worker: list[str], folder: Path) -> tuple[Any, Any]:
    """Run ``python *worker RANK FOLDER`` for ranks 0 and 1, and load what each leaves in FOLDER/RANK.pt.

    The processes meet through a file in the folder, so no port is needed.
    """
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, *worker, str(rank), str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return tuple(torch.load(folder / f"{rank}.pt") for rank in range(2))
