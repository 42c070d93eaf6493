"""``kdvit quickstart``: the same small ViT trained alone and distilled, on images and a teacher inside the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kdvit.cli.parser import Parser
from kdvit.cost import human, num_macs, num_parameters
from kdvit.data import FASHION_MNIST_TRANSFORM, ImageData, open_data
from kdvit.distiller import Distiller
from kdvit.losses import KD
from kdvit.models import create_model
from kdvit.training import Trainer, Training
from kdvit.wrappers import Student, Teacher

TEACHER = "fashion_mnist_cnn"
#: timm's default initialisation is made for large models and long runs; moco's learns faster at this size.
STUDENT = {
    "img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 3, "weight_init": "moco",
}  # fmt: skip
TRAINING = Training(
    epochs=18, batch_size=128, lr=1e-3, weight_decay=0.05, warmup_epochs=1.0, evaluate_epochs=3, gradient_share_steps=50
)
#: Weights as they are usual for small images: the teacher's word counts more than the label's.
TASK_WEIGHT, KD_WEIGHT, TEMPERATURE = 0.1, 0.9, 4.0


@dataclass(frozen=True)
class Row:
    """One line of the table: what was trained, how well it does, what it costs."""

    name: str
    top1: float
    num_parameters: int
    num_macs: int
    seconds: float | None


def main(argv: Sequence[str]) -> None:
    parser = Parser("kdvit quickstart", description=__doc__)
    parser.add_argument("--output", default="runs/quickstart", help="run folder [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of both students [%(default)s]")
    parser.add_argument("--epochs", type=int, default=TRAINING.epochs, help="of both students [%(default)s]")
    arguments = parser.parse_args(argv)
    rows = compare(arguments.output, seed=arguments.seed, epochs=arguments.epochs)
    show(rows, arguments.output)


def compare(
    output: str | Path,
    *,
    seed: int = 0,
    epochs: int = TRAINING.epochs,
    data: ImageData | None = None,
    quiet: bool = False,
) -> list[Row]:
    """Train the student alone and distilled at equal epochs and seed; what an earlier call did is not done again.

    Returns:
        Rows for the teacher, the student trained alone, and the student distilled. Accuracies are those of the last
        epoch, not of the best one.
    """
    data = data or open_data("fashion-mnist-sample")
    settings = Training(**{**vars(TRAINING), "epochs": epochs, "seed": seed})
    rows: list[Row] = []
    for name in ("alone", "distilled"):
        torch.manual_seed(seed)
        model = create_model("vit_tiny_patch16_224", num_classes=len(data.classes), **STUDENT)
        student = Student(model, mean=FASHION_MNIST_TRANSFORM.mean, std=FASHION_MNIST_TRANSFORM.std, name="small ViT")
        if name == "alone":
            teacher, distiller = None, Distiller(None, student, losses=[])
        else:
            teacher = Teacher(TEACHER)
            distiller = Distiller(teacher, student, [(KD_WEIGHT, KD(TEMPERATURE))], task_weight=TASK_WEIGHT)
        folder = Path(output) / name
        trainer = Trainer(
            distiller,
            data,
            settings,
            folder,
            transform=FASHION_MNIST_TRANSFORM,
            title=f"{name:<9}",
            resume=True,
            quiet=quiet,
        )
        result = trainer.fit()
        cost = num_parameters(model), num_macs(model, student.input_size)
        rows.append(Row(f"student, {name}", result.top1, *cost, result.seconds))
        if teacher is not None:
            cost = num_parameters(teacher.model), num_macs(teacher.model, teacher.input_size)
            rows.insert(0, Row("teacher", result.teacher_top1, *cost, None))
    return rows


def show(rows: Sequence[Row], output: str | Path) -> None:
    """Print the table, and where to go next."""
    console = Console()
    table = Table("", "top-1 (test)", "parameters", "MACs", "training")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        seconds = f"{row.seconds:.0f} s" if row.seconds is not None else ""
        accuracy = f"{row.top1:.2f} %"
        table.add_row(row.name, accuracy, human(row.num_parameters), human(row.num_macs), seconds)
    console.print(table)
    gain = rows[2].top1 - rows[1].top1
    console.print(f"Distillation changed the student's accuracy by {gain:+.2f} points at equal epochs and seed.")
    console.print(f"The distilled student is in {output}/distilled/student; load it with", highlight=False)
    console.print(f'  timm.create_model("local-dir:{output}/distilled/student", pretrained=True)', highlight=False)
    console.print("Look at both runs in a browser:", highlight=False)
    console.print(f"  kdvit report {output}/distilled --baseline {output}/alone", highlight=False)
