"""Two processes train together: what they evaluate is what is saved."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kdvit import create_model
from kdvit.data import ImageData, TransformSettings, make_loader
from tests.processes import run_two
from tests.training.conftest import MEAN, STD, newest_state
from tests.training.test_reproducibility import differences


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


def test_one_process_that_is_asked_stops_both_and_the_run_ends_as_it_would_have(results):
    folder, (first, second) = results
    assert (
        first["stops"]
        == second["stops"]
        == [f"stopped at step 6 of 8, and its state is saved in '{folder / 'stopped'}'; resume to go on."]
    )
    assert first["stopped"] == first["ema"]
    for file in ("student/model.safetensors", "best/model.safetensors", "metrics.jsonl"):
        assert (folder / "stopped" / file).read_bytes() == (folder / "ema" / file).read_bytes(), file
    ours, theirs = (newest_state(folder / name) for name in ("stopped", "ema"))
    assert differences(ours, theirs) == []


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("two_trainers")
    return folder, run_two(["-m", "tests.training.trainer_worker"], folder)
