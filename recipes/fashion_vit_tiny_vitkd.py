"""ViTKD: a tiny ViT mimics the first blocks of the shipped ViT and generates its last tokens.

Paper       Yang et al., ViTKD: Feature-based Knowledge Distillation for Vision Transformers, CVPR workshops 2024
Command     accelerate launch recipes/fashion_vit_tiny_vitkd.py
Differences another data set and models; the weights alpha and beta are ten times the published ones, because the
            loss is a sum over tokens and channels, and there are 16 tokens of width 96 here, not 196 of 384
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdvit import Distiller, Student, Teacher, Trainer, Training, create_model
from kdvit.data import FASHION_MNIST_TRANSFORM, open_data
from kdvit.losses import ViTKD
from kdvit.training.arguments import parse


@dataclass(frozen=True)
class Settings:
    """Settings of the recipe.

    Args:
        data: `kdvit list data`.
        output: run folder.
        epochs: passes over the images.
        batch_size: images of one process in one step.
        lr: peak learning rate of AdamW.
        alpha: weight of the mimicking term.
        beta: weight of the generation term.
        mask_ratio: share of the tokens that are generated.
        resume: go on with the run in the run folder.
        seed: of everything that is random.
        smoke: a few images and steps, to see that it runs.
    """

    data: str = "fashion-mnist-sample"
    output: str = "runs/fashion_vit_tiny_vitkd"
    epochs: int = 20
    batch_size: int = 128
    lr: float = 2e-3
    alpha: float = 3e-4
    beta: float = 3e-5
    mask_ratio: float = 0.5
    resume: bool = False
    seed: int = 0
    smoke: bool = False


def main(settings: Settings) -> None:
    data = open_data(settings.data)
    if settings.smoke:
        data = data.subset(64, 32)
    torch.manual_seed(settings.seed)
    # Patches as the teacher's: ViTKD compares token by token, so both grids must be 4x4.
    model = create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=7,
        in_chans=1,
        num_classes=len(data.classes),
        embed_dim=64,
        depth=4,
        num_heads=4,
        weight_init="moco",  # timm's default is made for large models; this one learns faster at this size
    )
    student = Student(model, mean=FASHION_MNIST_TRANSFORM.mean, std=FASHION_MNIST_TRANSFORM.std, name="tiny ViT")
    loss = ViTKD(alpha=settings.alpha, beta=settings.beta, mask_ratio=settings.mask_ratio)
    distiller = Distiller(Teacher("fashion_mnist_vit"), student, losses=[loss])
    training = Training(
        epochs=1 if settings.smoke else settings.epochs,
        batch_size=32 if settings.smoke else settings.batch_size,
        lr=settings.lr,
        clip_norm=5.0,
        seed=settings.seed,
    )
    Trainer(
        distiller,
        data,
        training,
        settings.output,
        transform=FASHION_MNIST_TRANSFORM,
        resume=settings.resume,
        title="vitkd",
    ).fit()


if __name__ == "__main__":
    main(parse(Settings, __doc__))
