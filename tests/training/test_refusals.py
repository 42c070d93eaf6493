"""What the Trainer refuses, and in which words."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from kdvit import Training
from kdvit.data import FASHION_MNIST_TRANSFORM, open_data
from kdvit.losses import KD, Loss
from tests.training.conftest import distiller, metrics, newest_state, vit


class Breaks(Loss):
    """NaN at one step; or a value of 0 whose gradient is NaN."""

    def __init__(self, step: int, gradient_only: bool = False) -> None:
        super().__init__()
        self.step, self.gradient_only = step, gradient_only

    def forward(self, student_logits: Tensor, progress) -> Tensor:
        zero = 0 * student_logits.sum()
        if progress.step != self.step or not self.training:
            return zero
        return zero.abs().sqrt() if self.gradient_only else zero + float("nan")


def test_nan_stops_the_run_with_the_loss_the_step_and_the_samples(make_trainer, tmp_path):
    trainer = make_trainer(distiller([KD(), Breaks(2)]), folder=tmp_path / "run")
    with pytest.raises(RuntimeError) as caught:
        trainer.fit()
    sentence = str(caught.value)
    assert sentence.startswith("Trainer: breaks became nan at step 2 (samples [")
    assert sentence.endswith(
        f"the state of step 0 is intact in '{tmp_path / 'run'}'; lower lr, clip the gradient, or use "
        "mixed_precision='no'."
    )
    assert len(metrics(tmp_path / "run", "step")) == 2


def test_nan_names_the_samples_of_its_batch(make_trainer):
    batches = []

    class Ids(Loss):
        def forward(self, student_logits: Tensor, sample_ids: Tensor) -> Tensor:
            if self.training:
                batches.append(sample_ids.tolist())
            return 0 * student_logits.sum()

    with pytest.raises(RuntimeError) as caught:
        make_trainer(distiller([Ids(), Breaks(3)])).fit()
    assert f"(samples {batches[3][:8]} ...)" in str(caught.value)


def test_where_reading_values_is_dear_many_steps_are_looked_at_together(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(distiller([Breaks(5)]), folder=tmp_path / "run", epochs=2, log_steps=100)
    monkeypatch.setattr(Accelerator, "device", property(lambda self: torch.device("meta")))
    with pytest.raises(RuntimeError, match=r"Trainer: breaks became nan at step 5 \(samples"):
        trainer.fit()
    # Found at the end of the second epoch, whose NaN weights are not kept.
    state = newest_state(tmp_path / "run")
    assert state["epoch"] == 1 and state["step"] == 4
    assert all(value.isfinite().all() for value in state["distiller"].values())


def test_weights_that_become_nan_are_not_kept(make_trainer, tmp_path):
    trainer = make_trainer(distiller([Breaks(1, gradient_only=True)]), folder=tmp_path / "run", epochs=3, batch_size=64)
    with pytest.raises(
        RuntimeError, match=r"Trainer: the weights became NaN or infinite before step 2 \(first: student"
    ):
        trainer.fit()
    state = newest_state(tmp_path / "run")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["distiller"].values())


def test_a_folder_with_a_run_is_refused(make_trainer, tmp_path):
    make_trainer(distiller(), folder=tmp_path / "run").fit()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError) as caught:
        make_trainer(distiller(), folder=tmp_path / "run")
    assert str(caught.value) == (
        f"run folder '{tmp_path / 'run'}' must be empty, but holds an earlier run; choose another folder (--output), "
        "remove it, or resume that run (--resume)."
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_run_whose_state_is_gone_cannot_be_resumed(make_trainer, tmp_path):
    make_trainer(distiller(), folder=tmp_path / "run").fit()
    shutil.rmtree(tmp_path / "run" / "state")
    with pytest.raises(ValueError, match="holds an earlier run; its state is gone, so choose another folder or remove"):
        make_trainer(distiller(), folder=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"lr": 5e-4},
            "Trainer: lr must be 0.001 as in the run in '{folder}', got 0.0005; resume it as it was started,",
        ),
        ({"epochs": 4}, "Trainer: epochs must be 1 as in the run in '{folder}', got 4; resume it"),
        (
            {"losses": ["dkd"]},
            "Trainer: losses.kd must be 'KD(temperature=4.0)' as in the run in '{folder}', got None; resume it",
        ),
        (
            {"task_loss": None},
            "Trainer: task_loss must be 'cross_entropy' as in the run in '{folder}', got None; resume it",
        ),
        ({"teacher": 8}, "Trainer: teachers.0.teacher_weights must be '"),
        (
            {"drop_path_rate": 0.5},
            "Trainer: dropout.blocks.1.drop_path1 must be None as in the run in '{folder}', got ",
        ),
        (
            {"transform": FASHION_MNIST_TRANSFORM},
            "Trainer: transform.crop_padding must be 2 as in the run in '{folder}', got 0; resume it",
        ),
        ({"depth": 1}, "Trainer: the student must be the one of the run in '{folder}', got one with other weights;"),
    ],
)
def test_another_run_cannot_be_resumed(make_trainer, tmp_path, change, sentence):
    make_trainer(distiller(), folder=tmp_path / "run").fit()
    own = ("depth", "drop_path_rate", "task_loss", "teacher")
    options = {name: change[name] for name in own if name in change}
    if "teacher" in options:
        options["teacher"] = vit(options["teacher"], embed_dim=32)
    subject = distiller(change.get("losses", ["kd"]), **options)
    change = {name: value for name, value in change.items() if name not in (*own, "losses")}
    with pytest.raises(ValueError) as caught:
        make_trainer(subject, folder=tmp_path / "run", resume=True, **change)
    assert str(caught.value).startswith(sentence.format(folder=tmp_path / "run"))


def test_other_images_of_the_same_name_and_number_are_refused(make_trainer, tiny_data, tmp_path):
    make_trainer(distiller(), folder=tmp_path / "run").fit()
    moved = replace(tiny_data, name="elsewhere")
    assert make_trainer(distiller(), folder=tmp_path / "run", resume=True, data=moved).step == 4
    other = replace(tiny_data, train=open_data("fashion-mnist-sample").train.subset(range(1000, 1064)))
    with pytest.raises(ValueError, match=r"Trainer: train.labels must be '"):
        make_trainer(distiller(), folder=tmp_path / "run", resume=True, data=other)


def test_optimizers_that_cannot_be_made_or_used_are_refused(make_trainer):
    with pytest.raises(ValueError, match="Training: optimizer must do with first derivatives, got 'adahessian', which"):
        make_trainer(distiller(), optimizer="adahessian")
    with pytest.raises(
        ValueError, match=r"Training: optimizer 'fusedlamb' cannot be made here \(.*\); take another, su"
    ):
        make_trainer(distiller(), optimizer="fusedlamb")


def test_how_a_run_is_watched_may_change(make_trainer, tmp_path):
    first = make_trainer(distiller(), folder=tmp_path / "run").fit()
    again = make_trainer(
        distiller(), folder=tmp_path / "run", resume=True, log_steps=7, num_workers=1, evaluate_epochs=9
    )
    assert again.step == first.num_steps


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (
            {"num_classes": 7},
            {},
            "Trainer: data 'fashion-mnist-sample' has 10 classes but student 'small' has 7; make the student with "
            "num_classes=10.",
        ),
        (
            {},
            {"optimizer": "adamww"},
            "Training: unknown optimizer 'adamww'; did you mean 'adamw'? see timm.optim.list",
        ),
        ({}, {"optimizer": "qqqqqq"}, "Training: unknown optimizer 'qqqqqq'; see timm.optim.list_optimizers()."),
        (
            {},
            {"batch_size": 65},
            "Training: batch_size must be at most the 64 training images over 1 process(es), got 65;",
        ),
        ({}, {"seed": -1}, "EpochBatchSampler: seed must be in [0, 2**63), got -1;"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_batch(make_trainer, tmp_path, model, options, sentence):
    teacher = vit(7, **model)
    with pytest.raises(ValueError) as caught:
        make_trainer(distiller(teacher=teacher, **model), folder=tmp_path / "run", **options)
    assert str(caught.value).startswith(sentence)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_corrupt_image_is_named_before_the_first_batch(make_trainer, tmp_path):
    for split in ("train", "val"):
        for label in range(10):
            for number in range(2):
                path = tmp_path / "images" / split / f"class{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (28, 28), 20 * label).save(path)
    corrupt = tmp_path / "images" / "val" / "class3" / "1.png"
    corrupt.write_bytes(corrupt.read_bytes()[:40])
    data = open_data(tmp_path / "images")
    with pytest.raises(ValueError, match=rf"data: {corrupt} must be a readable image, got"):
        make_trainer(distiller(), data=data)


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"steps": 3}, ValueError, "Training: exactly one of epochs and steps must be given, got epochs=10, steps=3;"),
        (
            {"epochs": None},
            ValueError,
            "Training: exactly one of epochs and steps must be given, got epochs=None, steps=None",
        ),
        ({"epochs": 0}, ValueError, "Training: epochs must be >= 1, got 0;"),
        ({"epochs": 1.5}, TypeError, "Training: epochs must be a whole number, got 1.5;"),
        ({"batch_size": 0}, ValueError, "Training: batch_size must be >= 1, got 0;"),
        ({"log_steps": 0}, ValueError, "Training: log_steps must be >= 1, got 0;"),
        ({"lr": -1.0}, ValueError, "Training: lr must be >= 0, got -1.0;"),
        ({"lr": float("nan")}, ValueError, "Training: lr must be >= 0, got nan;"),
        ({"num_workers": -1}, ValueError, "Training: num_workers must be >= 0, got -1;"),
        ({"clip_norm": 0.0}, ValueError, "Training: clip_norm must be > 0, got 0.0; try 1.0, or None."),
        ({"label_smoothing": 1.0}, ValueError, "Training: label_smoothing must be in [0, 1), got 1.0;"),
        (
            {"mixed_precision": "fp8"},
            ValueError,
            "Training: mixed_precision must be 'no', 'bf16' or 'fp16', got 'fp8';",
        ),
        ({"ema_decay": 1.0}, ValueError, "Training: ema_decay must be in (0, 1), got 1.0; try 0.999, or None."),
    ],
)
def test_settings_out_of_range_are_refused(options, kind, sentence):
    with pytest.raises(kind) as caught:
        Training(**options)
    assert str(caught.value).startswith(sentence)
