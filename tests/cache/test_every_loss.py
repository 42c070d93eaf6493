"""Every registered loss learns from a store what it learns from the live teacher, or is refused in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from kdvit import Bilevel, Distiller, Progress, Student, Teacher, losses
from kdvit.cache import StoredTeacher, build
from kdvit.cache.teacher import live_fault
from kdvit.data import ImageData, TransformSettings, make_loader, open_data
from kdvit.losses import Loss
from kdvit.losses.loss import reads_teacher
from tests.cache.conftest import settings
from tools.compatibility_page import MODELS, NUM_CLASSES, SIZE, _as_many, is_sentence, rows

#: (student, teacher): a loss is tried with the first that suits it.
PAIRS = (("ViT", "wide ViT"), ("ViT", "ViT"), ("ViT without prefix", "ViT with 4 registers"), ("CNN", "wide CNN"),
         ("distilled ViT", "wide ViT"), ("CNN", "CNN"))  # fmt: skip
#: Default options that suit no models at all; each has a row with options beside it.
NEEDS_OPTIONS = ("dino_heads", "mekd")
#: What no store has: a second view, the rest of the teacher as a function, signals for held-out images.
LIVE_ONLY = {"crosskd", "ft", "mlld", "ofd", "ptloss", "dino_heads"}
TRANSFORM = TransformSettings(image_size=32, num_channels=3, crop_padding=2)


@pytest.fixture(scope="module")
def data() -> ImageData:
    """Images of five classes, four of each to train on."""
    whole = open_data("fashion-mnist-sample")
    chosen = [np.flatnonzero(whole.train.labels == label)[:4] for label in range(NUM_CLASSES)]
    return ImageData("five", whole.train.subset(np.concatenate(chosen)), whole.test.subset(8), whole.classes)


def make_distiller(loss: Loss, pair: tuple[str, str], teachers: Sequence | None = None) -> Distiller:
    """Always with the same weights."""
    torch.manual_seed(0)
    student, model = (MODELS[name]().eval() for name in pair)
    live = [Teacher(each, input_size=SIZE, name="teacher") for each in _as_many(model, loss)]
    torch.manual_seed(1)
    student = Student(student, input_size=SIZE, name="student")
    return Distiller(teachers or live, student, [copy.deepcopy(loss)], task_loss=None)


def first_that_suits(row: str) -> tuple[Loss, tuple[str, str]]:
    for pair in PAIRS:
        torch.manual_seed(0)
        MODELS[pair[0]]()
        loss = rows()[row](MODELS[pair[1]]())
        try:
            make_distiller(loss, pair)
            return loss, pair
        except ValueError:
            continue
    raise AssertionError(f"no pair of models suits '{row}'")


def step(subject: Distiller, batch: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The losses and the student's gradient of a training step."""
    images, labels = batch["image"], batch["label"]
    context = {"sample_ids": batch["sample_id"], "progress": Progress(total_steps=10, total_epochs=1.0)}
    torch.manual_seed(2)
    subject.train()
    subject.allocate(20)
    Bilevel(subject).step(images, labels, images.flip(0), labels.flip(0), lr=1e-3, **context)
    out = subject(images, labels, **context, stored=batch.get("rows"))
    out.loss.backward()
    return out.losses, torch.cat([p.grad.flatten() for p in subject.student.parameters() if p.grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in rows() if row not in NEEDS_OPTIONS])
def test_loss(row: str, data: ImageData, tmp_path: Path):
    loss, pair = first_that_suits(row)
    live = make_distiller(loss, pair)
    job = {"transform": TRANSFORM, "form": "fp32", "quiet": True}
    fault = live_fault(loss)
    if fault or not reads_teacher(loss):
        with pytest.raises(ValueError) as caught:
            build(tmp_path / "a", live, data, settings(epochs=1), **job)
        assert is_sentence(str(caught.value)) and (fault or "some loss reads, got none") in str(caught.value)
        assert not (tmp_path / "a").exists()
        return
    folders = build(tmp_path / "a", live, data, settings(epochs=1), **job)
    stored = make_distiller(loss, pair, [StoredTeacher(folder) for folder in folders])
    # Losses with a bilevel step hold images out; the others train on all.
    manifest = stored.teacher.manifest
    split = data.train if manifest.num_samples == len(data.train) else data.train.hold_out(0.1)[0]
    batch = next(iter(make_loader(split, TRANSFORM, batch_size=8, train=True, rows=stored.stored_rows)))
    ours, gradient = step(stored, batch)
    theirs, expected = step(live, {name: value for name, value in batch.items() if name != "rows"})
    # fp32 is what the live teacher said to the bit; sums over axes in another order in memory round differently.
    for part in theirs.keys() | ours.keys():
        torch.testing.assert_close(ours[part], theirs[part], rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_what_no_store_has_is_a_handful():
    teacher = MODELS["ViT"]()
    faults = {row.partition(",")[0]: live_fault(make(teacher)) for row, make in rows().items()}
    assert faults.keys() == set(losses.names())
    assert {name for name, fault in faults.items() if fault} == LIVE_ONLY
