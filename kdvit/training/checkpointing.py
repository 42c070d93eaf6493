"""Activation checkpointing: memory of the backward pass for a second forward pass of each block."""

from __future__ import annotations

from torch import nn

from kdvit.models import uncompiled


def enable_checkpointing(model: nn.Module, name: str = "model") -> None:
    """Let a student keep the inputs of its blocks alone, and compute what is inside again in the backward pass.

    Signals and gradients stay what they were: a tap keeps what the forward pass gave, and is closed when a block runs
    again. timm's models (``set_grad_checkpointing``) and those of transformers.

    Args:
        model: the student's model, compiled or not; it is changed.
        name: how an error calls it.

    Raises:
        ValueError: the model has no activation checkpointing.
    """
    model = uncompiled(model)
    # transformers 4 calls it gradient checkpointing.
    names = ("set_grad_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next((getattr(model, method) for method in names if hasattr(model, method)), None)
    try:
        if enable is None:
            raise ValueError("the model has no such method")
        enable(True) if hasattr(model, names[0]) else enable({"use_reentrant": False})
    except (AssertionError, ValueError) as error:  # how timm's and transformers' models say that they have none
        raise ValueError(
            f"Training: grad_checkpointing must be False for '{name}', which cannot recompute its blocks; leave it "
            "out, or save memory by a smaller batch_size with accumulation_steps."
        ) from error
