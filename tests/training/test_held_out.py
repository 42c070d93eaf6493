"""Images that training does not see: for calibration and bilevel steps; and the second view's images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdvit
from kdvit.data import FASHION_MNIST_TRANSFORM, ImageSplit
from kdvit.losses import KD, Loss, make
from tests.training.conftest import distiller, metrics, same_weights


class Recorder(Loss):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calibrated: list[Tensor] = []
        self.trained: list[Tensor] = []

    def needs_calibration(self) -> bool:
        return not self.calibrated

    def calibrate(self, teacher_logits: Tensor, labels: Tensor) -> None:
        self.calibrated += [teacher_logits, labels]

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, sample_ids: Tensor, images: Tensor) -> Tensor:
        self.trained.append(sample_ids)
        return (student_logits - teacher_logits).square().mean()


class Learnt(Loss):
    """A distance whose scale is a meta-parameter."""

    meta_interval = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.scales: list[float] = []

    def meta_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.scale], lr=0.1)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        self.scales.append(self.scale.item())
        return (student_logits - self.scale * teacher_logits).square().mean()


class SecondView(Loss):
    """Keeps the images of both views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, student_logits: Tensor, second_student_logits: Tensor, images: Tensor) -> Tensor:
        self.seen.append((images, second_student_logits.detach()))
        return (student_logits - second_student_logits).square().mean()


def rows(split: ImageSplit) -> set[int]:
    return set(split._rows.tolist())


def test_a_split_holds_out_the_same_share_of_every_class(tiny_data):
    kept, held_out = tiny_data.train.hold_out(0.25, seed=3)
    assert rows(kept) | rows(held_out) == rows(tiny_data.train) and not rows(kept) & rows(held_out)
    for label in range(10):
        count = (tiny_data.train.labels == label).sum()
        assert (held_out.labels == label).sum() == max(1, round(0.25 * count))
    again, other = tiny_data.train.hold_out(0.25, seed=3)[1], tiny_data.train.hold_out(0.25, seed=4)[1]
    assert rows(again) == rows(held_out) != rows(other)


def test_a_calibrating_loss_sees_the_held_out_images_once_and_training_the_rest(make_trainer, tiny_data):
    subject = distiller([Recorder()])
    trainer = make_trainer(subject, epochs=2, held_out_ratio=0.25, batch_size=8)
    kept, held_out = tiny_data.train.hold_out(0.25, seed=0)
    subject.losses["recorder"].trained.clear()  # the rehearsal
    trainer.fit()
    recorder = subject.losses["recorder"]
    logits, labels = recorder.calibrated
    # Random batches without a last one that is not full, as in training.
    assert len(logits) == len(labels) == len(held_out) // 8 * 8
    assert np.bincount(labels.numpy(), minlength=10).max() <= np.bincount(held_out.labels, minlength=10).max()
    seen = torch.cat(recorder.trained)
    assert len(seen) == 2 * (len(kept) // 8 * 8) and seen.max() < len(kept) < len(tiny_data.train)


def test_without_such_a_loss_all_images_are_trained_on(make_trainer, tiny_data):
    trainer = make_trainer(distiller())
    assert trainer.held_out.loader is None and len(trainer.train_loader.dataset) == len(tiny_data.train)


def test_bilevel_steps_move_the_meta_parameter_and_only_they(make_trainer):
    subject = distiller([Learnt()])
    loss = subject.losses["learnt"]
    trainer = make_trainer(subject, epochs=2, held_out_ratio=0.25)
    assert all(loss.scale is not p for group in trainer.optimizer.param_groups for p in group["params"])
    loss.scales.clear()
    trainer.fit()
    assert loss.scale.item() != 1.0 and not loss.scale.requires_grad
    assert len(set(loss.scales)) >= 2


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_one_bilevel_step_for_an_optimizer_step(accumulation_steps, make_trainer, monkeypatch):
    trainer = make_trainer(distiller([Learnt()]), steps=4, batch_size=8, accumulation_steps=accumulation_steps)
    taken = []
    monkeypatch.setattr(trainer.held_out.bilevel, "step", lambda *args, progress, **rest: taken.append(progress.step))
    trainer.fit()
    assert taken == [0, 2]  # every second step


def test_bilevel_steps_leave_accumulation_as_it_is(make_trainer):
    """Accelerate closes an accumulation at the end of a loader: that of training, not of the held-out images."""
    counts = []
    for losses in ([KD()], [make("mkd", meta_interval=1)]):
        trainer = make_trainer(distiller(losses), epochs=2, batch_size=8, accumulation_steps=3, held_out_ratio=0.2)
        pattern, backward = [], trainer.accelerator.backward

        def noting(loss, pattern=pattern, trainer=trainer, backward=backward):
            pattern.append(trainer.accelerator.sync_gradients)
            backward(loss)

        trainer.accelerator.backward = noting
        result = trainer.fit()
        expected = [number % 3 == 2 or number == len(trainer.train_loader) - 1
                    for number in range(len(trainer.train_loader))] * 2  # fmt: skip
        assert pattern == expected and result.num_steps == sum(expected)
        counts.append(len(pattern))
    assert counts[0] > counts[1] > 6  # some images are held out


def test_a_resumed_run_must_train_on_as_many_images(make_trainer, tmp_path):
    folder = tmp_path / "run"
    make_trainer(distiller(["ptloss"]), folder=folder, held_out_ratio=0.25).fit()
    with pytest.raises(ValueError, match=r"trained_images must be \d+ as in the run in .*, got 64"):
        make_trainer(
            distiller([make("ptloss", coefficients=(0.5,) * 10)]), folder=folder, resume=True, held_out_ratio=0.25
        )
    fitted = distiller(["ptloss"])
    kdvit.calibrate(fitted, [(torch.randn(20, 1, 28, 28), torch.arange(20) % 10)])
    trainer = make_trainer(
        fitted, folder=folder, resume=True, held_out_ratio=0.25
    )  # it is calibrated, and holds out too
    assert len(trainer.train_loader.dataset) < 60


def test_a_hypergradient_that_is_not_finite_stops_the_run(make_trainer):
    subject = distiller([make("mkd", meta_interval=1)])
    trainer = make_trainer(subject, steps=2, batch_size=8)
    begin = trainer._begin

    def begin_and_break() -> None:  # weights that are bad before the first step are refused there
        begin()
        subject.student.model.head.weight.data.fill_(torch.inf)

    trainer._begin = begin_and_break
    with pytest.raises(
        RuntimeError, match=r"Trainer: step 0 \(samples \[.*\] \.\.\.\): Bilevel: the hypergradient of mkd"
    ):
        trainer.fit()


def test_a_second_transform_that_nobody_reads_is_refused(make_trainer):
    with pytest.raises(ValueError, match="second_transform must be left out, since no loss reads a second view"):
        make_trainer(distiller(), second_transform=FASHION_MNIST_TRANSFORM)


def test_a_run_with_bilevel_steps_resumes_bit_for_bit(make_trainer, tmp_path, monkeypatch):
    whole = distiller([Learnt()])
    make_trainer(whole, epochs=3, held_out_ratio=0.25, folder=tmp_path / "whole").fit()

    class Cut(Exception):
        pass

    half = distiller([Learnt()])
    trainer = make_trainer(half, epochs=3, held_out_ratio=0.25, folder=tmp_path / "half")
    save, saved = trainer._save_state, []

    def save_once():
        save()
        saved.append(1)
        raise Cut

    monkeypatch.setattr(trainer, "_save_state", save_once)
    with pytest.raises(Cut):
        trainer.fit()
    resumed = distiller([Learnt()])
    make_trainer(resumed, epochs=3, held_out_ratio=0.25, folder=tmp_path / "half", resume=True).fit()
    assert same_weights(resumed, whole)
    assert metrics(tmp_path / "half", "step")[-1]["losses"] == metrics(tmp_path / "whole", "step")[-1]["losses"]


def test_a_second_view_is_another_augmentation_of_the_same_images(make_trainer):
    subject = distiller([SecondView()], teacher=None)
    trainer = make_trainer(subject, epochs=1, num_workers=0)
    assert trainer.second_transform.auto_augment == "rand-n2-m10"
    trainer.train_loader.set_epoch(0)
    batches = list(trainer.train_loader)
    trainer.train_loader.set_epoch(0)
    again = list(trainer.train_loader)
    for first, second in zip(batches, again, strict=True):
        assert torch.equal(first["second_image"], second["second_image"])
        assert first["second_image"].shape == first["image"].shape
        assert (first["second_image"] - first["image"]).abs().amax((1, 2, 3)).gt(0.1).float().mean() > 0.5
    plain = make_trainer(distiller(teacher=None, losses=[]))
    plain.train_loader.set_epoch(0)
    for first, second in zip(batches, plain.train_loader, strict=True):
        assert torch.equal(first["image"], second["image"]) and "second_image" not in second
    assert metrics(trainer.fit(), "step")[-1]["losses"]["secondview"] > 0


def test_both_views_are_mixed_alike(make_trainer):
    subject = distiller([SecondView()], teacher=None)
    trainer = make_trainer(subject, mixup_alpha=0.8)
    batch = next(iter(trainer.train_loader))
    same = batch | {"second_image": batch["image"]}
    images, labels = trainer._mixed(same)
    second, second_labels = trainer._mixed(same, "second_image")
    assert torch.equal(images, second) and torch.equal(labels, second_labels)
    assert not torch.equal(images, batch["image"])
