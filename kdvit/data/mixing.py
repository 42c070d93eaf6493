"""Mixup and CutMix whose draws are a function of (seed, epoch, the batch's samples)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdvit.data.randomness import check_seed, legacy_generator


class BatchMixer:
    """Mix each image of a batch with the one at the mirrored place, and the labels likewise.

    mixup:   image = lam * image + (1 - lam) * mirrored,    lam ~ Beta(mixup_alpha, mixup_alpha)
    CutMix:  a box of area (1 - lam) is taken from mirrored; lam ~ Beta(cutmix_alpha, cutmix_alpha), then corrected
             to the area left when the box is clipped at the border
    labels = lam * smoothed(labels) + (1 - lam) * smoothed(mirrored labels)

    Args:
        mixup_alpha, cutmix_alpha: 0 switches one off; DeiT: 0.8 and 1.0.
        num_classes: C.
        label_smoothing: in [0, 1); the true class gets 1 - s + s / C, the others s / C. DeiT: 0.1.
        seed: of the draws.
        probability: of mixing a batch at all.
        switch_probability: of CutMix where both are on.
    Inputs:
        images: (B, C, H, W) floating point; labels: (B,) class ids; sample_ids: (B,); epoch: int. Any B.
    Returns:
        (images, soft labels (B, C) float32); the inputs and the global generators are left alone.
    Raises:
        ValueError: an option is out of range; images, labels and sample_ids are not as above.
    Source:
        Zhang et al., mixup, ICLR 2018, https://arxiv.org/abs/1710.09412; Yun et al., CutMix, ICCV 2019,
        https://arxiv.org/abs/1905.04899. The same numbers as `timm.data.Mixup` (mode "batch") for the same generator;
        differs in: odd batches are allowed, nothing is done in place.
    Example:
        >>> mixer = BatchMixer(mixup_alpha=0.8, num_classes=2)
        >>> images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
        >>> mixer(images, labels, sample_ids=torch.tensor([5, 9]), epoch=0)[1].sum()
        tensor(2.)
    """

    def __init__(
        self,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        seed: int = 0,
        probability: float = 1.0,
        switch_probability: float = 0.5,
    ):
        rules = (
            ("mixup_alpha", mixup_alpha, mixup_alpha >= 0, ">= 0"),
            ("cutmix_alpha", cutmix_alpha, cutmix_alpha >= 0, ">= 0"),
            ("num_classes", num_classes, num_classes >= 2, ">= 2"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "in [0, 1)"),
            ("probability", probability, 0 <= probability <= 1, "in [0, 1]"),
            ("switch_probability", switch_probability, 0 <= switch_probability <= 1, "in [0, 1]"),
        )
        for name, value, holds, rule in rules:
            if not holds:
                raise ValueError(f"BatchMixer: {name} must be {rule}, got {value}; change it.")
        self.mixup_alpha, self.cutmix_alpha, self.num_classes = mixup_alpha, cutmix_alpha, num_classes
        self.label_smoothing, self.seed = label_smoothing, check_seed("BatchMixer", seed)
        self.probability, self.switch_probability = probability, switch_probability

    def __call__(self, images: Tensor, labels: Tensor, sample_ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        self._check(images, labels, sample_ids)
        generator = legacy_generator(self.seed, epoch, *sample_ids.tolist())
        mixed, lam = self._mix(images, generator)
        off_value = self.label_smoothing / self.num_classes
        soft = torch.full((len(labels), self.num_classes), off_value, device=labels.device)  # (B, C)
        soft.scatter_(1, labels[:, None], 1 - self.label_smoothing + off_value)
        return mixed, soft * lam + soft.flip(0) * (1 - lam)

    def _mix(self, images: Tensor, generator: np.random.RandomState) -> tuple[Tensor, float]:
        # The order of the draws is timm's, so that equal generators give equal batches.
        mixup, cutmix = self.mixup_alpha > 0, self.cutmix_alpha > 0
        if not (mixup or cutmix) or generator.rand() >= self.probability:
            return images, 1.0
        if mixup and cutmix:
            cutmix = generator.rand() < self.switch_probability
        alpha = self.cutmix_alpha if cutmix else self.mixup_alpha
        lam = float(generator.beta(alpha, alpha))
        if not cutmix:
            return images * lam + images.flip(0) * (1 - lam), lam
        height, width = images.shape[-2:]
        rows, columns = (_clipped_span(size, np.sqrt(1 - lam), generator) for size in (height, width))
        mixed = images.clone()
        mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
        box_area = (rows.stop - rows.start) * (columns.stop - columns.start)
        return mixed, 1 - box_area / (height * width)

    def _check(self, images: Tensor, labels: Tensor, sample_ids: Tensor) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"BatchMixer: images must be (B, C, H, W) of a floating-point type, got {tuple(images.shape)} of "
                f"{images.dtype}; normalise and stack them first."
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point() or sample_ids.shape != labels.shape:
            raise ValueError(
                f"BatchMixer: labels and sample_ids must be ({len(images)},) whole numbers, got {tuple(labels.shape)} "
                f"of {labels.dtype} and {tuple(sample_ids.shape)}; pass the loader's batch as it is."
            )


def _clipped_span(size: int, ratio: float, generator: np.random.RandomState) -> slice:
    """A span of size * ratio around a random centre, clipped to [0, size]."""
    length, centre = int(size * ratio), generator.randint(0, size)
    return slice(max(0, centre - length // 2), min(size, centre + (length + 1) // 2))
