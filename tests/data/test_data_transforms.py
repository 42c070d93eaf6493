import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from kdvit.data import FASHION_MNIST_TRANSFORM, ReplayableDataset, TransformSettings

GREY = dict(image_size=28, num_channels=1, mean=(0.286,), std=(0.353,))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_any_mode_becomes_the_channels_asked_for(mode, num_channels):
    settings = TransformSettings(16, num_channels, (0.5,) * num_channels, (0.5,) * num_channels)
    image = Image.new("RGB", (40, 20), (200, 100, 50)).convert(mode)
    for transform in (settings.training(), settings.evaluation()):
        tensor = transform(image)
        assert tensor.shape == (num_channels, 16, 16) and tensor.dtype == torch.float32


def test_evaluation_resizes_crops_and_normalises():
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:6, 2:6] = 255
    settings = TransformSettings(4, 1, (0.5,), (0.25,), crop_pct=0.5)
    assert settings.evaluation()(Image.fromarray(pixels)).tolist() == [[[2.0] * 4] * 4]  # (1 - 0.5) / 0.25


def test_padded_crop_moves_by_up_to_the_padding_and_flips():
    pixels = np.zeros((28, 28), np.uint8)
    pixels[14, 10] = 255
    transform = TransformSettings(**{**GREY, "mean": (0.0,), "std": (1.0,)}, crop_padding=2).training()
    torch.manual_seed(0)
    places = {tuple(transform(Image.fromarray(pixels))[0].nonzero()[0].tolist()) for _ in range(600)}
    rows, columns = range(12, 17), [*range(8, 13), *range(15, 20)]  # column 10 flips to 17
    assert places == {(row, column) for row in rows for column in columns}


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"crop_padding": 3},
        {"crop_scale": (0.5, 1.0), "crop_aspect": (1.0, 1.0)},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"auto_augment": "original"},
        {"auto_augment": "3a"},
        {"color_jitter": 0.4},
        {"erasing_probability": 1.0, "erasing_mode": "pixel"},
        {"flip_probability": 0.0, "interpolation": "random"},
    ],
    ids=str,
)
def test_every_option_works_changes_the_image_and_replays(noise_split, num_channels, changes):
    channels = dict(num_channels=num_channels, mean=(0.3,) * num_channels, std=(0.4,) * num_channels)
    common = dict(image_size=28, **channels, crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    keys = [(epoch, index) for epoch in range(2) for index in range(20)]
    pixels, again, base = (
        torch.stack([row["image"] for row in ReplayableDataset(noise_split, transform).__getitems__(keys)])
        for transform in (
            *(TransformSettings(**{**common, **changes}).training() for _ in range(2)),
            TransformSettings(**common).training(),
        )
    )
    assert torch.equal(pixels, again) and pixels.isfinite().all()
    assert not torch.equal(pixels, base)


def test_augmix_on_rgb():
    transform = TransformSettings(16, auto_augment="augmix-m5-w4").training()
    assert transform(Image.new("RGB", (20, 20), (9, 99, 199))).shape == (3, 16, 16)


def test_transforms_travel_to_worker_processes():
    transform = pickle.loads(pickle.dumps(FASHION_MNIST_TRANSFORM.training()))
    assert transform(Image.new("L", (28, 28))).shape == (1, 28, 28)


def test_for_model_takes_what_the_model_was_trained_with():
    import timm

    model = timm.create_model("test_vit", pretrained=False)
    settings = TransformSettings.for_model(model, crop_padding=4)
    assert (settings.image_size, settings.num_channels, settings.crop_padding) == (160, 3, 4)
    assert settings.mean == model.default_cfg["mean"]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"image_size": 0}, "image_size must be >= 1, got 0"),
        ({"num_channels": 2}, "num_channels must be 1 or 3, got 2"),
        ({"num_channels": 1}, "mean must be one value for each of 1 channels, as std, got"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be > 0, got"),
        ({"crop_padding": -1}, "crop_padding must be >= 0, got -1"),
        ({"crop_scale": (0.5, 0.1)}, r"crop_scale must be \(low, high\) with 0 < low <= high <= 1, got \(0.5, 0.1\)"),
        ({"crop_aspect": (0.0, 1.0)}, r"crop_aspect must be \(low, high\)"),
        ({"flip_probability": 1.5}, r"flip_probability must be in \[0, 1\], got 1.5"),
        ({"color_jitter": -0.1}, "color_jitter must be >= 0"),
        ({"color_jitter": 0.4, "auto_augment": "rand-m9"}, "color_jitter must be 0 where auto_augment is set, got 0.4"),
        ({"erasing_probability": 2}, r"erasing_probability must be in \[0, 1\], got 2"),
        ({"erasing_mode": "black"}, "erasing_mode must be const, rand or pixel, got 'black'"),
        ({"crop_pct": 0}, r"crop_pct must be in \(0, 1\], got 0"),
        ({"interpolation": "cubic"}, "interpolation must be nearest, .* or random, got 'cubic'"),
        ({"auto_augment": "randm9"}, "auto_augment must be a string that timm knows .*, got 'randm9'; try 'rand-m9"),
        ({"auto_augment": "rand-x9"}, "auto_augment must be a string that timm knows .*, got 'rand-x9'"),
        ({**GREY, "auto_augment": "augmix-m5"}, "auto_augment must not be AugMix for 1 channel, got 'augmix-m5'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_settings(changes, sentence):
    with pytest.raises(ValueError, match=f"^TransformSettings: {sentence}"):
        TransformSettings(**changes).training()
