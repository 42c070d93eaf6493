"""Trains in processes of its own, and kills them with SIGKILL at random moments; started by test_killed.py.

python -m tests.training.kill_worker FOLDER NUM_KILLS SEED

Leaves FOLDER/whole, a run that was left alone; FOLDER/run0, run1, ..., runs that were killed and started again until
they ended; and FOLDER/kills.json: how each kill came, and what was there of the state that was being written.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from kdvit import Trainer, Training
from kdvit.data import open_data
from tests.training.conftest import distiller

SETTINGS = Training(
    epochs=6, batch_size=16, log_steps=3, save_steps=3, lr=3e-3, ema_decay=0.9, mixup_alpha=0.2, accumulation_steps=1
)


def train(folder: Path) -> None:
    subject = distiller(["kd", "fitnet", "vitkd"], drop_rate=0.2, drop_path_rate=0.3)
    data = open_data("fashion-mnist-sample").subset(80, 32)
    Trainer(subject, data, SETTINGS, folder, resume=True, quiet=True).fit()


def start(folder: Path) -> int:
    """A child that trains; it has all modules already, so that a kill costs no start of Python."""
    child = os.fork()
    if child == 0:
        warnings.simplefilter("error")
        train(folder)
        os._exit(0)
    return child


def ended(child: int) -> bool:
    found, status = os.waitpid(child, os.WNOHANG)
    if found and status:
        raise RuntimeError(f"a run broke with status {status}")
    return bool(found)


def kill_later(child: int, folder: Path, delay: float | None) -> str | None:
    """Kill after a time, or (None) as soon as a state is being written; None where the run ended before."""
    deadline = time.monotonic() + (delay or 60)
    while time.monotonic() < deadline and not (delay is None and list(folder.glob("state/.step_*.tmp/*"))):
        if ended(child):
            return None
        time.sleep(1e-4)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    written = sorted(file.name for file in folder.glob("state/.step_*.tmp/*"))
    return f"while {', '.join(written)} was written" if written else "between writes"


def main(folder: Path, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    started = time.monotonic()
    child = start(folder / "whole")
    while not ended(child):
        time.sleep(1e-3)
    seconds = time.monotonic() - started
    kills, runs = [], 0
    while len(kills) < num_kills:
        run = folder / f"run{runs}"
        for _ in range(num_kills):
            delay = None if draw.random() < 0.4 else draw.uniform(0.05, 0.7) * seconds
            found = kill_later(start(run), run, delay)
            if found is None or len(kills) == num_kills:
                break
            kills.append(found)
        child = start(run)  # and now to its end
        while not ended(child):
            time.sleep(1e-3)
        runs += 1
    (folder / "kills.json").write_text(json.dumps({"kills": kills, "runs": runs, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
