"""What a run is made of before it starts: the accelerator, the images, the optimizer, the transforms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration

from kdvit.bilevel import Bilevel
from kdvit.cache.fingerprint import of_job
from kdvit.cache.teacher import StoredTeacher
from kdvit.data import BatchMixer, ImageData, ImageSplit, TransformSettings, check_labels
from kdvit.distiller import Distiller
from kdvit.signals import nearest
from kdvit.training.settings import Training
from kdvit.training.trackers import check_trackers
from kdvit.wrappers import Student


def make_accelerator(settings: Training, folder: str | Path) -> Accelerator:
    # Accelerate keeps one precision and one accumulation for the whole process. A notebook makes several Trainers, so
    # each gets a state of its own; the process group is in another state, and stays common.
    AcceleratorState._shared_state, GradientState._shared_state = {}, {}
    return Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.accumulation_steps,
        log_with=check_trackers(settings.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(folder) / "trackers")),
    )


def check_classes(distiller: Distiller, data: ImageData) -> None:
    """
    Raises:
        ValueError: classes of data and student differ, or a label is out of range.
    """
    if distiller.num_classes is None:
        return
    if distiller.num_classes != len(data.classes):
        raise ValueError(
            f"Trainer: data '{data.name}' has {len(data.classes)} classes but student '{distiller.student.name}' has "
            f"{distiller.num_classes}; make the student with num_classes={len(data.classes)}."
        )
    for split in (data.train, data.test):
        check_labels(split, distiller.num_classes)


def check_stored(
    distiller: Distiller,
    data: ImageData,
    trained: ImageSplit,
    transform: TransformSettings,
    settings: Training,
    num_epochs: int,
) -> None:
    """
    Raises:
        ValueError: a stored teacher was not made for these very images.
    """
    stored = [teacher for teacher in distiller.teachers if isinstance(teacher, StoredTeacher)]
    if stored:  # hashing images is not for nothing
        job = of_job(trained, transform, settings, holds_out=len(trained) < len(data.train))
        for teacher in stored:
            teacher.check_job(job, num_epochs)


def split_of(
    distiller: Distiller, train: ImageSplit, settings: Training, num_processes: int = 1
) -> tuple[ImageSplit, ImageSplit | None]:
    """(the images to train on, those that are held out where a loss asks for such).

    Raises:
        ValueError: they are fewer than one batch.
    """
    held_out = None
    # Also where a loss is calibrated already: what it was fitted on must not be trained on in a later run.
    if Bilevel(distiller) or any(loss.calibrate is not None for loss in distiller.losses.values()):
        train, held_out = train.hold_out(settings.held_out_ratio, settings.seed)
    if settings.batch_size * num_processes > len(train):
        raise ValueError(
            f"Training: batch_size must be at most the {len(train)} training images over {num_processes} process(es), "
            f"got {settings.batch_size}; use smaller batches."
        )
    return train, held_out


def make_mixer(settings: Training, num_classes: int) -> BatchMixer | None:
    """What mixes batches and smooths labels; None where nothing does."""
    if not (settings.mixup_alpha or settings.cutmix_alpha or settings.label_smoothing):
        return None
    return BatchMixer(
        settings.mixup_alpha,
        settings.cutmix_alpha,
        num_classes=num_classes,
        label_smoothing=settings.label_smoothing,
        seed=settings.seed,
    )


def make_optimizer(distiller: Distiller, settings: Training) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    name = settings.optimizer.lower()
    base = name.removeprefix("lookahead_")
    if base not in list_optimizers():
        hint = nearest(base, list_optimizers()) or ";"
        raise ValueError(f"Training: unknown optimizer '{settings.optimizer}'{hint} see timm.optim.list_optimizers().")
    info = get_optimizer_info(base)
    if info.second_order:
        raise ValueError(
            f"Training: optimizer must do with first derivatives, got '{settings.optimizer}', which needs second ones; "
            "take another, such as adamw."
        )
    # An optimizer with three betas keeps its own.
    options = {"betas": settings.betas} if info.has_betas and info.num_betas == len(settings.betas) else {}
    try:
        return create_optimizer_v2(
            distiller, opt=name, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum,
            **options,
        )  # fmt: skip
    except (AssertionError, ImportError) as error:  # apex, bitsandbytes
        raise ValueError(
            f"Training: optimizer '{settings.optimizer}' cannot be made here ({error}); take another, such as adamw."
        ) from error


def transform_for(student: Student) -> TransformSettings:
    """Crops and normalisation that fit a student: pad-and-crop for images of up to 64 pixels, else random resized.

    Raises:
        ValueError: the student takes images that are not square.
    """
    channels, height, width = student.input_size
    if height != width:
        raise ValueError(
            f"Trainer: '{student.name}' takes {height}x{width} images, and the built-in transforms are square; "
            "use an own loop with Distiller for other shapes."
        )
    facts = {"image_size": height, "num_channels": channels}
    if student.normalisation is not None:
        facts |= {name: tuple(values) * (channels // len(values)) for name, values in
                  zip(("mean", "std"), student.normalisation, strict=True)}  # fmt: skip
    elif channels == 1:
        facts |= {"mean": (0.5,), "std": (0.5,)}
    if height <= 64:
        facts |= {"crop_padding": 2 if height < 32 else 4, "interpolation": "bilinear"}
    return TransformSettings(**facts)


def stronger(transform: TransformSettings) -> TransformSettings:
    """The default of a second view: the same with RandAugment, 2 operations of magnitude 10 (MLLD's strong view)."""
    return replace(transform, auto_augment="rand-n2-m10", color_jitter=0.0)
