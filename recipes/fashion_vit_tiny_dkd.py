"""DKD: a tiny ViT learns from the shipped CNN on the embedded sample of Fashion-MNIST.

Paper       Zhao et al., Decoupled Knowledge Distillation, CVPR 2022
Command     accelerate launch recipes/fashion_vit_tiny_dkd.py
Differences another data set, a ViT student; beta and temperature as published for ViT students (OFA-KD), no warm-up of
            the loss
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdvit import Distiller, Student, Teacher, Trainer, Training, create_model
from kdvit.data import FASHION_MNIST_TRANSFORM, open_data
from kdvit.losses import DKD
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
        alpha: weight of the target term.
        beta: weight of the non-target term.
        temperature: of both distributions.
        resume: go on with the run in the run folder.
        seed: of everything that is random.
        smoke: a few images and steps, to see that it runs.
    """

    data: str = "fashion-mnist-sample"
    output: str = "runs/fashion_vit_tiny_dkd"
    epochs: int = 20
    batch_size: int = 128
    lr: float = 2e-3
    alpha: float = 1.0
    beta: float = 2.0
    temperature: float = 4.0
    resume: bool = False
    seed: int = 0
    smoke: bool = False


def main(settings: Settings) -> None:
    data = open_data(settings.data)
    if settings.smoke:
        data = data.subset(64, 32)
    torch.manual_seed(settings.seed)
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
    loss = DKD(alpha=settings.alpha, beta=settings.beta, temperature=settings.temperature)
    distiller = Distiller(Teacher("fashion_mnist_cnn"), student, losses=[loss])
    training = Training(
        epochs=1 if settings.smoke else settings.epochs,
        batch_size=32 if settings.smoke else settings.batch_size,
        lr=settings.lr,
        seed=settings.seed,
    )
    Trainer(
        distiller,
        data,
        training,
        settings.output,
        transform=FASHION_MNIST_TRANSFORM,
        resume=settings.resume,
        title="dkd",
    ).fit()


if __name__ == "__main__":
    main(parse(Settings, __doc__))
