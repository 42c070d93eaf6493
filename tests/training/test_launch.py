"""Launches that cannot work are refused in one sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType

from kdvit import Distiller, losses
from kdvit.training.launch import check_launch
from tests import tiny


def launch(**facts: Any) -> SimpleNamespace:
    """What check_launch reads of an Accelerator."""
    plugin = SimpleNamespace(
        fsdp_version=facts.pop("fsdp_version", 2), cpu_ram_efficient_loading=facts.pop("efficient", False)
    )
    defaults = {
        "distributed_type": DistributedType.FSDP, "num_processes": 2, "device": torch.device("cpu"),
        "mixed_precision": "no",
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **facts}, state=SimpleNamespace(fsdp_plugin=plugin))


def distiller_of(loss: str, **options: Any) -> Distiller:
    teachers = [tiny.vit(7), tiny.vit(8)]
    return Distiller(teachers if loss == "mmkd" else teachers[0], tiny.vit(), [losses.make(loss, **options)])


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher of two sets."""
    monkeypatch.setenv("WORLD_SIZE", "2")


REFUSED = {
    "DeepSpeed": (
        {"distributed_type": DistributedType.DEEPSPEED},
        "Trainer: the launcher must be plain, DDP or FSDP, got DeepSpeed, whose optimizer state no other run could "
        "resume; use FSDP for the same memory, or a loop of your own (examples/accelerate_loop.py).",
    ),
    "version 1": (
        {"fsdp_version": 1},
        "Trainer: fsdp_version must be 2, got 1; write fsdp_version: 2 in the launcher's configuration.",
    ),
    "loading in one process": (
        {"efficient": True},
        "Trainer: fsdp_cpu_ram_efficient_loading must be false, got true, which would leave the teacher without "
        "weights; every process loads both models.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_launch_that_cannot_work_is_refused(name):
    facts, sentence = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        check_launch(launch(**facts), distiller_of("kd"))
    assert str(caught.value) == sentence


def test_fsdp_on_a_cpu_is_refused(monkeypatch):
    """Accelerate itself would go on with DDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    on_cpu = launch(distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(ValueError) as caught:
        check_launch(on_cpu, distiller_of("kd"))
    assert str(caught.value) == (
        "Trainer: FSDP must run in several processes on GPUs, got 2 on cpu, where Accelerate would train unsharded; "
        "launch without the FSDP configuration."
    )
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    check_launch(on_cpu, distiller_of("mkd"))


@pytest.mark.parametrize("loss, options", [("mkd", {}), ("mmkd", {"batch_size": 4})])
def test_bilevel_steps_are_refused(loss, options):
    with pytest.raises(ValueError) as caught:
        check_launch(launch(), distiller_of(loss, **options))
    assert str(caught.value) == (
        f"Trainer: loss '{loss}' must not do bilevel steps under FSDP, which keeps no whole weights to step from; use "
        "DDP, or another loss."
    )


def test_a_scalar_parameter_is_refused():
    distiller = distiller_of("kd")
    distiller.student.model.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError) as caught:
        check_launch(launch(), distiller)
    assert str(caught.value) == (
        "Trainer: parameters must have an axis to be shared out under FSDP, got the scalar 'student.model.scale'; use "
        "DDP, or make it a tensor of one element."
    )


def test_half_precision_on_a_cpu(monkeypatch):
    """Accelerate ignores fp16 there: it would train in float32, and say fp16."""
    monkeypatch.delenv("WORLD_SIZE")
    on_cpu = {"distributed_type": DistributedType.NO, "num_processes": 1}
    with pytest.raises(ValueError) as caught:
        check_launch(launch(**on_cpu, mixed_precision="fp16"), distiller_of("kd"))
    assert str(caught.value) == (
        "Training: mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16', which Accelerate would ignore there; "
        "'no' is faster."
    )
    check_launch(launch(**on_cpu, mixed_precision="bf16"), distiller_of("kd"))
    check_launch(launch(**on_cpu, mixed_precision="fp16", device=torch.device("cuda")), distiller_of("kd"))


def test_processes_that_do_not_see_each_other_are_refused():
    """A configuration for GPUs on a machine without: each process would train, and write, the whole run."""
    with pytest.raises(ValueError) as caught:
        check_launch(launch(distributed_type=DistributedType.NO, num_processes=1), distiller_of("kd"))
    assert str(caught.value) == (
        "Trainer: the launcher's 2 processes must work together, got 1 each by itself on cpu; on a CPU launch with: "
        "accelerate launch --cpu --no_python torchrun --nproc_per_node 2 SCRIPT."
    )
