"""The checkup before training: every bad situation is built for real and must be named; a healthy pair has none."""

from __future__ import annotations

import copy
import dataclasses
import io
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from kdvit import Distiller, Student, Teacher, Training, create_model
from kdvit.cache import StoredTeacher, build
from kdvit.checkup import Checkup, Finding, LossReading, Plan, StepCost, check_training
from kdvit.checkup.costing import look_at_memory, look_at_time
from kdvit.checkup.examination import _taken
from kdvit.checkup.pairing import look_at_images
from kdvit.checkup.rehearsal import Rehearsed
from kdvit.checkup.screen import as_text
from kdvit.checkup.teaching import is_better
from kdvit.checkup.wording import duration, listed, mib
from kdvit.cli import main
from kdvit.data import ImageData, ImageSplit, open_data
from kdvit.data.splits import ArrayImages
from kdvit.losses import CRD, KD, FitNet, Loss
from kdvit.schedules import Steps
from tests import tiny

TEACHER = "fashion_mnist_cnn"
TRAINING = Training(epochs=2, batch_size=32)
VIT = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
MEAN, STD = (0.286,), (0.353,)


def decoded(split: ImageSplit) -> ImageSplit:
    """The same in memory: every checkup here looks at every picture."""
    array = np.stack([np.asarray(split.image(index)) for index in range(len(split))])
    return ImageSplit(ArrayImages(array, f"{split.name}.idx"), split.labels, split.classes, split.name)


@pytest.fixture(scope="module")
def judging() -> ImageData:
    """With enough test images to judge a teacher by each class."""
    whole = open_data("fashion-mnist-sample").subset(100, 120)
    return dataclasses.replace(whole, train=decoded(whole.train), test=decoded(whole.test))


@pytest.fixture(scope="module")
def data(judging: ImageData) -> ImageData:
    """With too few of them to judge it at all."""
    return dataclasses.replace(judging, test=judging.test.subset(20))


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("vit_tiny_patch16_224", **VIT)


def student(model: nn.Module | None = None, **facts: Any) -> Student:
    return Student(model or vit(), **{"mean": MEAN, "std": STD, "name": "small", **facts})


@cache
def cnn() -> nn.Module:
    """The shipped teacher; no test changes it."""
    return create_model(TEACHER)


def pair(wanted: Any = ("kd",), teacher: Any = TEACHER, learner: Student | None = None, **options: Any) -> Distiller:
    teacher = Teacher(cnn(), name=TEACHER) if teacher == TEACHER else teacher
    return Distiller(teacher, learner or student(), list(wanted), **options)


def matching(checkup: Checkup, level: str, title: str, words: str) -> list[Finding]:
    return [
        f for f in checkup.findings
        if (f.level, f.title) == (level, title) and re.search(words, f"{f.sentence} {f.cure}")
    ]  # fmt: skip


# A healthy pair


def test_a_healthy_pair_has_no_warning(judging):
    checkup = check_training(pair([(0.9, KD())], task_weight=0.1), judging, TRAINING, num_batches=3)
    assert [f for f in checkup.findings if f.level != "ok"] == []
    assert checkup.ok
    assert matching(checkup, "ok", "teacher", r"is right on 9\d\.\d % of 120 images; the student starts at")
    assert matching(checkup, "ok", "bridge", "mean 0.286 std 0.353; to teacher: nothing to convert")
    assert matching(checkup, "ok", "signals", "student logits 10; teacher logits 10")
    assert matching(checkup, "ok", "numbers", "finite in 3 steps")
    assert matching(checkup, "ok", "gradients", r"reach 3\d of 3\d trainable tensors")
    assert matching(checkup, "ok", "data", "10 a class; 120 test images; all 220 pictures looked at")
    assert matching(checkup, "ok", "time", r"6 steps and 2 evaluations take about")
    assert matching(checkup, "ok", "teacher time", r"takes \d+ % of a step; on a stored one \(`kdvit cache build`\)")
    assert matching(checkup, "ok", "memory", r"MiB at the peak of this process; of these student")
    assert list(checkup.cost.seconds) == ["data", "teacher", "student", "losses", "backward", "optimizer"]
    assert all(seconds > 0 for seconds in checkup.cost.seconds.values())
    assert checkup.cost.num_images == 32
    assert [(loss.name, loss.weight) for loss in checkup.losses] == [("task", 0.1), ("kd", 0.9)]
    assert sum(loss.gradient_share for loss in checkup.losses) == pytest.approx(1, abs=1e-5)
    assert str(checkup).endswith("0 errors, 0 warnings: ready to train")


def test_weights_are_what_shares_depend_on(data):
    """Twice the weight is twice the gradient, and the value stays."""
    shares = []
    for weight in (1.0, 2.0):
        task, kd = check_training(pair([(weight, "kd")]), data, TRAINING, num_batches=1).losses
        shares.append(kd.gradient_share / task.gradient_share)
        assert kd.value == pytest.approx(check_value(data), rel=1e-5)
    assert shares[1] == pytest.approx(2 * shares[0], rel=1e-3)


def check_value(data: ImageData) -> float:
    """The loss of the first batch, by the Distiller alone."""
    from kdvit.data import make_loader
    from kdvit.training import transform_for

    distiller = pair().train()
    loader = make_loader(data.train, transform_for(distiller.student), batch_size=32, train=True)
    batch = next(iter(loader))
    return distiller(batch["image"], batch["label"]).losses["kd"].item()


# Bad situations: name -> (the Distiller, what is changed in the data, level, title, words)


class Broken(Loss):
    """A loss that goes wrong in the step, and not in the Distiller's rehearsal on blank images."""

    name = "broken"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        value = (student_logits - teacher_logits).square().mean()
        if not self.training:
            return value
        if self.kind == "nan":
            return value * float("nan")
        if self.kind == "gradient":  # finite itself: 0, with the gradient infinity * 0
            return value + (0 * value).sqrt()
        if self.kind == "second step":
            self.kind = "nan"
            return value
        raise torch.OutOfMemoryError("CUDA out of memory.")


class Trick(nn.Module):
    """A ViT with parameters that learn only sometimes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.vit, self.kind, self.extra = vit(), kind, nn.Parameter(torch.ones(10))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.vit(images)
        if self.kind == "dead":
            return logits + 0 * self.extra
        if self.kind == "late":
            return logits + self.extra * (self.extra - 1)  # d/dx = 2x - 1: moves
        runs = self.training if self.kind == "stray" else not self.training
        return logits + self.extra if runs else logits


class Answer(nn.Module):
    """A CNN whose answers are changed."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cnn, self.change = create_model(TEACHER), change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.cnn(images))


def answering(change: Callable[[Tensor], Tensor]) -> Teacher:
    return Teacher(Answer(change), mean=MEAN, std=STD, input_size=(1, 28, 28), name="changed")


def nan_projector() -> Distiller:
    distiller = pair([FitNet()], learner=student())
    with torch.no_grad():
        next(distiller.losses.parameters()).fill_(float("nan"))
    return distiller


def frozen() -> Distiller:
    learner = student()
    learner.model.blocks[0].requires_grad_(False)
    return pair(learner=learner)


def noisy(scale: float) -> nn.Module:
    """The shipped teacher with a disturbed classifier."""
    model = create_model(TEACHER)
    with torch.no_grad():
        model.fc.weight += scale * torch.randn(model.fc.weight.shape, generator=torch.Generator().manual_seed(0))
    return model


def nan_for_odd_images(logits: Tensor) -> Tensor:
    """NaN in the second row; the blank images of the construction are all alike."""
    spread = (logits - logits[:1]).abs().amax(1, keepdim=True)
    return torch.where(spread > 1e-3, float("nan"), logits)


def relabelled(labels: Callable[[np.ndarray], np.ndarray]) -> Callable[[ImageData], ImageData]:
    def change(data: ImageData) -> ImageData:
        def split(old: ImageSplit) -> ImageSplit:
            return ImageSplit(old._reader, labels(old.labels), old.classes, old.name, old._rows)

        return dataclasses.replace(data, train=split(data.train), test=split(data.test))

    return change


def shuffled(labels: np.ndarray) -> np.ndarray:
    return np.random.RandomState(0).permutation(labels)


def without(split_name: str, label: int) -> Callable[[ImageData], ImageData]:
    def change(data: ImageData) -> ImageData:
        split = getattr(data, split_name)
        return dataclasses.replace(data, **{split_name: split.subset(np.flatnonzero(split.labels != label))})

    return change


def imbalanced(data: ImageData) -> ImageData:
    labels = data.train.labels
    kept = np.concatenate([np.flatnonzero(labels != 3), np.flatnonzero(labels == 3)[:1]])
    return dataclasses.replace(data, train=data.train.subset(kept))


def with_pictures(train: dict[int, int | None] | None = None, test: dict[int, int | None] | None = None):
    """Some pictures replaced: by one grey, or by picture i of train."""

    def change(data: ImageData) -> ImageData:
        pictures = np.stack([np.asarray(data.train.image(i)) for i in range(len(data.train))])

        def split(old: ImageSplit, replaced: dict[int, int | None]) -> ImageSplit:
            array = np.stack([np.asarray(old.image(i)) for i in range(len(old))])
            for index, source in replaced.items():
                array[index] = 7 if source is None else pictures[source]
            return ImageSplit(ArrayImages(array, f"{old.name}.idx"), old.labels, old.classes, old.name)

        changed = {
            name: split(getattr(data, name), replaced or {}) for name, replaced in (("train", train), ("test", test))
        }
        return dataclasses.replace(data, **changed)

    return change


def same(data: ImageData) -> ImageData:
    return data


def flat_classifier() -> nn.Module:
    """Answers class 0 whatever it sees."""
    model = create_model(TEACHER)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.arange(10, 0, -1))
    return model


ROLLED = [*range(1, 10), 0]
BAD = {
    "a class map that is rolled": (
        lambda: pair(teacher=Teacher(TEACHER, class_map=ROLLED)), same, "error", "teacher",
        r"right on 0\.0 % .* look permuted: what is class 0 in the data is its class 0, not 1; with 10 of 10 classes "
        r"exchanged it would be right on 9\d\.\d %\. leave the class map out\.",
    ),
    "a teacher of another class order": (
        lambda: pair(teacher=answering(lambda logits: logits[:, ROLLED])), same, "error", "teacher",
        r"look permuted: .* Teacher\(model, class_map=\[9, 0, 1, 2, 3, 4, 5, 6, 7, 8\]\)",
    ),
    "two classes exchanged": (
        lambda: pair(teacher=Teacher(TEACHER, class_map=[0, 1, 2, 3, 4, 5, 6, 9, 8, 7])), same, "error", "teacher",
        "look permuted: .* with 2 of 10 classes exchanged",
    ),
    "a permuted teacher whose logits no loss reads": (
        lambda: pair([FitNet()], teacher=Teacher(TEACHER, class_map=ROLLED)), same, "warning", "teacher", "permuted",
    ),
    "wrong normalisation": (
        lambda: pair(teacher=Teacher(TEACHER, mean=(0.5,), std=(0.5,))), same, "warning", "teacher",
        r"but fed with the student's normalisation on 9\d\.\d %: its normalisation looks wrong\. .*mean=\(0.286,\)",
    ),
    "wrong normalisation, teacher at chance": (
        lambda: pair(teacher=Teacher(TEACHER, mean=(0.286,), std=(0.00353,))), same, "error", "teacher",
        r"but fed with the student's normalisation on 9\d\.\d %",
    ),
    "student and teacher of the same wrong normalisation": (
        lambda: pair(teacher=Teacher(TEACHER, mean=(0.9,), std=(0.1,)), learner=student(mean=(0.9,), std=(0.1,))),
        same, "error", "teacher", r"fed with (the images' own|ImageNet's|-1..1).* its normalisation looks wrong",
    ),
    "shuffled labels": (
        pair, relabelled(shuffled), "error", "teacher",
        r"no better than a guess among 10 classes, though it is sure .* its answers are spread: labels and images .* "
        r"check the labels \(shuffled\? in another order than the teacher's\?",
    ),
    "an untrained teacher": (
        lambda: pair(teacher=Teacher(vit(7), mean=MEAN, std=STD)), same, "error", "teacher",
        r"no better than a guess among 10 classes(: it answers class|, and it is not sure) .* weights are loaded",
    ),
    "a teacher with one answer": (
        lambda: pair(teacher=flat_classifier()), same, "error", "teacher",
        r"it answers class 0 to 100\.0 % of the images\. check what it is fed with",
    ),
    "a teacher below the student": (
        lambda: pair(teacher=Teacher(noisy(0.5)), learner=student(create_model(TEACHER), input_size=(1, 28, 28))),
        same, "warning", "teacher",
        r"the student is right on 9\d\.\d % before it has learned anything from it",
    ),
    "NaN in a projector": (
        nan_projector, same, "error", "numbers",
        r"'losses\.fitnet\..*', before any step, is NaN or infinite in the first 3 steps",
    ),
    "NaN in the teacher's answers": (
        lambda: pair(teacher=answering(nan_for_odd_images)), same, "error", "numbers",
        "^signal 'logits' of teacher 'changed' is NaN",
    ),
    "a loss that is NaN": (
        lambda: pair([Broken("nan")]), same, "error", "numbers", r"^loss 'broken' \(samples \[\d+, .*\] \.{3}\) is NaN",
    ),
    "a loss that is NaN later": (
        lambda: pair([Broken("second step")]), same, "error", "numbers", r"^loss 'broken'",
    ),
    "a gradient that is NaN": (
        lambda: pair([Broken("gradient")]), same, "error", "numbers", r"^the gradient of 'student\.model\.",
    ),
    "no memory left": (
        lambda: pair([Broken("memory")]), same, "error", "memory", "step 1 does not fit .* use smaller batches",
    ),
    "a frozen part of the student": (
        frozen, same, "warning", "frozen", r"12 tensors of the student .* are not trained: blocks\.0\.norm1\.weight",
    ),
    "a parameter behind a factor of 0": (
        lambda: pair(learner=student(Trick("dead"), input_size=(1, 28, 28))), same, "warning", "gradients",
        r"exactly zero in all 3 steps for 1 parameter: student\.model\.extra\.",
    ),
    "a branch of training alone": (
        lambda: pair(learner=student(Trick("stray"), input_size=(1, 28, 28))), same, "warning", "gradients",
        r"DDP will not average them\), for 1 parameter: student\.model\.extra\. look for a branch that runs in train",
    ),
    "a branch of evaluation alone": (
        lambda: pair(learner=student(Trick("missing"), input_size=(1, 28, 28))), same, "warning", "gradients",
        r"missing in the step, .* for 1 parameter: student\.model\.extra\.",
    ),
    "a weight far too small": (
        lambda: pair([(1e-5, "kd")]), same, "warning", "weights",
        r"'kd' has 0\.\d+ % of the gradient at the start, 'task' has 100 %: .* a weight of 0\.\d+ would give it 10 %",
    ),
    "a weight far too large": (
        lambda: pair([(1e5, "kd")]), same, "warning", "weights", r"^'task' has 0\.\d+ % of the gradient",
    ),
    "a weight of 0": (
        lambda: pair([(0.0, "kd")]), same, "warning", "weights", r"'kd' has 0 % .* give it a weight, or leave it out",
    ),
    "a class without training images": (
        pair, without("train", 4), "warning", "classes",
        "1 of 10 classes have no image in train: Coat; they cannot be learned",
    ),
    "a class without test images": (
        pair, without("test", 4), "warning", "classes", "1 of 10 classes have no image in test: Coat; nobody will see",
    ),
    "a rare class": (
        pair, imbalanced, "warning", "classes", "far from equal in train: 10 images of 'T-shirt/top', 1 of 'Dress'",
    ),
    "pictures in both splits": (
        pair, with_pictures(test={5: 11, 6: 12}), "warning", "data",
        r"of all 120 pictures, 2 test pictures are training pictures too \(first: row 5 of test\.idx = row 11 of train",
    ),
    "blank pictures": (
        pair, with_pictures(train={3: None}, test={5: None}), "warning", "data",
        r"of all 120 pictures, 2 have one colour throughout: row 3 of train\.idx, row 5 of test\.idx",
    ),
}  # fmt: skip


@pytest.mark.parametrize("situation", BAD)
def test_every_bad_situation_is_named(situation, data, judging):
    make, change, level, title, words = BAD[situation]
    checkup = check_training(make(), change(judging if title == "teacher" else data), TRAINING, num_batches=1)
    assert matching(checkup, level, title, words), "\n".join(map(str, checkup.findings))
    assert checkup.ok == (level == "warning")
    others = [f for f in checkup.findings if f.level != "ok" and f.title != title]
    # A sick number spoils what is computed from it; anything else must not raise a second alarm.
    assert all(f.title in ("gradients", "teacher") for f in others) if title == "numbers" else others == []


def test_the_class_map_of_the_cure_cures(judging):
    teacher = answering(lambda logits: logits[:, [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]])
    (found,) = matching(
        check_training(pair(teacher=teacher), judging, TRAINING, num_batches=1), "error", "teacher", "permuted"
    )
    class_map = [int(number) for number in re.search(r"class_map=\[(.*?)\]", found.cure)[1].split(", ")]
    cured = Teacher(teacher.model, class_map=class_map, mean=MEAN, std=STD, input_size=(1, 28, 28), name="cured")
    assert matching(
        check_training(pair(teacher=cured), judging, TRAINING, num_batches=1), "ok", "teacher", r"right on 9\d\.\d %"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images: images * 255, r"values lie in .*\.\.\d+, but normalised for the student .* -0\.81\.\.2\.02"),
        (lambda images: images.sigmoid(), r"values lie in 0\.\d+\.\.0\.\d+, but normalised for the student"),
        (lambda images: torch.cat([images[:3], 0 * images[3:]]), r"29 images of the first batch of 32 .* number 3"),
        (lambda images: images / 0, "holds NaN or infinity"),
    ],
)
def test_images_that_are_not_normalised(change, words):
    images = tiny.images(32, channels=1, size=(28, 28)).clamp(-0.8, 2)
    assert not list(look_at_images(pair(), images))
    checkup = pair().check([(change(images), torch.arange(32) % 10)])
    assert [f for f in checkup.findings if f.title == "images" and re.search(words, f.sentence)], str(checkup)


# All kinds of jobs


def jobs() -> dict[str, Callable[[], tuple[Distiller, Training]]]:
    return {
        "no teacher": lambda: (pair([], teacher=None), TRAINING),
        "several teachers": lambda: (pair(["mmkd"], teacher=[TEACHER, "fashion_mnist_vit"]), TRAINING),
        "features alone": lambda: (pair([FitNet()], task_loss=None), TRAINING),
        "a teacher without a classifier": lambda: (
            pair(["fitnet"], teacher=Teacher(create_model(TEACHER, num_classes=0), mean=MEAN, std=STD)), TRAINING,
        ),
        "a second view": lambda: (pair(["mlld"]), TRAINING),
        "a memory for each image": lambda: (pair([CRD(dim=8, num_negatives=16)]), TRAINING),
        "calibration": lambda: (pair(["ptloss"]), TRAINING),
        "a loss that needs the live teacher": lambda: (pair(["kd", "mlld"]), TRAINING),
        "mixup and a second view": lambda: (
            pair(["mlld"]), dataclasses.replace(TRAINING, mixup_alpha=0.8, label_smoothing=0.1),
        ),
        "bf16 and accumulation": lambda: (
            pair(), dataclasses.replace(TRAINING, mixed_precision="bf16", accumulation_steps=2),
        ),
        "sgd and loader processes": lambda: (pair(), dataclasses.replace(TRAINING, optimizer="sgd", num_workers=1)),
        "a student with norms that start at zero": lambda: (
            pair(learner=student(create_model("resnet18", in_chans=1, num_classes=10, channels=(8, 8, 8, 8)),
                                 input_size=(1, 28, 28))), TRAINING,
        ),
        "an own task loss module": lambda: (pair(task_loss=nn.CrossEntropyLoss()), TRAINING),
        "a loss that starts later": lambda: (pair([(Steps({0: 0.0, 1: 1.0}), FitNet())]), TRAINING),
    }  # fmt: skip


@pytest.mark.parametrize("job", jobs())
def test_every_kind_of_job_can_be_looked_over(job, data):
    distiller, settings = jobs()[job]()
    checkup = check_training(distiller, data, settings, num_batches=1)
    troubles = [f for f in checkup.findings if f.level != "ok" and f.title != "weights"]
    assert troubles == []
    assert len(checkup.losses) == len(distiller.losses) + (distiller.task_loss is not None)
    assert checkup.cost.num_images == 32 * settings.accumulation_steps
    assert ("teacher" in checkup.cost.seconds) == bool(distiller.teachers)
    expected = {
        "no teacher": ("teacher", "none, and no loss reads one; the student starts at"),
        "a teacher without a classifier": (
            "teacher",
            "gives 96 numbers, not the student's 10 classes: it teaches features",
        ),
        "a loss that needs the live teacher": ("teacher time", "it must be live: mlld reads a second view"),
        "features alone": (
            "gradients",
            "reach 31 of 35 trainable tensors; 4 lie behind what the losses read: student.model.norm.weight",
        ),
        "a loss that starts later": ("weights", r"start: task 100 %, fitnet 0 % \(its schedule starts later\)"),
        # The copy that was looked at is calibrated, the student's own loss is not.
        "calibration": ("teacher time", "it must be live: ptloss must be calibrated"),
    }
    if job in expected:
        assert matching(checkup, "ok", *expected[job])
    if job == "calibration":
        assert matching(checkup, "ok", "time", "; 4 steps and 2 evaluations")  # of the 90 images that are not held out
    if job == "features alone":
        assert matching(checkup, "ok", "time", "; 6 steps take about")  # such a student's answers are not looked at


def test_labels_are_mixed_as_in_training(data):
    """Smoothed labels of 10 classes: 0.9 of the label's cross-entropy and 0.1 of the mean over classes."""
    plain, smoothed = (
        check_training(pair(), data, dataclasses.replace(TRAINING, label_smoothing=s), num_batches=1).losses
        for s in (0.0, 0.1)
    )
    assert smoothed[0].value != pytest.approx(plain[0].value, rel=1e-4)
    assert smoothed[1].value == pytest.approx(plain[1].value, rel=1e-5)  # the images are the same


def test_a_stored_teacher_is_read(data, tmp_path):
    live = check_training(pair(), data, TRAINING, num_batches=1)
    (folder,) = build(tmp_path / "cache", pair(), data, TRAINING, quiet=True)
    stored = check_training(pair(teacher=StoredTeacher(folder)), data, TRAINING, num_batches=1)
    assert [f for f in stored.findings if f.level != "ok"] == []
    assert stored.losses[1].value == pytest.approx(live.losses[1].value, rel=1e-3)
    assert matching(
        stored, "ok", "teacher", r"'fashion_mnist_cnn' is stored in 'cache'; live it was right on \d\d\.\d %"
    )
    assert matching(stored, "ok", "teacher time", r"stored: reading it takes \d+ % of a step")
    with pytest.raises(ValueError, match="must be used with what it was made of, but"):
        check_training(pair(teacher=StoredTeacher(folder)), data, dataclasses.replace(TRAINING, seed=1))


# What is left behind


def state_of(distiller: Distiller) -> dict[str, Any]:
    """Everything that a checkup might have touched."""
    modules = [*distiller.modules(), *(m for teacher in distiller.teachers for m in teacher.modules())]
    named = dict(distiller.named_parameters())
    return {
        "tensors": [
            t.clone() for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        ],
        "identity": [id(t) for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None],
        "modes": [m.training for m in modules],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        "plain": [{k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float, str))} for m in modules],
        "gradients": {name: p.grad.clone() for name, p in named.items() if p.grad is not None},
        "generators": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()],
        "own generators": [m.generator.get_state().tolist() for m in modules if getattr(m, "generator", None)],
    }


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    for before, after in zip(first.pop("tensors"), second.pop("tensors"), strict=True):
        assert torch.equal(before, after)
    ours, theirs = first.pop("gradients"), second.pop("gradients")
    assert ours and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert first == second


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(training):
    """BatchNorm, memories, queues, one-time switches, gradients, modes and every generator stay as they are."""
    crd = CRD(dim=8, num_negatives=4, num_samples=64)
    crd.generator = torch.Generator().manual_seed(3)
    distiller = Distiller(tiny.cnn(1), tiny.cnn(2, drop_rate=0.5), [crd, "kd", "ofd"]).train(training)
    batches = [
        {"image": tiny.images(8, seed=i), "label": torch.arange(8) % 5, "sample_id": torch.arange(8) + 8 * i}
        for i in range(3)
    ]
    first = {
        name: batches[0][key] for name, key in (("images", "image"), ("labels", "label"), ("sample_ids", "sample_id"))
    }
    distiller.eval()(first.pop("images"), first.pop("labels"), **first).loss.backward()
    distiller.train(training)
    before = state_of(distiller)
    assert before["own generators"]
    checkup = distiller.check(batches)
    assert checkup.cost is not None
    assert_equal(before, state_of(distiller))
    assert str(distiller.check(batches).losses) == str(checkup.losses)  # and the second look sees the same


# Batches


def test_batches_of_tuples_and_dicts_are_the_same():
    images, labels = tiny.images(8), tiny.labels(8)
    distiller = Distiller(tiny.plain(1), Student(tiny.plain(2), input_size=(3, 32, 32)), ["kd"])
    one, other = distiller.check([(images, labels)]), distiller.check([{"image": images, "label": labels}])
    assert one.losses == other.losses
    assert matching(one, "ok", "teacher", "8 images are too few to judge it by")
    soft = distiller.check([(images, torch.eye(5)[labels])])
    assert soft.losses[0].value == pytest.approx(one.losses[0].value)


def test_without_labels_the_teacher_is_not_judged():
    distiller = Distiller(tiny.vit(1), tiny.vit(2), ["kd"], task_loss=None)
    checkup = distiller.check([{"image": tiny.images(8)}])
    assert matching(checkup, "ok", "teacher", "there are no labels to judge it by")


def test_only_as_many_batches_are_taken_as_asked_for():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield tiny.images(4), tiny.labels(4)

    distiller = Distiller(tiny.vit(1), tiny.vit(2), ["kd"])
    assert distiller.check(endless(), num_batches=2).ok and len(taken) == 2
    assert matching(distiller.check(endless()), "ok", "numbers", "in 5 steps") and len(taken) == 7


@pytest.mark.parametrize(
    ("batches", "options", "error", "words"),
    [
        ([], {}, ValueError, "Distiller.check: batches must hold at least one batch, got none; give a loader"),
        ([torch.ones(2, 3, 32, 32)], {}, TypeError, "a batch must be .images, labels. or a dict .* got Tensor; wrap"),
        ([{"pixel_values": 1, "y": 2}], {}, TypeError, "got a dict of pixel_values, y; wrap the loader"),
        ([], {"num_batches": 0}, ValueError, "Distiller.check: num_batches must be >= 1, got 0; 5 are usual"),
    ],
)
def test_wrong_batches_are_refused(batches, options, error, words):
    with pytest.raises(error, match=words):
        Distiller(tiny.vit(1), tiny.vit(2), ["kd"]).check(batches, **options)


def test_a_plan_of_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"Plan: mixed_precision must be 'no', 'bf16' or 'fp16', got 'int8'; give"):
        Plan(mixed_precision="int8")


def test_what_the_trainer_refuses_is_refused(data):
    with pytest.raises(
        ValueError, match="has 10 classes but student 'small' has 10|make the student with num_classes=9"
    ):
        nine = dataclasses.replace(data, classes=data.classes[:9])
        check_training(pair(), nine, TRAINING)
    with pytest.raises(ValueError, match="Training: batch_size must be at most the 100 training images over 1 process"):
        check_training(pair(), data, dataclasses.replace(TRAINING, batch_size=101))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'; take"):
            check_training(pair(), data, dataclasses.replace(TRAINING, mixed_precision="fp16"))


def test_two_of_a_hundred_images_are_no_evidence():
    """gained and lost images of 100 -> whether one teacher is better than the other."""
    for gained, lost, better in ((9, 0, False), (10, 0, True), (20, 6, False), (21, 5, True), (0, 30, False)):
        new, old = torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
        new[:gained] = True
        old[50 : 50 + lost] = True
        assert is_better(new, old) == better, (gained, lost)


# Time and memory


class Clock:
    """Stands for the module `time`, and goes on only where somebody lets it."""

    def __init__(self) -> None:
        self.milliseconds = 0

    def perf_counter(self) -> float:
        return self.milliseconds / 1000


class Slow(nn.Module):
    """Takes its time forwards and backwards."""

    def __init__(self, model: nn.Module, clock: Clock, milliseconds: int, backward: int = 0) -> None:
        super().__init__()
        self.model, self.clock, self.milliseconds, self.backward = model, clock, milliseconds, backward

    def forward(self, images: Tensor) -> Tensor:
        self.clock.milliseconds += self.milliseconds
        output = self.model(images)
        if output.requires_grad:
            output.register_hook(self.wait)
        return output

    def wait(self, gradient: Tensor) -> None:
        self.clock.milliseconds += self.backward

    def __deepcopy__(self, memo: dict) -> Slow:
        return Slow(copy.deepcopy(self.model, memo), self.clock, self.milliseconds, self.backward)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"data": 40, "teacher": 60, "student": 30, "losses": 5, "backward": 7, "optimizer": 3}),
        (
            {"accumulation_steps": 2},
            {"data": 80, "teacher": 120, "student": 60, "losses": 10, "backward": 14, "optimizer": 3},
        ),
        # Loading goes on while the models run, which takes longer.
        ({"num_workers": 1}, {"data": 0, "teacher": 60, "student": 30, "losses": 5, "backward": 7, "optimizer": 3}),
    ],
)
def test_every_phase_has_its_own_time(monkeypatch, options, expected):
    clock = Clock()
    monkeypatch.setattr("kdvit.checkup.rehearsal.time", clock)
    monkeypatch.setattr("kdvit.checkup.examination.time", clock)
    teacher, learner = Slow(tiny.plain(1), clock, 60), Slow(tiny.plain(2), clock, 30, backward=7)

    def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
        clock.milliseconds += 5
        return nn.functional.cross_entropy(logits, labels)

    class Optimizer(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            clock.milliseconds += 3
            super().step(closure)

    def batches():
        for _ in range(3):
            clock.milliseconds += 40
            yield tiny.images(2), torch.tensor([0, 1])

    facts = {"input_size": (3, 32, 32)}
    distiller = Distiller(Teacher(teacher, **facts), Student(learner, **facts), ["kd"], task_loss=task_loss)
    plan = Plan(optimizer=lambda subject: Optimizer(subject.parameters(), lr=0.1), **options)
    cost = distiller.check(batches(), plan=plan).cost
    assert {phase: round(1000 * seconds) for phase, seconds in cost.seconds.items()} == expected
    assert cost.num_images == 2 * options.get("accumulation_steps", 1)


def test_batches_that_loader_processes_make_at_once(monkeypatch):
    """Five of 40 ms: of four processes the last one begins anew; eight make all of them together."""
    for num_workers, arrivals, expected in (
        (4, [40, 0, 0, 0, 40], 10),
        (8, [40, 0, 0, 0, 0], 5),
        (0, [90] + 4 * [40], 40),
    ):
        clock = Clock()
        monkeypatch.setattr("kdvit.checkup.examination.time", clock)

        def batches(clock=clock, arrivals=arrivals):
            for milliseconds in arrivals:
                clock.milliseconds += milliseconds
                yield tiny.images(2), torch.tensor([0, 1])

        taken, seconds = _taken(batches(), 5, num_workers)
        assert len(taken) == 5 and 1000 * seconds == pytest.approx(expected)


COST = StepCost(
    {"data": 0.1, "teacher": 0.5, "student": 0.2, "losses": 0.0, "backward": 0.15, "optimizer": 0.05}, num_images=100
)


def test_the_total_is_steps_and_evaluations():
    plan = Plan(num_steps=3600, num_test_images=1000, num_evaluations=10)
    total, teacher = look_at_time(pair(), COST, plan, "cpu")
    # 3600 s of steps; an evaluation 1000 * (0.001 + 0.002) = 3 s, ten of them; the teacher once, 6 s.
    assert "1 s a step, 100 images/s on cpu; 3,600 steps and 10 evaluations take about 61 min" in total.sentence
    assert "waits for data" not in total.sentence
    assert (
        "takes 50 % of a step; on a stored one (`kdvit cache build`) a run takes about 31 min instead"
        in teacher.sentence
    )


def test_without_a_plan_there_is_no_total():
    slow = StepCost({**COST.seconds, "data": 1.0}, num_images=100)
    step, teacher = look_at_time(pair(), slow, Plan(), "cpu")
    assert step.sentence == "1.9 s a step, 53 images/s on cpu; 53 % of it waits for data: more --num-workers may help"
    assert teacher.sentence == "takes 26 % of a step; on a stored one (`kdvit cache build`) it takes 1.4 s"


def test_memory_counts_weights_gradients_and_optimizer(data):
    model = vit()
    size = sum(p.numel() for p in model.parameters()) * 4
    checkup = check_training(pair(learner=student(model)), data, TRAINING, num_batches=1)
    teacher = sum(p.numel() for p in create_model(TEACHER).parameters()) * 4
    (found,) = matching(checkup, "ok", "memory", "at the peak")
    # AdamW keeps two numbers a weight, and one step count a tensor.
    assert f"student and projectors {mib(size)}, gradients {mib(size)}, optimizer {mib(2 * size)}" in found.sentence
    assert f"teacher {mib(teacher)}" in found.sentence


def test_a_proposed_weight_gives_what_it_promises(data):
    (found,) = matching(
        check_training(pair([(1e-5, "kd")]), data, TRAINING, num_batches=1), "warning", "weights", "would give it 10 %"
    )
    weight = float(re.search(r"a weight of (\S+) would", found.cure)[1])
    task, kd = check_training(pair([(weight, "kd")]), data, TRAINING, num_batches=1).losses
    assert kd.gradient_share == pytest.approx(0.1, rel=0.05)  # the weight is rounded to two figures


def test_words():
    assert [duration(s) for s in (0.0123, 5400, 86400, 3e6)] == ["12 ms", "1.5 h", "24 h", "35 days"]
    assert (mib(2**19), mib(3 * 2**30)) == ("0.5 MiB", "3,072 MiB")
    assert listed("abcde") == "a, b, c and 2 more"
    with pytest.raises(ValueError, match="duration: seconds must be finite, got nan; measure again"):
        duration(float("nan"))


def test_a_full_device_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": 1000}))
    for peak, level in ((901, "warning"), (900, "ok")):
        found = look_at_memory(pair(), Rehearsed(peak_bytes=peak), torch.device("cuda"))
        assert found.level == level and "at the peak of this device" in found.sentence


# The screen


def crowded(num_troubles: int, num_losses: int) -> Checkup:
    text = "a sentence that goes on for long enough to need a second line on a narrow terminal, as they do."
    findings = [Finding("ok", f"fine{i}", text) for i in range(10)]
    findings += [Finding("error" if i == 0 else "warning", f"bad{i}", text, "do this.") for i in range(num_troubles)]
    return Checkup(
        "a heading", findings, [LossReading(f"loss_{i}", 1.0, 1.0, 1 / num_losses) for i in range(num_losses)], COST
    )


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize(("num_troubles", "num_losses"), [(0, 1), (1, 5), (3, 30), (6, 3), (12, 30)])
def test_the_screen_is_never_larger_than_a_screen(width, num_troubles, num_losses):
    checkup = crowded(num_troubles, num_losses)
    lines = as_text(checkup, width).splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= width
    left_out = re.search(r"^(\d+) more in .findings: (.*)", "\n".join(lines), re.MULTILINE)
    shown = [f for f in checkup.findings if any(re.match(rf"[✓!✗] {f.title} ", line) for line in lines)]
    assert len(shown) + (int(left_out[1]) if left_out else 0) == len(checkup.findings)
    if num_troubles <= 6:
        assert set(checkup.errors + checkup.warnings) <= set(shown)
    assert checkup.errors[:1] == [f for f in shown if f.level == "error"]


def test_a_wide_terminal_is_not_filled():
    console = Console(file=io.StringIO(), width=160)
    console.print(crowded(3, 5))
    assert 90 < max(len(line.rstrip()) for line in console.file.getvalue().splitlines()) <= 100


def test_a_number_stays_with_its_unit():
    for words in range(1, 40):
        text = as_text(
            Checkup("", [Finding("ok", "a", "x " * words + "93.9 % of 1,024 MiB in 7 min, 5 ms and 3 days")]), 80
        )
        assert not re.search(r"\d\n\s+(%|MiB|min|ms|days)", text)
        assert "\N{NO-BREAK SPACE}" not in text


def test_the_verdict_counts():
    assert str(crowded(0, 1)).endswith("0 errors, 0 warnings: ready to train")
    assert str(crowded(3, 1)).endswith("1 error, 2 warnings: not ready to train")
    assert str(Checkup("", [Finding("warning", "a", "b.")])).endswith(
        "0 errors, 1 warning: look at them before you train"
    )


# The command

OPTIONS = ",".join(f"{name}={value}" for name, value in VIT.items() if name != "num_classes")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, judging: ImageData) -> Path:
    """A folder of 80 + 120 pictures."""
    folder = tmp_path_factory.mktemp("pictures") / "data"
    for name, split in (("train", judging.train.subset(80)), ("val", judging.test)):
        for index, label in enumerate(split.labels):
            (folder / name / str(label)).mkdir(parents=True, exist_ok=True)
            split.image(index).save(folder / name / str(label) / f"{index}.png")
    return folder


@pytest.fixture
def doctor(pictures: Path) -> Callable[..., int]:
    """doctor("--loss", "dkd") -> exit code, on these pictures."""
    options = ["--teacher", TEACHER, "--student", "vit_tiny_patch16_224", "--student-options", OPTIONS]

    def run(*more: str) -> int:
        return main(["doctor", "--data", str(pictures), *options, "--batch-size", "16", "--epochs", "1", *more])

    return run


def test_the_command_says_ready(doctor, capsys):
    assert doctor("--batches", "2", "--loss", "0.9*kd", "--task-weight", "0.1") == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert re.match(r"'vit_tiny_patch16_224' learns from 'fashion_mnist_cnn' on", printed)
    assert "2 batches of 16" in printed and "0 errors, 0 warnings: ready to train" in printed


def test_the_command_fails_where_something_is_wrong(doctor, tmp_path, capsys):
    (tmp_path / "map.json").write_text(str(ROLLED))
    assert doctor("--class-map", str(tmp_path / "map.json")) == 1
    printed = capsys.readouterr().out
    assert "✗ teacher" in printed and "→ leave the class map out." in printed and "not ready to train" in printed


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--batches", "0"], "kdvit: --batches: it must be >= 1, got 0; 5 are usual."),
        (["--los", "kd"], "kdvit: unrecognized arguments: --los kd; did you mean '--loss'?"),
        (["--batch-size", "81"], "kdvit: Training: batch_size must be at most the 80 training images over 1 pr"),
    ],
)
def test_wrong_options_of_the_command(doctor, capsys, more, words):
    assert doctor(*more) == 2
    assert words in capsys.readouterr().err


def test_no_trace_is_left_on_the_disk(doctor, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(pictures.rglob("*"))
    assert doctor() == 0
    assert sorted(pictures.rglob("*")) == before and not list(tmp_path.iterdir())
