"""One of two processes that train a student with BatchNorm; started by test_two_trainers.py.

python -m tests.training.trainer_worker RANK FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from kdvit import Distiller, Student, Trainer, Training
from kdvit.data import open_data
from kdvit.losses import Loss
from kdvit.training.interruption import Interrupted
from tests.training.conftest import MEAN, STD, vit


def cnn() -> nn.Module:
    """With large logits, so that they tell statistics that differ a little."""
    facts = {"channels": (4, 4, 8, 8), "layers": (1, 1, 1, 1), "in_chans": 1, "num_classes": 10}
    model = timm.create_model("resnet18", **facts)
    model.fc.weight.data.mul_(100)
    return model


class Ask(Loss):
    """Sends its process SIGTERM at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.at = step

    def forward(self, student_logits: Tensor, progress) -> Tensor:
        if self.training and progress.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0 * student_logits.sum()


def fit(rank: int, folder: Path, ema_decay: float | None, ask: Loss | None = None, resume: bool = False) -> Trainer:
    torch.manual_seed(rank)
    student = Student(cnn(), input_size=(1, 28, 28), mean=MEAN, std=STD, name="small")
    data = open_data("fashion-mnist-sample").subset(64, 32)
    settings = Training(epochs=2, batch_size=8, lr=3e-2, ema_decay=ema_decay, log_steps=1)
    distiller = Distiller(vit(7), student, ["kd", ask or Ask(-1)])
    trainer = Trainer(distiller, data, settings, folder, resume=resume, quiet=True)
    assert trainer.accelerator.num_processes == 2
    trainer.fit()
    return trainer


def main(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    accuracies, stops = {}, []
    for name, ema_decay in (("plain", None), ("ema", 0.5)):
        accuracies[name] = fit(rank, folder / name, ema_decay).accuracy
    # The second process is asked to stop within the second epoch; both do, at the same step, and go on.
    try:
        fit(rank, folder / "stopped", 0.5, Ask(5) if rank == 1 else Ask(-1))
    except Interrupted as stop:
        stops.append(str(stop))
    accuracies["stopped"] = fit(rank, folder / "stopped", 0.5, resume=True).accuracy
    found = {name: vars(accuracy) for name, accuracy in accuracies.items()}
    torch.save({**found, "stops": stops}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), Path(sys.argv[2]))
