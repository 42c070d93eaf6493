import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported

import numpy as np
import pytest
from PIL import Image

from kdvit.data import ImageSplit
from kdvit.data.splits import ArrayImages


def save_image(path, value=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 7)).save(path)
    return path


@pytest.fixture
def make_folder(tmp_path):
    """make_folder({"train/cat": 3, ...}) writes that many PNG images into each folder."""

    def make(counts, root="images"):
        for folder, count in counts.items():
            (tmp_path / root / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                save_image(tmp_path / root / folder / f"{number:02d}.png", value=number)
        return tmp_path / root

    return make


@pytest.fixture
def noise_split():
    """40 grey images of noise, 4 classes."""
    pixels = np.random.RandomState(0).randint(0, 256, (40, 28, 28), dtype=np.uint8)
    return ImageSplit(ArrayImages(pixels, "noise"), np.arange(40) % 4, ("a", "b", "c", "d"), "noise")


@pytest.fixture
def global_draws():
    """A function that draws from the three global generators; equal results mean that nobody touched them."""
    import random

    import torch

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    def seed():
        random.seed(5), np.random.seed(5), torch.manual_seed(5)

    seed()
    expected = draw()
    seed()
    return draw, expected
