"""1,000 samples, one by one: the loss of the stored and of the live teacher, and what fp16 may make of it.

python -m tests.cache.thousand RANK FOLDER: one of two processes; started by test_thousand.py.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from kdvit import Distiller, Student, Teacher, create_model
from kdvit.cache import StoredTeacher
from kdvit.data import ImageData, make_loader, open_data
from kdvit.losses import make
from kdvit.taps.reader import Request
from kdvit.training import transform_for
from tests.cache.store_worker import join
from tests.training.conftest import MEAN, STD, vit

NUM_SAMPLES, TEMPERATURE = 1000, 4.0
TEACHERS = ("fashion_mnist_vit", "fashion_mnist_cnn")
FEATURES = Request("feature_map", -1)
LOGITS = Request("logits")


def thousand() -> ImageData:
    return open_data("fashion-mnist-sample").subset(NUM_SAMPLES, 10)


def make_distiller(taught_by: Teacher | StoredTeacher) -> Distiller:
    torch.manual_seed(1)
    student = Student(vit(), mean=MEAN, std=STD, name="small")
    return Distiller(taught_by, student, [make("kd", temperature=TEMPERATURE), "fitnet"]).eval()


def live_teacher(name: str) -> Teacher:
    return Teacher(create_model(name), name=name)


def rounding(signal: Tensor) -> Tensor:
    """The most by which a stored value may differ.

    Half a unit in the last of fp16's 11 bits, 2^-25 where it is subnormal; and the float32 rounding of a teacher that
    sums in another order for a batch of 1 than for a batch of 100, which for these shallow models is below 1e-5.
    """
    return signal.abs() * 2**-11 + 2**-25 + 1e-5 * signal.abs().max()


def kd_bound(student: Tensor, teacher: Tensor) -> float:
    """How far the rounding of t can move T^2 KL(p || q), p = softmax(t / T): its first and second derivative."""
    t = teacher.double().requires_grad_(True)
    p_log, q_log = (t / TEMPERATURE).log_softmax(1), (student.double() / TEMPERATURE).log_softmax(1)
    loss = TEMPERATURE**2 * (p_log.exp() * (p_log - q_log)).sum()
    (slope,) = torch.autograd.grad(loss, t)
    delta = rounding(teacher).double()
    # d2/dh2 of KL along u = delta / T is E[(u - Eu)^2 (1 + log p/q - KL)] at most (2 max|u|)^2 (1 + 2 max|log p/q|).
    curve = 2 * delta.max() ** 2 * (1 + 2 * (p_log - q_log).abs().max())
    return ((slope.abs() * delta).sum() + curve).item() + 1e-5 * loss.item()


def fitnet_bound(loss: float, teacher: Tensor) -> float:
    """|mean((p - t - d)^2) - mean((p - t)^2)| <= 2 sqrt(mean((p - t)^2)) r + r^2 with r = rms(d), by Cauchy-Schwarz."""
    r = rounding(teacher).square().mean().sqrt().item()
    return 2 * loss**0.5 * r + r * r + 1e-5 * loss


@torch.no_grad()
def compare(name: str, folder: Path, num_workers: int, accelerator: Accelerator | None = None) -> Tensor:
    """(samples, 7): sample id; stored, live and bound for kd; the same for fitnet."""
    live, stored = make_distiller(live_teacher(name)), make_distiller(StoredTeacher(folder))
    loader = make_loader(
        thousand().train, transform_for(stored.student), batch_size=1, seed=0, train=True, num_workers=num_workers,
        rows=stored.stored_rows,
    )  # fmt: skip
    found = []
    for batch in loader if accelerator is None else accelerator.prepare(loader):
        image, label = batch["image"], batch["label"]
        ours, theirs = stored(image, label, stored=batch["rows"]), live(image, label)
        signals = live.teacher(image)
        with torch.enable_grad():
            kd = kd_bound(theirs.logits, signals[LOGITS])
        fitnet = fitnet_bound(theirs.losses["fitnet"].item(), signals[FEATURES])
        values = [x.losses[loss].item() for loss in ("kd", "fitnet") for x in (ours, theirs)]
        found.append([batch["sample_id"].item(), *values[:2], kd, *values[2:], fitnet])
    return torch.tensor(found, dtype=torch.float64)


def main(rank: int, folder: Path) -> None:
    join(rank, folder)
    accelerator = Accelerator(cpu=True)
    found = {name: compare(name, folder / name, num_workers=0, accelerator=accelerator) for name in TEACHERS}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), Path(sys.argv[2]))
