"""Everything that a training run can be told, in one flat dataclass with units in the names."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Length:
    """How long a run is: optimizer steps of an epoch and of all, and epochs, the last of which may end early."""

    steps_per_epoch: int
    total_steps: int
    num_epochs: int


@dataclass(frozen=True)
class Training:
    """Settings of a run. The defaults suit a ViT of any size; published recipes say what differs.

    Args:
        epochs: passes over the training images; or None, with ``steps``.
        steps: optimizer steps; or None, with ``epochs``.
        batch_size: images of one process in one forward pass.
        accumulation_steps: forward passes that make one optimizer step.
        optimizer: any name of `timm.optim.create_optimizer_v2` (``timm.optim.list_optimizers()``).
        lr: peak learning rate.
        weight_decay: not applied to biases, norms, mask tokens and what the model excludes itself.
        momentum: of SGD-like optimizers.
        betas: of Adam-like optimizers.
        warmup_epochs: linear warm-up from ``warmup_lr``; then a cosine down to ``min_lr``.
        warmup_lr: learning rate of the first step.
        min_lr: learning rate of the last step.
        clip_norm: largest norm of the gradient, None for no clipping.
        label_smoothing: of the task loss, in [0, 1).
        mixup_alpha: Beta parameter of mixup, 0 for none.
        cutmix_alpha: Beta parameter of CutMix, 0 for none.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        compile: compile the step with torch.compile.
        grad_checkpointing: keep the inputs of the student's blocks alone, and compute the rest again in the backward
            pass: less memory, more time, the same gradients.
        ema_decay: decay of an average of the student's weights, which is then evaluated and saved; None for none.
        held_out_ratio: share of the training images, in (0, 1), that is set aside where a loss needs images which
            training does not see (a calibration, a bilevel step); the test images are never used for that.
        evaluate_epochs: evaluate every so many epochs, and at the end.
        log_steps: write a line of metrics every so many optimizer steps.
        gradient_share_steps: measure every so many optimizer steps how much of the gradient each loss makes, for the
            report; it costs a backward pass for each loss. None: never.
        save_steps: save resumable state every so many optimizer steps, besides each epoch's end; None for that alone.
        keep_states: how many generations of resumable state are kept.
        trackers: names of experiment trackers that Accelerate knows, such as tensorboard, which get the metrics too.
        num_workers: loader processes.
        seed: of everything that is random.
    """

    epochs: int | None = 10
    steps: int | None = None
    batch_size: int = 128
    accumulation_steps: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 1.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mixed_precision: str = "no"
    compile: bool = False
    grad_checkpointing: bool = False
    ema_decay: float | None = None
    held_out_ratio: float = 0.1
    evaluate_epochs: int = 1
    log_steps: int = 10
    gradient_share_steps: int | None = None
    save_steps: int | None = None
    keep_states: int = 2
    trackers: tuple[str, ...] = ()
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"Training: exactly one of epochs and steps must be given, got epochs={self.epochs}, "
                f"steps={self.steps}; leave the other out (None)."
            )
        for name in (
            "epochs", "steps", "batch_size", "accumulation_steps", "evaluate_epochs", "log_steps",
            "gradient_share_steps", "save_steps", "keep_states",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise TypeError(f"Training: {name} must be a whole number, got {value!r}; round it.")
            if value is not None and value < 1:
                raise ValueError(f"Training: {name} must be >= 1, got {value}; give a positive whole number.")
        for name in (
            "lr", "weight_decay", "momentum", "warmup_epochs", "warmup_lr", "min_lr", "mixup_alpha", "cutmix_alpha",
            "num_workers",
        ):  # fmt: skip
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"Training: {name} must be >= 0, got {value}; give 0 or more.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"Training: clip_norm must be > 0, got {self.clip_norm}; try 1.0, or None.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"Training: label_smoothing must be in [0, 1), got {self.label_smoothing}; try 0.1.")
        if not 0 < self.held_out_ratio < 1:
            raise ValueError(f"Training: held_out_ratio must be in (0, 1), got {self.held_out_ratio}; try 0.1.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(
                f"Training: mixed_precision must be 'no', 'bf16' or 'fp16', got '{self.mixed_precision}'; "
                "'bf16' suits recent GPUs, 'no' suits a CPU."
            )
        if self.compile and self.gradient_share_steps is not None:
            raise ValueError(
                f"Training: gradient_share_steps must be None where the step is compiled, got "
                f"{self.gradient_share_steps}; drop one of them."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"Training: ema_decay must be in (0, 1), got {self.ema_decay}; try 0.999, or None.")

    def length(self, batches_per_epoch: int) -> Length:
        """How long a run is in which a process has so many batches an epoch."""
        steps_per_epoch = math.ceil(batches_per_epoch / self.accumulation_steps)
        total_steps = self.steps or self.epochs * steps_per_epoch
        return Length(steps_per_epoch, total_steps, math.ceil(total_steps / steps_per_epoch))
