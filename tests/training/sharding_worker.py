"""One of two processes that share out a Distiller by FSDP2; started by test_sharding.py.

python -m tests.training.sharding_worker cases|methods RANK FOLDER
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from kdvit import Distiller, Progress, calibrate, losses
from kdvit.training.launch import autocast_alone, check_launch
from kdvit.training.sharding import (
    LocalShards,
    PlainStudent,
    full_state,
    is_sharded,
    keep_tapped,
    load_full_optimizer_state,
    load_full_state,
    make_equal,
)
from tests import every_method_worker, tiny

BATCH_SIZE = 4  # of each process
NUM_STEPS = 3
DECAY = 0.5
#: name: (losses, task loss). Without masks or anything else that is drawn.
CASES = {
    "logits": (lambda: ["kd"], "cross_entropy"),
    "features": (lambda: ["tinymim", "minilm"], None),
    "inside the first block": (lambda: [losses.make("tinymim", student_block=0)], None),
    "logits and features": (lambda: ["dkd", (0.5, "tinymim")], "cross_entropy"),
    "deployed with the loss": (lambda: [losses.make("simkd", feature="pooled")], None),
}
#: Every method but those of bilevel steps or scalar parameters, which `check_launch` refuses.
METHODS = [name for name in losses.names() if name not in ("mkd", "mmkd")]


def make(case: str, seed: int = 0) -> tuple[Distiller, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    made, task_loss = CASES[case]
    distiller = Distiller(tiny.vit(7, embed_dim=32), tiny.vit(seed), made(), task_loss).double()
    return distiller, torch.optim.AdamW(distiller.parameters(), lr=1e-2, weight_decay=0.1)


def batch(step: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    return tiny.images(2 * BATCH_SIZE, seed=step).double()[rows], tiny.labels(2 * BATCH_SIZE)[rows]


def steps(distiller: nn.Module, optimizer: Any, rows: slice, first: int = 0, count: int = NUM_STEPS) -> dict[str, list]:
    """Whole gradients and their norm before clipping, after each step; in eval mode, without BatchNorm's statistics."""
    distiller.eval()
    found: dict[str, list] = {"gradients": [], "norms": [], "losses": []}
    for step in range(first, first + count):
        out = distiller(*batch(step, rows))
        optimizer.zero_grad()
        out.loss.backward()
        gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
        found["gradients"].append({name: x.clone() for name, x in full_state(gradients).items()})
        norm = nn.utils.clip_grad_norm_(distiller.parameters(), 0.5)
        found["norms"].append(full_state(norm))
        found["losses"].append(out.loss.detach())
        optimizer.step()
    return found


def shard(distiller: Distiller) -> None:
    """As Accelerate does: every block, then the rest."""
    mesh = init_device_mesh("cpu", (2,))
    for block in distiller.student.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(distiller, mesh=mesh)
    keep_tapped(distiller)


def by_hand(case: str, rank: int, rows: slice) -> dict[str, Any]:
    distiller, _ = make(case, seed=rank)  # other weights in each process, until they are made equal
    make_equal(distiller)
    whole = {name: value.clone() for name, value in distiller.state_dict().items()}
    plain = PlainStudent(distiller.deployable)
    shard(distiller)
    assert is_sharded(distiller) and not any(is_sharded(teacher) for teacher in distiller.teachers)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2, weight_decay=0.1)
    ema = ModelEmaV3(LocalShards(distiller.deployable), decay=DECAY)
    start = {name: value.equal(whole[name]) for name, value in full_state(distiller.state_dict()).items()}
    first = steps(distiller, optimizer, rows, count=2)
    ema.update(LocalShards(distiller.deployable))
    state = {"distiller": full_state(distiller.state_dict()), "optimizer": full_state(optimizer.state_dict())}
    steps(distiller, optimizer, rows, first=50, count=1)  # somewhere else, before the state is loaded again
    load_full_state(distiller, state["distiller"])
    load_full_optimizer_state(optimizer, state["optimizer"])
    last = steps(distiller, optimizer, rows, first=2, count=1)
    averaged = {name: x.clone() for name, x in ema.module.whole(distiller.deployable).items()}
    student = plain.update(distiller.deployable.state_dict())
    return {
        **{key: first[key] + last[key] for key in first},
        "start": start,
        "state": state,
        "final": full_state(distiller.state_dict()),
        "averaged": averaged,
        "student": student.state_dict(),
        "prediction": student(batch(0, slice(None))[0]),
        "finite": all(bool(p.isfinite().all()) for p in distiller.parameters()),
        "sharded": sorted(name for name, m in distiller.named_modules() if isinstance(m, FSDPModule)),
    }


def fsdp_accelerator(mixed_precision: str = "no") -> Accelerator:
    """Accelerate takes its FSDP path on GPUs alone, so its state is told that this is one."""
    for state in (PartialState, AcceleratorState, GradientState):
        state._shared_state.clear()
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    accelerator.state.__dict__["fsdp_plugin"] = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def by_accelerate(case: str, rows: slice) -> dict[str, Any]:
    accelerator = fsdp_accelerator()
    distiller, optimizer = make(case)
    check_launch(accelerator, distiller)
    prepared, optimizer = accelerator.prepare(distiller, optimizer)
    keep_tapped(distiller)
    assert prepared is distiller and is_sharded(distiller)
    found = steps(distiller, optimizer, rows)
    return found | {"final": full_state(distiller.state_dict())}


def in_bfloat16(rows: slice | None = None) -> dict[str, Any]:
    """One step of several losses in mixed precision, sharded where rows are given: float32 weights, bf16 autocast."""
    torch.manual_seed(0)
    wanted = ["dkd", "tinymim", "fitnet", losses.make("reviewkd", pooled=False)]
    distiller = Distiller(tiny.vit(7, embed_dim=32), tiny.vit(), wanted).eval()
    if rows is not None:
        accelerator = fsdp_accelerator("bf16")
        autocast_alone(accelerator)
        distiller, _ = accelerator.prepare(distiller, torch.optim.AdamW(distiller.parameters()))
        keep_tapped(distiller)
    images, labels = (x[rows] if rows is not None else x for x in (tiny.images(8), tiny.labels(8)))
    with torch.autocast("cpu", torch.bfloat16):
        out = distiller(images, labels)
    out.loss.backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "gradients": full_state(gradients)}


def of_method(name: str, rows: slice, sharded: bool) -> dict[str, torch.Tensor]:
    """The gradient of one step in eval mode: no masks of dropout, no statistics of BatchNorm."""
    distiller = every_method_worker.make(name, 0).double().train()
    distiller.allocate(every_method_worker.NUM_IMAGES)
    calibrate(distiller, [(tiny.images(4, seed=9).double(), tiny.labels())])
    if sharded:
        shard(distiller)
    images, labels = batch(0, rows)
    second = {"second_images": batch(1, rows)[0]} if distiller.reads_second_view else {}
    torch.manual_seed(3)
    context = {"sample_ids": torch.arange(2 * BATCH_SIZE)[rows], "progress": Progress(step=1, total_steps=4)}
    distiller.eval()(images, labels, **context, **second).loss.backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    return full_state(gradients)


def main(what: str, rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    rows = slice(rank * BATCH_SIZE, (rank + 1) * BATCH_SIZE)
    results: dict[Any, Any]
    if what == "methods":
        results = {name: of_method(name, rows, sharded=True) for name in METHODS}
    else:
        results = {(case, "hand"): by_hand(case, rank, rows) for case in CASES}
        results |= {(case, "accelerate"): by_accelerate(case, rows) for case in CASES}
        results["bfloat16"] = in_bfloat16(rows)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
