"""From a PIL image to the tensor that a model sees: timm's transforms, chosen by one small dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import torch

_MODES = {1: "L", 3: "RGB"}


@dataclasses.dataclass(frozen=True)
class TransformSettings:
    """What happens to an image on its way to the model; `timm.data.create_transform` does it.

    Training: crop, flip, colour (auto-augment or jitter), normalise, erase. Evaluation: resize, centre crop, normalise.

    Args:
        image_size: height and width of the result, in pixels.
        num_channels: 1 (grey) or 3 (RGB); images are converted.
        mean, std: one value a channel, of pixels in [0, 1].
        crop_padding: 0 for a random resized crop (ImageNet); else pad by so many pixels and crop (2 to 4 for images of
            28 or 32 pixels).
        crop_scale, crop_aspect: area and aspect ratio of the random resized crop.
        flip_probability: of a horizontal flip.
        color_jitter: strength for brightness, contrast and saturation; 0 for none. Not used together with auto_augment.
        auto_augment: timm's string, such as "rand-m9-mstd0.5-inc1", "original", "augmix-m5-w4"; None for none.
        erasing_probability, erasing_mode: random erasing with "const", "rand" or "pixel" values.
        crop_pct: evaluation resizes to image_size / crop_pct before the centre crop.
        interpolation: "bilinear", "bicubic", or "random" (training only).

    Example:
        >>> from PIL import Image
        >>> settings = TransformSettings(image_size=28, num_channels=1, mean=(0.5,), std=(0.5,), crop_padding=2)
        >>> settings.evaluation()(Image.new("L", (28, 28), 255)).unique()
        tensor([1.])
    """

    image_size: int = 224
    num_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_padding: int = 0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    erasing_probability: float = 0.0
    erasing_mode: str = "const"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        num_channels, low, high = self.num_channels, *self.crop_scale
        has_one_value_a_channel = len(self.mean) == len(self.std) == num_channels
        rules = (
            ("image_size", self.image_size >= 1, ">= 1"),
            ("num_channels", num_channels in _MODES, "1 or 3"),
            ("mean", has_one_value_a_channel, f"one value for each of {num_channels} channels, as std"),
            ("std", all(value > 0 for value in self.std), "> 0"),
            ("crop_padding", self.crop_padding >= 0, ">= 0"),
            ("crop_scale", 0 < low <= high <= 1, "(low, high) with 0 < low <= high <= 1"),
            ("crop_aspect", 0 < self.crop_aspect[0] <= self.crop_aspect[1], "(low, high) with 0 < low <= high"),
            ("flip_probability", 0 <= self.flip_probability <= 1, "in [0, 1]"),
            ("color_jitter", self.color_jitter >= 0, ">= 0"),
            ("color_jitter", not (self.color_jitter and self.auto_augment), "0 where auto_augment is set"),
            ("erasing_probability", 0 <= self.erasing_probability <= 1, "in [0, 1]"),
            ("erasing_mode", self.erasing_mode in ("const", "rand", "pixel"), "const, rand or pixel"),
            ("crop_pct", 0 < self.crop_pct <= 1, "in (0, 1]"),
            ("interpolation", self.interpolation in ("nearest", "bilinear", "bicubic", "lanczos", "random"),
             "nearest, bilinear, bicubic, lanczos or random"),
        )  # fmt: skip
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"TransformSettings: {name} must be {rule}, got {getattr(self, name)!r}; change it.")
        if num_channels == 1 and (self.auto_augment or "").startswith("augmix"):
            raise ValueError(
                f"TransformSettings: auto_augment must not be AugMix for 1 channel, got {self.auto_augment!r}; "
                f"use RandAugment, or num_channels=3."
            )

    @classmethod
    def for_model(cls, model: torch.nn.Module, **changes: Any) -> TransformSettings:
        """The size, channels, mean, std, crop and interpolation that a timm model was trained with, with `changes`."""
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(model)
        num_channels, image_size, _ = config["input_size"]
        found = {name: config[name] for name in ("mean", "std", "crop_pct", "interpolation")}
        return cls(**{"image_size": image_size, "num_channels": num_channels, **found, **changes})

    def training(self) -> Callable[[Image.Image], torch.Tensor]:
        """The random transform for training: PIL image -> (num_channels, image_size, image_size) float32."""
        from timm.data import create_transform
        from timm.data.transforms import str_to_interp_mode
        from torchvision import transforms

        try:
            pipeline = create_transform(
                self.image_size,
                is_training=True,
                scale=self.crop_scale,
                ratio=self.crop_aspect,
                hflip=self.flip_probability,
                color_jitter=self.color_jitter or None,
                auto_augment=self.auto_augment,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
                re_prob=self.erasing_probability,
                re_mode=self.erasing_mode,
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:  # how timm refuses an auto_augment string
            raise ValueError(
                f"TransformSettings: auto_augment must be a string that timm knows (rand-..., original, v0, 3a, "
                f"augmix-...), got {self.auto_augment!r}; try 'rand-m9-mstd0.5-inc1'."
            ) from error
        steps = pipeline.transforms
        if self.crop_padding:  # timm has no pad-and-crop: it takes the place of the random resized crop, its first step
            steps = [
                transforms.Resize(self.image_size, str_to_interp_mode(self._fixed_interpolation)),
                transforms.RandomCrop(self.image_size, padding=self.crop_padding),
                *steps[1:],
            ]
        return transforms.Compose([_ConvertMode(_MODES[self.num_channels]), *steps])

    def evaluation(self) -> Callable[[Image.Image], torch.Tensor]:
        """The fixed transform for evaluation; the same shape and type as in training."""
        from timm.data import create_transform
        from torchvision import transforms

        pipeline = create_transform(
            self.image_size,
            is_training=False,
            interpolation=self._fixed_interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=1.0 if self.crop_padding else self.crop_pct,
        )
        return transforms.Compose([_ConvertMode(_MODES[self.num_channels]), *pipeline.transforms])

    @property
    def _fixed_interpolation(self) -> str:
        return "bicubic" if self.interpolation == "random" else self.interpolation


class _ConvertMode:
    """To grey or RGB; a class, since a lambda would not travel to worker processes."""

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert(self.mode)

    def __repr__(self) -> str:
        return f"ConvertMode({self.mode})"


#: Whole images, flipped or not: for a ViT with patches of 7 pixels, shifted crops cost more than they give.
FASHION_MNIST_TRANSFORM = TransformSettings(
    image_size=28,
    num_channels=1,
    mean=(0.286,),
    std=(0.353,),
    crop_scale=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    crop_pct=1.0,
    interpolation="bilinear",
)
