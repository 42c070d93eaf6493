"""Two processes train together: what they evaluate is what is saved."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kdvit import create_model
from kdvit.data import ImageData, TransformSettings, make_loader
from tests.processes import run_two
from tests.training.conftest import MEAN, STD


@pytest.mark.parametrize("name", ["plain", "ema"])
def test_the_accuracy_is_that_of_the_saved_student(name, results, tiny_data: ImageData):
    """Statistics of BatchNorm differ from process to process: those of the first are saved."""
    folder, (first, second) = results
    assert first == second
    student = create_model(str(folder / name / "student")).eval()
    transform = TransformSettings(
        image_size=28, num_channels=1, crop_padding=2, interpolation="bilinear", mean=MEAN, std=STD
    )
    loader = make_loader(tiny_data.test, transform, batch_size=8, train=False)
    with torch.no_grad():
        losses = [F.cross_entropy(student(batch["image"]), batch["label"], reduction="none") for batch in loader]
    assert torch.cat(losses).mean().item() == pytest.approx(first[name]["loss"], rel=1e-5)
    assert first[name]["num_images"] == len(tiny_data.test)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("two_trainers")
    return folder, run_two(["-m", "tests.training.trainer_worker"], folder)
