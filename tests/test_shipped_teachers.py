"""The two teachers inside the package: there, small, good enough, and the same through timm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import kdvit
from kdvit import Student, Teacher
from kdvit.data import FASHION_MNIST_TRANSFORM, make_loader, open_data
from kdvit.models import SHIPPED

FOLDER = Path(kdvit.__file__).parent / "pretrained"
#: Least top-1 accuracy on the 2,000 test images, in percent.
ACCURACY = {"fashion_mnist_cnn": 91.0, "fashion_mnist_vit": 89.0}
MEAN, STD = (0.286,), (0.353,)


def test_what_is_shipped_is_what_is_listed():
    assert set(SHIPPED) == set(ACCURACY) == {path.name for path in FOLDER.iterdir() if path.is_dir()}


def test_together_they_are_at_most_8_mb():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sorted({path.name for path in files}) == ["config.json", "model.safetensors"] and len(files) == 4
    assert sum(path.stat().st_size for path in files) <= 8e6


@pytest.mark.parametrize("name", ACCURACY)
def test_a_teacher_loads_by_name_and_through_timm(name):
    model = kdvit.create_model(name).eval()
    same = timm.create_model(f"local-dir:{FOLDER / name}", pretrained=True).eval()
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(model(images), same(images))
    assert model(images).shape == (2, 10)


@pytest.mark.parametrize("name", ACCURACY)
def test_normalisation_and_class_names_are_recorded(name):
    config = json.loads((FOLDER / name / "config.json").read_text())
    assert tuple(config["label_names"]) == open_data("fashion-mnist-sample").classes
    assert (tuple(config["pretrained_cfg"]["mean"]), tuple(config["pretrained_cfg"]["std"])) == (MEAN, STD)
    assert Teacher(name).normalisation == Student(name).normalisation == (MEAN, STD)
    assert Teacher(name).name == name


@pytest.mark.parametrize(("name", "least"), ACCURACY.items())
def test_a_teacher_knows_the_test_images(name, least):
    data = open_data("fashion-mnist-sample")
    assert len(data.test) == 2000
    assert accuracy(kdvit.create_model(name).eval(), data.test) >= least


@torch.no_grad()
def accuracy(model: nn.Module, split) -> float:
    assert (FASHION_MNIST_TRANSFORM.mean, FASHION_MNIST_TRANSFORM.std) == (MEAN, STD)
    loader = make_loader(split, FASHION_MNIST_TRANSFORM, batch_size=250, train=False)
    right = sum(int((model(batch["image"]).argmax(1) == batch["label"]).sum()) for batch in loader)
    return 100 * right / len(split)
