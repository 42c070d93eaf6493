"""One of two processes that train a student with BatchNorm; started by test_two_trainers.py.

python -m tests.training.trainer_worker RANK FOLDER
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import timm
import torch
from torch import nn

from kdvit import Distiller, Student, Trainer, Training
from kdvit.data import open_data
from tests.training.conftest import MEAN, STD, vit


def cnn() -> nn.Module:
    """With large logits, so that they tell statistics that differ a little."""
    facts = {"channels": (4, 4, 8, 8), "layers": (1, 1, 1, 1), "in_chans": 1, "num_classes": 10}
    model = timm.create_model("resnet18", **facts)
    model.fc.weight.data.mul_(100)
    return model


def main(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    accuracies = {}
    for name, ema_decay in (("plain", None), ("ema", 0.5)):
        torch.manual_seed(rank)
        student = Student(cnn(), input_size=(1, 28, 28), mean=MEAN, std=STD, name="small")
        data = open_data("fashion-mnist-sample").subset(64, 32)
        settings = Training(epochs=2, batch_size=8, lr=3e-2, ema_decay=ema_decay)
        trainer = Trainer(Distiller(vit(7), student, ["kd"]), data, settings, folder / name, quiet=True)
        assert trainer.accelerator.num_processes == 2
        trainer.fit()
        accuracies[name] = trainer.accuracy
    torch.save({name: vars(accuracy) for name, accuracy in accuracies.items()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), Path(sys.argv[2]))
