"""One distillation job for several tools: the models, the batches, and a step of each tool.

`peers.py` measures them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit import Distiller, Student, Teacher, Trainer, Training, create_model
from kdvit.cli.quickstart import KD_WEIGHT, STUDENT, TASK_WEIGHT, TEMPERATURE
from kdvit.data import FASHION_MNIST_TRANSFORM, ImageData, TransformSettings, make_loader, open_data
from kdvit.losses import KD

LR = 1e-4

#: A step on a batch that is loaded: returns the loss, before the step.
BatchStep = Callable[[Tensor, Tensor], Tensor]
#: What a tool is here: given student and teacher, its step and its optimizer.
Tool = Callable[[nn.Module, nn.Module], tuple[BatchStep, torch.optim.Optimizer]]
#: Called between two steps, after those of a round, with the number of the round.
Between = Callable[[int], None]


@dataclass(frozen=True)
class Size:
    """One pair of models and its data.

    Args:
        text: for the page.
        models: makes (student, teacher) with their weights; always the same ones.
        transform: of the embedded images.
        batch_size: images of a step.
    """

    text: str
    models: Callable[[], tuple[nn.Module, nn.Module]]
    transform: TransformSettings
    batch_size: int


def small_models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    # timm's task reads the normalisation from both models, so they must state the same.
    stated = {"mean": FASHION_MNIST_TRANSFORM.mean, "std": FASHION_MNIST_TRANSFORM.std}
    student = create_model("vit_tiny_patch16_224", num_classes=10, pretrained_cfg_overlay=stated, **STUDENT)
    return student, create_model("fashion_mnist_vit")


def deit_models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student, teacher = (create_model(f"deit_{size}_patch16_224", num_classes=10) for size in ("tiny", "small"))
    return student, teacher


SIZES = {
    "small": Size(
        "28x28 grey images, the quickstart's student (4 blocks of width 96) and the shipped ViT (6 blocks of width 96)",
        small_models, FASHION_MNIST_TRANSFORM, 128,
    ),
    "deit": Size(
        "224x224 RGB images, deit_tiny and deit_small with random weights and 10 classes",
        deit_models, TransformSettings(), 8,
    ),
}  # fmt: skip


# The tools


def reference_loss(student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """TASK_WEIGHT * cross-entropy + KD_WEIGHT * T^2 * KL(teacher || student), mean over the batch."""
    with torch.no_grad():
        target = F.log_softmax(teacher(images) / TEMPERATURE, dim=1)
    logits = student(images)
    kd = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=1), target, reduction="batchmean", log_target=True)
    return TASK_WEIGHT * F.cross_entropy(logits, labels) + KD_WEIGHT * TEMPERATURE**2 * kd


def by_hand(student: nn.Module, teacher: nn.Module) -> tuple[BatchStep, torch.optim.Optimizer]:
    student.train()
    teacher.eval()
    return own_loop(student, lambda images, labels: reference_loss(student, teacher, images, labels))


def own_loop(trained: nn.Module, loss_of: BatchStep) -> tuple[BatchStep, torch.optim.Optimizer]:
    """Everybody's loop, where the tool brings only the loss."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LR, weight_decay=0.0)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, optimizer


def make_distiller(student: nn.Module, teacher: nn.Module) -> Distiller:
    return Distiller(Teacher(teacher), Student(student), [(KD_WEIGHT, KD(TEMPERATURE))], task_weight=TASK_WEIGHT)


def kdvit_loop(student: nn.Module, teacher: nn.Module) -> tuple[BatchStep, torch.optim.Optimizer]:
    distiller = make_distiller(student, teacher).train()
    return own_loop(distiller, lambda images, labels: distiller(images, labels).loss)


def torchdistill_box(student: nn.Module, teacher: nn.Module) -> tuple[BatchStep, torch.optim.Optimizer]:
    from torchdistill.core.distillation import get_distillation_box

    logits = {f"{side}_module_{what}": value for side in ("student", "teacher")
              for what, value in (("path", "."), ("io", "output"))}  # fmt: skip
    options = {"temperature": TEMPERATURE, "alpha": TASK_WEIGHT, "beta": KD_WEIGHT, "reduction": "batchmean"}
    term = {"criterion": {"key": "KDLoss", "kwargs": {**logits, **options}}, "weight": 1.0}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": True},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": LR, "weight_decay": 0.0}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": term}},
            "func2extract_model_loss": "extract_model_loss_dict",
        },
    }
    device = next(student.parameters()).device
    box = get_distillation_box(teacher.eval(), student, {}, config, device, None, False, 1)
    box.pre_epoch_process(epoch=0)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = box.forward_process(images, labels, {})
        box.post_forward_process(loss=loss)
        return loss

    return step, box.optimizer


def timm_task(student: nn.Module, teacher: nn.Module) -> tuple[BatchStep, torch.optim.Optimizer]:
    from timm.task import LogitDistillationTask

    task = LogitDistillationTask(
        student,
        teacher,
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=KD_WEIGHT,
        task_loss_weight=TASK_WEIGHT,
        temperature=TEMPERATURE,
        device=next(student.parameters()).device,
        verbose=False,
    ).train()
    return own_loop(student, lambda images, labels: task(images, labels)["loss"])


HAND, TRAINER = "by hand", "kdvit, Trainer"
TOOLS: dict[str, Tool] = {HAND: by_hand, "kdvit": kdvit_loop, "torchdistill": torchdistill_box, "timm": timm_task}
NAMES = (TRAINER, *TOOLS)


# What takes part


def device() -> torch.device:
    """Where Accelerate, and so the Trainer, trains."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Job:
    """What all tools are given alike: copies of the same models, and batches for so many steps, in one epoch."""

    def __init__(self, size: Size, num_steps: int) -> None:
        self.size, self.num_steps = size, num_steps
        self.student, self.teacher = size.models()
        data = open_data("fashion-mnist-sample")
        repeated = [index % len(data.train) for index in range(num_steps * size.batch_size)]
        train, test = data.train.subset(repeated), data.test.subset(10)
        self.data = ImageData(data.name, train, test, data.classes)

    def models(self) -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(self.student).to(device()), copy.deepcopy(self.teacher).to(device())

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = make_loader(self.data.train, self.size.transform, batch_size=self.size.batch_size, train=True)
        return ((batch["image"].to(device()), batch["label"].to(device())) for batch in loader)

    @torch.no_grad()
    def last_loss(self, student: nn.Module) -> float:
        """Of a student after all steps, on the last batch."""
        *_, (images, labels) = self.batches()
        return reference_loss(student, self.models()[1].eval(), images, labels).item()


class Watch:
    """The student's gradient in the first step, and whether it is that of another."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.gradients: dict[str, Tensor] | None = None

    def listen(self, optimizer: torch.optim.Optimizer) -> None:
        def keep(*_: Any) -> None:
            named = self.student.named_parameters()
            self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
            handle.remove()

        handle = optimizer.register_step_pre_hook(keep)

    def difference(self, other: Watch) -> float:
        """The largest one, relative to the largest entry of the other's gradient; infinite where only one has any."""
        if not self.gradients or self.gradients.keys() != other.gradients.keys():
            return float("inf")
        largest = max(gradient.abs().max() for gradient in other.gradients.values())
        return float(
            max((self.gradients[name] - other.gradients[name]).abs().max() for name in other.gradients) / largest
        )


class Loop:
    """A tool that is stepped from outside."""

    def __init__(self, job: Job, tool: Tool) -> None:
        self.student, teacher = job.models()
        self.batches = job.batches()
        self.advance, optimizer = tool(self.student, teacher)
        self.watch = Watch(self.student)
        self.watch.listen(optimizer)
        self.losses: list[float] = []

    def step(self) -> None:
        self.losses.append(self.advance(*next(self.batches)).item())

    def run(self, lengths: Sequence[int], between: Between) -> None:
        for number, length in enumerate(lengths):
            for _ in range(length):
                self.step()
            between(number)


class TrainerRun:
    """A whole `Trainer.fit`, which calls back between its steps."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.student, teacher = job.models()
        # Steps that are alike: the rate is constant, the weights do not decay.
        settings = Training(
            epochs=None, steps=job.num_steps, batch_size=job.size.batch_size, lr=LR, min_lr=LR, warmup_epochs=0.0,
            weight_decay=0.0,
        )  # fmt: skip
        distiller = make_distiller(self.student, teacher)
        self.trainer = Trainer(distiller, job.data, settings, folder, transform=job.size.transform, quiet=True)
        self.watch = Watch(self.student)

    def run(self, lengths: Sequence[int], between: Between) -> None:
        done, number = 0, 0

        def after_step(*_: Any) -> None:
            nonlocal done, number
            done += 1
            if done == lengths[number]:
                between(number)
                done, number = 0, number + 1

        optimizer = self.trainer.optimizer.optimizer  # the one that Accelerate wraps
        self.watch.listen(optimizer)
        handle = optimizer.register_step_post_hook(after_step)
        self.trainer.fit()
        handle.remove()
