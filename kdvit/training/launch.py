"""What a launcher's configuration may ask for, and what kdvit makes of it."""

from __future__ import annotations

import os

from accelerate import Accelerator, DistributedType

from kdvit.distiller import Distiller


def check_launch(accelerator: Accelerator, distiller: Distiller) -> None:
    """Refuse what was launched where it cannot work, or where Accelerate would silently do something else.

    Raises:
        ValueError: fp16 on a device that has no autocast for it; processes that do not see each other; DeepSpeed; FSDP
            on a device that Accelerate does not shard on, version 1 of it, its loading in one process alone, a loss
            that does bilevel steps, a scalar parameter.
    """
    device = accelerator.device.type
    if accelerator.mixed_precision == "fp16" and device == "cpu":
        raise ValueError(
            "Training: mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16', which Accelerate would ignore "
            "there; 'no' is faster."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "Trainer: the launcher must be plain, DDP or FSDP, got DeepSpeed, whose optimizer state no other run could "
            "resume; use FSDP for the same memory, or a loop of your own (examples/accelerate_loop.py)."
        )
    started, joined = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if started != joined:
        raise ValueError(
            f"Trainer: the launcher's {started} processes must work together, got {joined} each by itself on {device}; "
            f"on a CPU launch with: accelerate launch --cpu --no_python torchrun --nproc_per_node {started} SCRIPT."
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                f"Trainer: FSDP must run in several processes on GPUs, got {joined} on {device}, where Accelerate "
                "would train unsharded; launch without the FSDP configuration."
            )
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"Trainer: fsdp_version must be 2, got {plugin.fsdp_version}; write fsdp_version: 2 in the launcher's "
            "configuration."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "Trainer: fsdp_cpu_ram_efficient_loading must be false, got true, which would leave the teacher without "
            "weights; every process loads both models."
        )
    for name, loss in distiller.losses.items():
        if loss.meta_optimizer() is not None:
            raise ValueError(
                f"Trainer: loss '{name}' must not do bilevel steps under FSDP, which keeps no whole weights to step "
                "from; use DDP, or another loss."
            )
    for name, parameter in distiller.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(
                f"Trainer: parameters must have an axis to be shared out under FSDP, got the scalar '{name}'; use DDP, "
                "or make it a tensor of one element."
            )


def autocast_alone(accelerator: Accelerator) -> None:
    """Mixed precision by autocast under FSDP too: weights and losses in float32, as in one process and under DDP.

    FSDP2's own policy would cast the Distiller's images, projectors and losses to half precision, and feed the
    teacher's float32 weights with half-precision images. Call it before ``accelerator.prepare``, and the Distiller
    within ``accelerator.autocast()``.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
