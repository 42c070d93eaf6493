"""One of two processes that train through the Trainer: by DDP, and with weights shared out by FSDP2.

python -m tests.training.sharded_trainer_worker RANK FOLDER
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from kdvit import Trainer, Training
from kdvit.data import open_data
from kdvit.training import trainer as trainer_module
from kdvit.training.interruption import Interrupted
from kdvit.training.sharding import is_sharded
from tests.training.conftest import distiller
from tests.training.sharding_worker import fsdp_accelerator
from tests.training.trainer_worker import Ask

PLAIN = trainer_module.make_accelerator


def fit(folder: Path, sharded: bool, asks_at: int = -1, resume: bool = False) -> Trainer:
    # Accelerate shards on GPUs alone, so its state is told that this is one.
    trainer_module.make_accelerator = (lambda settings, folder: fsdp_accelerator()) if sharded else PLAIN
    torch.manual_seed(torch.distributed.get_rank())  # other weights of projectors, until they are made equal
    data = open_data("fashion-mnist-sample").subset(64, 32)
    settings = Training(epochs=2, batch_size=8, lr=3e-3, ema_decay=0.5, clip_norm=0.5, log_steps=1, save_steps=3)
    trainer = Trainer(
        distiller(["kd", "fitnet", "tinymim", Ask(asks_at)]), data, settings, folder, resume=resume, quiet=True
    )
    assert trainer.accelerator.num_processes == 2 and is_sharded(trainer.plain) == sharded
    trainer.fit()
    return trainer


def main(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    accuracies = {"ddp": fit(folder / "ddp", sharded=False).accuracy}
    accuracies["fsdp"] = fit(folder / "fsdp", sharded=True).accuracy
    try:
        fit(folder / "stopped", sharded=True, asks_at=4)
    except Interrupted:
        accuracies["stopped"] = fit(folder / "stopped", sharded=True, resume=True).accuracy
    torch.save({name: vars(accuracy) for name, accuracy in accuracies.items()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), Path(sys.argv[2]))
