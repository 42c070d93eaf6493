"""The checkup of a training run: batches, test images and plan as the Trainer would make them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader

from kdvit.checkup.examination import check
from kdvit.checkup.findings import Checkup
from kdvit.checkup.plan import Plan
from kdvit.data import ImageData, ImageSplit, TransformSettings, make_loader
from kdvit.data.randomness import legacy_generator
from kdvit.distiller import Distiller
from kdvit.training import Training, stronger, transform_for
from kdvit.training.preparation import check_classes, check_stored, make_mixer, make_optimizer, split_of

#: Test images that a teacher is judged by: a standard deviation of 2 points at most.
NUM_JUDGED = 512


def check_training(
    distiller: Distiller,
    data: ImageData,
    settings: Training,
    *,
    num_batches: int = 5,
    transform: TransformSettings | None = None,
) -> Checkup:
    """Look over what ``Trainer(distiller, data, settings, folder)`` would do, in one process.

    Args:
        distiller: moved to the device that would train it, and else unchanged.
        data: from `kdvit.data.open_data`.
        settings: of the training.
        num_batches: training batches to try; the first is for warming up.
        transform: by default the one that the Trainer would take.

    Raises:
        ValueError: what the Trainer would refuse.
    """
    check_classes(distiller, data)
    device = PartialState().device
    if settings.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("Training: mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'; take one of them.")
    transform = transform or transform_for(distiller.student)
    train, _ = split_of(distiller, data.train, settings)
    load = partial(make_loader, transform=transform, seed=settings.seed)
    loader = load(
        train,
        batch_size=settings.batch_size,
        train=True,
        num_workers=settings.num_workers,
        second_transform=stronger(transform) if distiller.reads_second_view else None,
        rows=distiller.stored_rows,
        augmentation_epochs=distiller.augmentation_epochs,
    )
    length = settings.length(len(loader))
    num_evaluations = math.ceil(length.num_epochs / settings.evaluate_epochs)
    check_stored(distiller, data, train, transform, settings, length.num_epochs)
    plan = Plan(
        optimizer=partial(make_optimizer, settings=settings),
        mixed_precision=settings.mixed_precision,
        num_steps=length.total_steps,
        num_epochs=length.total_steps / length.steps_per_epoch,
        accumulation_steps=settings.accumulation_steps,
        num_workers=settings.num_workers,
        num_train_images=len(train),
        num_test_images=len(data.test),
        num_evaluations=num_evaluations if distiller.trains_classifier else 0,
    )
    judged = load(_drawn(data.test), batch_size=settings.batch_size, train=False)
    return check(
        distiller.to(device),
        _mixed(loader, settings, len(data.classes)),
        num_batches=num_batches,
        sample=judged,
        data=data,
        plan=plan,
    )


def _drawn(test: ImageSplit) -> ImageSplit:
    """Some test images of all classes, in random order: in a folder they are sorted by class."""
    balanced = test.subset(min(NUM_JUDGED, len(test)))
    return balanced.subset(legacy_generator(0).permutation(len(balanced)))


def _mixed(loader: DataLoader, settings: Training, num_classes: int) -> Iterator[dict[str, Tensor]]:
    """The batches of the first epoch, mixed as in training."""
    loader.batch_sampler.set_epoch(0)
    mixer = make_mixer(settings, num_classes)
    for batch in loader:
        if mixer is not None:
            views = [view for view in ("image", "second_image") if view in batch]
            mixed = {view: mixer(batch[view], batch["label"], batch["sample_id"], 0) for view in views}
            batch = {**batch, **{view: images for view, (images, _) in mixed.items()}, "label": mixed["image"][1]}
        yield batch
