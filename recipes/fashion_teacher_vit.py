"""The shipped ViT teacher: a small plain ViT on all 60,000 Fashion-MNIST images, taught by the shipped CNN.

Command   accelerate launch recipes/fashion_teacher_vit.py --data fashion-mnist:FOLDER
          (FOLDER holds the four idx files, as the Debian package dataset-fashion-mnist has them)
Then      cp runs/fashion_teacher_vit/3/student/* kdvit/pretrained/fashion_mnist_vit/
Log       docs/logs/fashion_teacher_vit_1.jsonl, _2 and _3
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdvit import Distiller, Student, Teacher, Training, create_model
from kdvit.data import FASHION_MNIST_TRANSFORM, open_data
from kdvit.losses import KD
from kdvit.training import Stage, run_stages, transform_for
from kdvit.training.arguments import parse


@dataclass(frozen=True)
class Settings:
    """Settings of the recipe.

    Args:
        data: `kdvit list data`.
        output: run folder.
        epochs: passes over the images.
        lr: peak learning rate of AdamW.
        crop_epochs: passes of a second cosine, on shifted crops.
        crop_lr: its peak learning rate.
        last_epochs: passes of a third cosine, on whole images.
        last_lr: its peak learning rate.
        batch_size: images of one process in one step.
        weight_decay: of AdamW.
        temperature: of the KD loss.
        kd_weight: weight of the KD loss beside the cross-entropy.
        resume: go on in the run folder, in the middle of whichever part was stopped.
        seed: of everything that is random.
        smoke: a few images and steps, to see that it runs.
    """

    data: str = "fashion-mnist"
    output: str = "runs/fashion_teacher_vit"
    epochs: int = 12
    lr: float = 2e-3
    crop_epochs: int = 8
    crop_lr: float = 1e-3
    last_epochs: int = 5
    last_lr: float = 5e-4
    batch_size: int = 256
    weight_decay: float = 0.05
    temperature: float = 4.0
    kd_weight: float = 1.0
    resume: bool = False
    seed: int = 0
    smoke: bool = False


def main(settings: Settings) -> None:
    data = open_data(settings.data)
    if settings.smoke:
        data = data.subset(64, 32)
    teacher = Teacher("fashion_mnist_cnn")
    torch.manual_seed(settings.seed)
    model = create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=7,
        in_chans=1,
        num_classes=len(data.classes),
        embed_dim=96,
        depth=6,
        num_heads=4,
        weight_init="moco",  # timm's default is made for large models; this one learns faster at this size
    )
    student = Student(
        model, mean=FASHION_MNIST_TRANSFORM.mean, std=FASHION_MNIST_TRANSFORM.std, name="fashion_mnist_vit"
    )
    # Whole images first, from which a ViT with patches of 7 pixels learns fast; then a warm restart on shifted crops,
    # which it cannot learn by heart; then whole images again, as the test images are.
    crops = transform_for(student)
    parts = (
        ("whole", settings.epochs, settings.lr, FASHION_MNIST_TRANSFORM),
        ("crops", settings.crop_epochs, settings.crop_lr, crops),
        ("whole-again", settings.last_epochs, settings.last_lr, FASHION_MNIST_TRANSFORM),
    )
    stages = [
        Stage(
            name,
            lambda: Distiller(teacher, student, losses=[(settings.kd_weight, KD(settings.temperature))]),
            Training(
                epochs=1 if settings.smoke else epochs,
                batch_size=min(settings.batch_size, len(data.train) // 2),
                lr=lr,
                weight_decay=settings.weight_decay,
                clip_norm=1.0,
                seed=settings.seed + number,  # other orders and flips in each
            ),
            transform,
        )
        for number, (name, epochs, lr, transform) in enumerate(parts)
    ]
    result = run_stages(stages, data, settings.output, resume=settings.resume)[-1]
    print(f"top-1 {result.top1:.2f} % on {len(data.test)} test images")


if __name__ == "__main__":
    main(parse(Settings, __doc__))
