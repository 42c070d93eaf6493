"""Trains into a folder of a file system that is too small, or that cannot be written; started by test_faults.py.

python -m tests.training.disk_worker FOLDER ADAM|SGD
"""

from __future__ import annotations

import sys

import torch

from kdvit import Trainer, Training
from kdvit.data import open_data
from tests.training.conftest import distiller

if __name__ == "__main__":
    folder, optimizer = sys.argv[1:]
    torch.set_num_threads(1)
    data = open_data("fashion-mnist-sample").subset(64, 32)
    settings = Training(epochs=3, batch_size=16, save_steps=1, optimizer=optimizer, keep_states=2)
    try:
        Trainer(distiller(["kd"]), data, settings, folder, resume=True, quiet=True).fit()
    except (ValueError, RuntimeError) as error:
        print(error)
    else:
        print("done")
