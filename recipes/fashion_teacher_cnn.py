"""The shipped CNN teacher: a small ResNet-D on all 60,000 Fashion-MNIST images.

Command   accelerate launch recipes/fashion_teacher_cnn.py --data fashion-mnist:FOLDER
          (FOLDER holds the four idx files, as the Debian package dataset-fashion-mnist has them)
Then      cp runs/fashion_teacher_cnn/student/* kdvit/pretrained/fashion_mnist_cnn/
Log       docs/logs/fashion_teacher_cnn.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdvit import Distiller, Student, Trainer, Training, create_model
from kdvit.data import open_data
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
        weight_decay: of AdamW.
        label_smoothing: softer targets make a better teacher's logits less peaked.
        seed: of everything that is random.
        smoke: a few images and steps, to see that it runs.
    """

    data: str = "fashion-mnist"
    output: str = "runs/fashion_teacher_cnn"
    epochs: int = 16
    batch_size: int = 256
    lr: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    seed: int = 0
    smoke: bool = False


def main(settings: Settings) -> None:
    data = open_data(settings.data)
    if settings.smoke:
        data = data.subset(64, 32)
    torch.manual_seed(settings.seed)
    model = create_model(
        "resnet18d", in_chans=1, num_classes=len(data.classes), channels=(48, 64, 96, 96), stem_width=16
    )
    student = Student(model, input_size=(1, 28, 28), mean=(0.286,), std=(0.353,), name="fashion_mnist_cnn")
    distiller = Distiller(None, student, losses=[])  # no teacher: plain training
    training = Training(
        epochs=1 if settings.smoke else settings.epochs,
        batch_size=min(settings.batch_size, len(data.train) // 2),
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        label_smoothing=settings.label_smoothing,
        seed=settings.seed,
    )
    result = Trainer(distiller, data, training, settings.output, title="cnn teacher").fit()
    print(f"top-1 {result.top1:.2f} % on {len(data.test)} test images")


if __name__ == "__main__":
    main(parse(Settings, __doc__))
