"""One of two processes that take steps with every registered loss; started by test_two_processes_every_method.py.

python -m tests.every_method_worker RANK FOLDER
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kdvit import Bilevel, Distiller, Progress, Student, calibrate, losses
from kdvit.losses import PrototypeHead
from kdvit.losses.image_generator import ImageGenerator
from kdvit.losses.loss import reads_teachers
from tests import tiny

BATCH_SIZE = 4  # of each process
NUM_STEPS = 2
NUM_IMAGES = 16
#: What the defaults do not suit: other models, and smaller memories.
OPTIONS: dict[str, dict[str, Any]] = {
    "cls_dense": {"queue_size": 8},
    "cls_queue": {"queue_size": 8},
    "crd": {"num_negatives": 4},
    "dino_heads": {"hidden_dim": 8, "bottleneck_dim": 4},
    "ft": {"paraphraser_steps": 2},
    "mmkd": {"batch_size": BATCH_SIZE},
    "psd": {"rounds": 2},
    "sdd": {"scales": (1, 2)},
    "simkd": {"feature": "pooled"},
    "tinyvit": {"k": 2},
}
DISTILLED = ("cskd", "deit")
State = dict[str, Tensor]


def make(name: str, rank: int) -> Distiller:
    """The teachers of both processes are the same; student and projectors are not, until they are put under DDP."""
    options = OPTIONS.get(name, {})
    torch.manual_seed(7)
    if name == "dino_heads":
        heads = [PrototypeHead(32, 6, hidden_dim=8, bottleneck_dim=4) for _ in range(2)]
        options = options | dict(zip(("cls_head", "patch_head"), heads, strict=True))
    if name == "mekd":
        options = {"generator": ImageGenerator(tiny.NUM_CLASSES, 32, 3, width=4)}
    torch.manual_seed(100 + rank)
    loss = losses.make(name, **options)
    teachers = [tiny.vit(7, embed_dim=32), tiny.vit(8, embed_dim=32)][: 2 if reads_teachers(loss) else 1]
    student = tiny.distilled_vit(rank) if name in DISTILLED else tiny.vit(rank)
    return Distiller(teachers, Student(student), [loss])


def train(name: str, rank: int) -> list[State]:
    """Parameters and buffers after each step, with the labels in them that a step saw."""
    distiller = make(name, rank)
    distiller.allocate(NUM_IMAGES)
    parallel, optimizer = DistributedDataParallel(distiller), torch.optim.AdamW(distiller.parameters(), lr=1e-2)
    torch.manual_seed(200 + rank)
    calibrate(distiller, [(torch.randn(BATCH_SIZE, 3, 32, 32), tiny.labels())])
    bilevel = Bilevel(distiller)
    states = []
    for step in range(NUM_STEPS):
        images, second, held_out = torch.randn(3, BATCH_SIZE, 3, 32, 32)
        sample_ids = (torch.arange(BATCH_SIZE) + (2 * step + rank) * BATCH_SIZE) % NUM_IMAGES
        labels, progress = sample_ids % tiny.NUM_CLASSES, Progress(step=step, total_steps=NUM_STEPS)
        context = {"second_images": second} if distiller.reads_second_view else {}
        context |= {"sample_ids": sample_ids, "progress": progress}
        if bilevel.is_due(progress):
            bilevel.step(images, labels, held_out, tiny.labels(), lr=1e-2, **context)
        out = parallel(images, labels, **context)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        states.append({key: x.clone() for key, x in distiller.state_dict().items()} | {"loss": out.loss.detach()})
    return states


def main(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.save({name: train(name, rank) for name in losses.names()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    # Of depthwise convolutions: torch copies such a gradient into DDP's bucket, and says that this takes time.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    main(int(sys.argv[1]), Path(sys.argv[2]))
