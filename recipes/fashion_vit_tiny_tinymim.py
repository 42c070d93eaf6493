"""TinyMIM: a tiny ViT learns the token relations of the shipped ViT without labels, and is then fine-tuned.

Paper       Ren et al., TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models, CVPR 2023
Command     accelerate launch recipes/fashion_vit_tiny_tinymim.py
Differences another data set; the teacher is a supervised ViT, since no masked-image-modelling one is shipped; the
            heads of both are equal, so the student's last block is as the others; one view for teacher and student
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdvit import Distiller, Student, Teacher, Training, create_model
from kdvit.data import FASHION_MNIST_TRANSFORM, open_data
from kdvit.losses import TinyMIM
from kdvit.training import Stage, run_stages
from kdvit.training.arguments import parse


@dataclass(frozen=True)
class Settings:
    """Settings of the recipe.

    Args:
        data: `kdvit list data`.
        output: run folder; pretraining/ and finetuning/ are made in it.
        pretraining_epochs: passes over the images without labels.
        finetuning_epochs: passes over the images with labels.
        batch_size: images of one process in one step.
        pretraining_lr: peak learning rate of AdamW.
        finetuning_lr: peak learning rate of AdamW.
        teacher_block: block of the teacher whose relations are learnt; the blocks behind it do not run.
        resume: go on in the run folder, in the middle of whichever part was stopped.
        seed: of everything that is random.
        smoke: a few images and steps, to see that it runs.
    """

    data: str = "fashion-mnist-sample"
    output: str = "runs/fashion_vit_tiny_tinymim"
    pretraining_epochs: int = 6
    finetuning_epochs: int = 20
    batch_size: int = 128
    pretraining_lr: float = 2e-3
    finetuning_lr: float = 2e-3
    teacher_block: int = -1
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
    batch_size = 32 if settings.smoke else settings.batch_size

    relations = TinyMIM(student_block=-1, teacher_block=settings.teacher_block)
    pretraining = Training(
        epochs=1 if settings.smoke else settings.pretraining_epochs,
        batch_size=batch_size,
        lr=settings.pretraining_lr,
        betas=(0.9, 0.95),
        seed=settings.seed,
    )
    finetuning = Training(
        epochs=1 if settings.smoke else settings.finetuning_epochs,
        batch_size=batch_size,
        lr=settings.finetuning_lr,
        seed=settings.seed,
    )
    run_stages(
        [
            Stage(
                "pretraining",
                lambda: Distiller(Teacher("fashion_mnist_vit"), student, losses=[relations], task_loss=None),
                pretraining,
                FASHION_MNIST_TRANSFORM,
            ),
            Stage("finetuning", lambda: Distiller(None, student, losses=[]), finetuning, FASHION_MNIST_TRANSFORM),
        ],
        data,
        settings.output,
        resume=settings.resume,
    )


if __name__ == "__main__":
    main(parse(Settings, __doc__))
