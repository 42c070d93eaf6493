"""Every method, as the benchmarks set it up, for two steps through the real Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import feature_methods
import pytest
import response_methods
import torch
from safetensors.torch import load_file
from small_job import STUDENT, Method, distiller

from kdvit import create_model, losses
from kdvit.data import FASHION_MNIST_TRANSFORM
from kdvit.losses.image_generator import ImageGenerator
from kdvit.losses.wrapper import LossWrapper
from kdvit.models import save_model
from kdvit.schedules import Schedule
from tests.training.conftest import metrics

ROWS: dict[str, Method] = {**response_methods.METHODS, **feature_methods.METHODS}
MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}


def reads_labels(name: str) -> bool:
    """Mixed images are images: only rows whose losses read labels or logits can tell them apart."""
    method = ROWS[name]
    return name in response_methods.METHODS or any(
        "labels" in loss.inputs() for _, loss in method.losses(Path("runs"), 0)
    )


RUNS = [(name, {}) for name in ROWS] + [(name, MIXED) for name in ROWS if reads_labels(name)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two of the methods start from: a generator, and a student that was trained alone."""
    folder = tmp_path_factory.mktemp("runs")
    ImageGenerator(latent_dim=10, image_size=28, channels=1, width=4).save(folder / "generator")
    model = create_model("vit_tiny_patch16_224", num_classes=10, **STUDENT)
    save_model(model, folder / "alone" / "0" / "student")
    return folder


def test_the_benchmarks_hold_every_method(runs):
    made = [loss for method in ROWS.values() for _, loss in method.losses(runs, 0)]
    for _ in range(2):
        made = [loss.loss if isinstance(loss, LossWrapper) else loss for loss in made]
    assert {loss.name for loss in made} == set(losses.names())
    shared = response_methods.METHODS.keys() & feature_methods.METHODS.keys()
    assert all(response_methods.METHODS[name] is feature_methods.METHODS[name] for name in shared)


def trained_alone(make_trainer, runs: Path, options: dict[str, Any]) -> Path:
    """The run of the labels alone with the same settings; made once."""
    folder = runs / f"alone-{len(options)}"
    if not folder.exists():
        make_trainer(distiller(ROWS["alone"], 0, runs), folder=folder, **options).fit()
    return folder


@pytest.mark.parametrize("name, labels", RUNS, ids=[f"{name}-{'mixed' if mix else 'hard'}" for name, mix in RUNS])
def test_two_steps(name, labels, runs, make_trainer):
    method = ROWS[name]
    subject = distiller(method, 0, runs)
    before = {key: value.clone() for key, value in subject.deployable.state_dict().items()}
    options = {"transform": FASHION_MNIST_TRANSFORM, "steps": 2, "warmup_epochs": 0.0, **labels}
    result = make_trainer(subject, **options).fit()
    assert result.num_steps == 2 and 0 <= result.top1 <= 100
    last = metrics(result, "step")[-1]
    assert last["losses"].keys() > {"task"} or name == "alone"
    assert all(torch.tensor(value).isfinite() for value in last["losses"].values())
    saved = load_file(result.folder / "student" / "model.safetensors")
    assert saved.keys() == before.keys()
    moved = [key for key in saved if not torch.equal(saved[key], before[key])]
    assert any("blocks.0." in key for key in moved) and any("head" in key for key in moved)
    if method.distilled:  # the labels train the other head
        assert "head_dist.weight" in moved
    elif name != "alone" and saved.keys() == subject.student_state_dict().keys():
        alone = load_file(trained_alone(make_trainer, runs, options) / "student" / "model.safetensors")
        assert any(not torch.equal(saved[key], alone[key]) for key in moved)  # the method, and not the labels alone
    run = json.loads((result.folder / "run.json").read_text())
    assert len(run["losses"]) == len(subject.losses)
    reloaded = create_model(str(result.folder / "student")).eval()
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reloaded(images), subject.deployable.eval()(images))


def test_pretraining_rows_learn_from_the_teacher_first():
    """Their labels come in by a schedule, at the same time as the loss goes out."""
    rows = {name: method for name, method in feature_methods.METHODS.items() if name.endswith(", then labels")}
    assert len(rows) >= 5 and all(isinstance(method.task_weight, Schedule) for method in rows.values())
