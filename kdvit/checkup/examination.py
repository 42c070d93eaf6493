"""The checkup from the first look to the last."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from kdvit.calibration import calibrate
from kdvit.checkup.costing import (
    look_at_balance,
    look_at_gradients,
    look_at_memory,
    look_at_numbers,
    look_at_time,
)
from kdvit.checkup.findings import Checkup
from kdvit.checkup.pairing import look_at_images, look_at_pair
from kdvit.checkup.pictures import look_at_data
from kdvit.checkup.plan import Plan
from kdvit.checkup.rehearsal import rehearse
from kdvit.checkup.teaching import look_at_teachers
from kdvit.checkup.wording import listed
from kdvit.cost import device_name
from kdvit.data import ImageData
from kdvit.data.randomness import preserved_generators, seed_generators
from kdvit.distiller import Distiller

Batch = Mapping[str, Tensor] | Sequence[Tensor]


def check(
    distiller: Distiller,
    batches: Iterable[Batch],
    *,
    num_batches: int = 5,
    sample: Iterable[Batch] | None = None,
    data: ImageData | None = None,
    plan: Plan | None = None,
) -> Checkup:
    """Look the coming training over on a few batches, and change nothing.

    All steps are done on a copy of the student and of the losses; the teacher, which no step changes, is the real one.
    Models, BatchNorm's statistics, gradients, the losses' memories, and the random generators stay as they are; an
    iterator is read from.

    Args:
        distiller: the plain Distiller, on the device that will train it.
        batches: of training, (images, labels) or dicts of a `kdvit.data.make_loader`.
        num_batches: how many are taken; the first is for warming up.
        sample: test images to judge the teacher by, in random order, some hundreds; by default ``batches``.
        data: look at its classes and pictures too.
        plan: what training will do; by default AdamW in full precision.

    Returns:
        A `Checkup`: print it. ``checkup.ok`` is False where something is wrong enough not to start.

    Raises:
        ValueError: there is no batch, or one that the Distiller refuses.
        TypeError: a batch is neither a dict nor (images, labels).
    """
    if num_batches < 1:
        raise ValueError(f"Distiller.check: num_batches must be >= 1, got {num_batches}; 5 are usual.")
    plan = plan or Plan()
    device = next(distiller.student.parameters()).device
    with _unchanged_generators(device):
        taken, data_seconds = _taken(batches, num_batches, plan.num_workers)
        judged = taken if sample is None else [_as_dict(batch) for batch in sample]
        # The teachers are shared: what they are asked for does not change them, and a large one is not held twice.
        subject = copy.deepcopy(distiller, {id(teacher): teacher for teacher in distiller.teachers})
        if plan.num_train_images is not None:
            subject.allocate(plan.num_train_images)
        labelled = [(images.to(device), labels.to(device)) for images, labels in map(_hard, judged) if len(labels)]
        findings = [*look_at_teachers(subject.eval(), labelled), *look_at_pair(subject)]
        findings += look_at_images(subject, taken[0]["image"])
        if data is not None:
            findings += look_at_data(data)
        calibrate(subject, labelled)
        spoiled = _spoiled(subject)
        rehearsed = rehearse(subject, taken, data_seconds, plan)
        rehearsed.first_bad = spoiled or rehearsed.first_bad
        if rehearsed.cost is not None:
            findings += look_at_gradients(subject, rehearsed)
            findings += [look_at_numbers(rehearsed), *look_at_balance(subject, rehearsed)]
            # A calibrated copy would seem to need no live teacher.
            findings += look_at_time(distiller, rehearsed.cost, plan, device_name(device))
        findings.append(look_at_memory(subject, rehearsed, device))
    teachers = listed([f"'{teacher.name}'" for teacher in distiller.teachers], 2) or "labels"
    source = f" on {Path(data.name).name}" if data is not None else ""
    size = f"{len(taken)} {'batches' if len(taken) > 1 else 'batch'} of {len(taken[0]['image'])}"
    heading = f"'{distiller.student.name}' learns from {teachers}{source}: {size}"
    return Checkup(heading, tuple(findings), tuple(rehearsed.losses), rehearsed.cost)


@contextmanager
def _unchanged_generators(device: torch.device) -> Iterator[None]:
    """What is drawn here is the same each time, and draws nothing from what training will draw."""
    accelerators = [device] if device.type == "cuda" else []
    with preserved_generators(), torch.random.fork_rng(accelerators):
        seed_generators(0)
        if accelerators:
            torch.cuda.manual_seed(0)
        yield


def _taken(batches: Iterable[Batch], count: int, num_workers: int) -> tuple[list[dict[str, Tensor]], float]:
    """(the first batches, the seconds that loading one takes).

    The first one, which starts the loader, is not timed; but of loader processes each makes one batch at the same time,
    and what comes right after the first says nothing.
    """
    taken, iterator = [], islice(batches, count)
    started = time.perf_counter()
    for batch in iterator:
        taken.append(_as_dict(batch))
        if len(taken) == 1:
            first_seconds = time.perf_counter() - started
            started = time.perf_counter()
    if not taken:
        raise ValueError(
            "Distiller.check: batches must hold at least one batch, got none; give a loader, or a list of "
            "(images, labels)."
        )
    seconds = time.perf_counter() - started
    if num_workers:
        return taken, (first_seconds + seconds) / (math.ceil(len(taken) / num_workers) * num_workers)
    return taken, seconds / (len(taken) - 1) if len(taken) > 1 else first_seconds


def _as_dict(batch: Batch) -> dict[str, Tensor]:
    if isinstance(batch, Mapping) and "image" in batch:
        return dict(batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return {"image": batch[0], "label": batch[1]}
    got = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(
        f"Distiller.check: a batch must be (images, labels) or a dict with 'image' and 'label', got {got}; "
        "wrap the loader in a generator that makes them."
    )


def _hard(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Images, and the class that each is mostly of; none where a batch has no labels."""
    labels = batch.get("label")
    if labels is None:
        return batch["image"], torch.zeros(0, dtype=torch.long)
    return batch["image"], labels.argmax(1) if labels.ndim == 2 else labels


def _spoiled(distiller: Distiller) -> str:
    """The first weight that is NaN or infinite before any step."""
    # Of the buffers only the student's: a loss may keep an infinity on purpose, until it knows better.
    named = [*distiller.named_parameters(), *distiller.student.named_buffers(prefix="student")]
    return next((f"'{name}', before any step," for name, value in named if not value.isfinite().all()), "")
