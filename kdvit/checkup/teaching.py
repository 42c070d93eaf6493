"""Whether a teacher knows what it is to teach, and if not, what is probably wrong.

A suspicion is only spoken out where it is tested: another normalisation, or another order of the classes, must make
the teacher right on clearly more images than it is now, each image compared with itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdvit.bridge import ImageBridge
from kdvit.cache.teacher import StoredTeacher
from kdvit.checkup.findings import Finding, Level
from kdvit.distiller import Distiller
from kdvit.signals import CLASS_SIGNALS
from kdvit.taps.family import logits_of
from kdvit.wrappers import Normalisation, Student, Teacher

Sample = Sequence[tuple[Tensor, Tensor]]

#: Too few images to say anything.
MIN_IMAGES = 30
#: Images that are fed in other ways, at least.
MIN_TRIED = 128
#: A difference counts from so many standard deviations of it.
NUM_SIGMAS = 3.0
#: ... and from this share of the images.
MIN_GAIN = 0.05
#: What a teacher is right on, at least, once what is thought to be wrong is put right: any model, also one that has
#: learned nothing, does a little better in some other way.
MIN_CURED = 0.5
#: Normalisations that models were trained with.
USUAL: dict[str, Normalisation] = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "-1..1": ((0.5,), (0.5,)),
    "pixels of 0..1": ((0.0,), (1.0,)),
}


@dataclass(frozen=True)
class Answers:
    """What one model says to the sample.

    Args:
        logits: (images, classes), float32, on the CPU; of a teacher all its own classes.
        labels: (images,) true classes of the student.
        class_map: (classes of the student,) the teacher's class of each.
    """

    logits: Tensor
    labels: Tensor
    class_map: Tensor

    @property
    def mapped(self) -> Tensor:
        return self.logits[:, self.class_map]

    @property
    def right(self) -> Tensor:
        return self.mapped.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return self.right.double().mean().item()

    @property
    def near_chance(self) -> bool:
        count, chance = len(self.labels), 1 / len(self.class_map)
        return self.right.sum().item() <= count * chance + NUM_SIGMAS * (count * chance * (1 - chance)) ** 0.5


@torch.no_grad()
def look_at_teachers(distiller: Distiller, sample: Sample) -> Iterator[Finding]:
    """Accuracy of each teacher, and of the student as it is, with what is suspicious in it.

    Args:
        distiller: a copy in eval mode.
        sample: (images, (B,) class ids) on its device.
    """
    if not sample:
        yield Finding("ok", "teacher", "there are no labels to judge it by")
        return
    student = _student_answers(distiller, sample)
    if not distiller.teachers:
        yield Finding("ok", "teacher", "none, and no loss reads one" + _student_words(student))
        return
    labels = torch.cat([labels for _, labels in sample]).cpu()
    reads_logits = any(signal in CLASS_SIGNALS for wanted in distiller.needs["teacher"].values() for signal in wanted)
    for teacher in distiller.teachers:
        if isinstance(teacher, StoredTeacher):
            known = "" if teacher.accuracy is None else f"; live it was right on {teacher.accuracy['top1']:.1f} %"
            yield Finding("ok", "teacher", f"'{teacher.name}' is stored in '{teacher.folder.name}'{known}")
            continue
        try:
            logits = _logits(teacher, sample, teacher.bridge)
        except TypeError:
            yield Finding("ok", "teacher", f"'{teacher.name}' has no classifier: it teaches features")
            continue
        identity = torch.arange(logits.shape[1])
        answers = Answers(logits, labels, identity if teacher.class_map is None else teacher.class_map.cpu())
        if distiller.num_classes not in (None, len(answers.class_map)):
            words = f"'{teacher.name}' gives {len(answers.class_map)} numbers, not the student's"
            yield Finding("ok", "teacher", f"{words} {distiller.num_classes} classes: it teaches features")
            continue
        if len(labels) < MIN_IMAGES:
            yield Finding("ok", "teacher", f"'{teacher.name}': {len(labels)} images are too few to judge it by")
            continue
        yield _judged(teacher, distiller.student, answers, student, sample, "error" if reads_logits else "warning")


def _judged(
    teacher: Teacher, student: Student, answers: Answers, learner: Answers | None, sample: Sample, level: Level
) -> Finding:
    """The one thing that is most probably wrong with a teacher; or that all is well."""
    so_far = f"'{teacher.name}' is right on {_percent(answers.accuracy)} of {len(answers.labels)} images"
    order = _better_order(answers)
    if order is not None:
        class_map, accuracy = order
        now = answers.class_map.tolist()
        moved = [label for label in range(len(now)) if class_map[label] != now[label]]
        return Finding(
            level,
            "teacher",
            f"{so_far}, but its classes look permuted: what is class {moved[0]} in the data is its class "
            f"{class_map[moved[0]]}, not {now[moved[0]]}; with {len(moved)} of {len(now)} classes exchanged it would "
            f"be right on {_percent(accuracy)}.",
            _class_map_cure(class_map, answers.logits.shape[1]),
        )
    feeding = _better_feeding(teacher, student, answers, sample)
    if feeding is not None:
        name, accuracy, cure = feeding
        return Finding(
            level if answers.near_chance else "warning",
            "teacher",
            f"{so_far}, but fed with {name} on {_percent(accuracy)}: its normalisation looks wrong.",
            cure,
        )
    if answers.near_chance:
        return Finding(level, "teacher", *_chance(so_far, answers))
    if learner is not None and is_better(learner.right, answers.right):
        return Finding(
            "warning",
            "teacher",
            f"{so_far}, the student is right on {_percent(learner.accuracy)} before it has learned anything from it.",
            "choose a better teacher, or a student from scratch.",
        )
    return Finding("ok", "teacher", so_far + _student_words(learner))


def _class_map_cure(class_map: list[int], num_classes: int) -> str:
    if class_map == list(range(num_classes)):
        return "leave the class map out."
    if len(class_map) > 20:
        return "give the teacher's class of each class of the data: Teacher(model, class_map=[...]), --class-map FILE."
    return (
        f"give the teacher's class of each class of the data: Teacher(model, class_map={class_map}), --class-map FILE."
    )


def _chance(so_far: str, answers: Answers) -> tuple[str, str]:
    """(what a teacher at chance looks like, what to do)."""
    answered = answers.mapped.argmax(1)
    most, count = answered.mode().values.item(), len(answered)
    sameness = (answered == most).double().mean().item()
    confidence = answers.mapped.softmax(1).amax(1).mean().item()
    guess = f"{so_far}, no better than a guess among {len(answers.class_map)} classes"
    variety = len(answered.unique()) / min(len(answers.class_map), count)
    if confidence > 0.5 and variety > 0.5 and sameness < 0.5:
        return (
            f"{guess}, though it is sure ({_percent(confidence)} on average) and its answers are spread: labels and "
            "images look as if they did not belong together.",
            "check the labels (shuffled? in another order than the teacher's?), and whether the teacher knows these "
            "classes.",
        )
    if sameness > 0.5:
        return (
            f"{guess}: it answers class {most} to {_percent(sameness)} of the images.",
            "check what it is fed with (normalisation, channel order), and that its weights are loaded.",
        )
    return (
        f"{guess}, and it is not sure of its answers ({_percent(confidence)} on average).",
        "check that its weights are loaded, and that it was trained on these classes.",
    )


def _better_order(answers: Answers) -> tuple[list[int], float] | None:
    """Another class of the teacher for each class of the student, found on one half and tested on the other."""
    positions = torch.empty_like(answers.labels)
    for label in answers.labels.unique():  # every other image of each class
        members = (answers.labels == label).nonzero().flatten()
        positions[members] = torch.arange(len(members))
    fitted, tested = positions % 2 == 0, positions % 2 == 1
    answered = answers.logits.argmax(1)
    pairs = torch.stack([answers.labels[fitted], answered[fitted]], 1)
    found, counts = pairs.unique(dim=0, return_counts=True)
    members = torch.bincount(answers.labels[fitted], minlength=len(answers.class_map))
    current, order = answers.class_map.tolist(), {}
    taken: set[int] = set()
    for index in counts.argsort(descending=True, stable=True).tolist():
        label, answer = found[index].tolist()
        if label in order or answer in taken or counts[index] < 3 or counts[index] < 0.5 * members[label]:
            continue
        order[label] = answer
        taken.add(answer)
    class_map = [order.get(label, current[label]) for label in range(len(current))]
    if len(set(class_map)) < len(class_map):  # what is left over goes to what is left over, where it may
        free = iter(sorted(set(current) - taken))
        class_map = [order[label] if label in order else next(free, -1) for label in range(len(current))]
    if class_map == current or -1 in class_map:
        return None
    other = Answers(answers.logits, answers.labels, torch.tensor(class_map))
    right = other.right[tested]
    if right.double().mean() < MIN_CURED or not is_better(right, answers.right[tested]):
        return None
    return class_map, other.accuracy


def _better_feeding(
    teacher: Teacher, student: Student, answers: Answers, sample: Sample
) -> tuple[str, float, str] | None:
    """(what else the first images were fed with, the accuracy then, what to do), where that is clearly better."""
    first = list(sample[:1])
    while sum(len(labels) for _, labels in first) < MIN_TRIED and len(first) < len(sample):
        first.append(sample[len(first)])
    images, labels = first[0][0], torch.cat([labels for _, labels in first]).cpu()
    now = answers.right[: len(labels)]
    best: tuple[float, str, str] | None = None
    for name, bridge, cure in _feedings(teacher, student, images):
        right = Answers(_logits(teacher, first, bridge), labels, answers.class_map).right
        accuracy = right.double().mean().item()
        if is_better(right, now) and accuracy > (MIN_CURED if best is None else best[0]):
            best = accuracy, name, cure
    return None if best is None else (best[1], best[0], best[2])


def _feedings(teacher: Teacher, student: Student, images: Tensor) -> Iterator[tuple[str, ImageBridge, str]]:
    """Bridges that feed the teacher with something else, each with its name and what to do if it is better."""
    given = teacher.bridge
    if given.scale is not None:
        yield (
            "the student's normalisation",
            ImageBridge(given.channels, given.size),
            "look up the normalisation that the teacher was trained with; it may be the student's: Teacher(model, "
            f"mean={student.normalisation[0]}, std={student.normalisation[1]}).",
        )
    if student.normalisation is None:
        return
    device = images.device
    mean_s, std_s = (torch.tensor(values, device=device).view(-1, 1, 1) for values in student.normalisation)
    pixels = images * std_s + mean_s
    own = [pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()]
    usual = {**USUAL, "the images' own mean and std": tuple(tuple(round(v, 3) for v in values) for values in own)}
    channels = given.channels or images.shape[1]
    for name, normalisation in usual.items():
        mean, std = (_in(values, channels) for values in normalisation)
        mean_t, std_t = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
        scale, shift = std_s / std_t, (mean_s - mean_t) / std_t
        yield (
            f"{name} (mean {mean[0]:.3g}, std {std[0]:.3g})",
            ImageBridge(given.channels, given.size, scale, shift),
            f"look up the normalisation that the teacher was trained with; it may be: Teacher(model, mean={mean}, "
            f"std={std}).",
        )


def _in(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value, or one for each channel; the mean of them for grey."""
    if len(values) in (1, channels):
        return values
    return (round(sum(values) / len(values), 3),)


def is_better(new: Tensor, old: Tensor) -> bool:
    """Whether more images are right than chance would explain (McNemar's test, without its table)."""
    gained, lost = (new & ~old).sum().item(), (old & ~new).sum().item()
    return gained - lost > max(NUM_SIGMAS * (gained + lost) ** 0.5, MIN_GAIN * len(old))


def _logits(teacher: Teacher, sample: Sample, bridge: ImageBridge) -> Tensor:
    teacher.model.eval()
    found = []
    for images, _ in sample:
        images = bridge(images)
        images = images if teacher.dtype is None else images.to(teacher.dtype)
        found.append(logits_of(teacher.model(images), teacher.name).float().cpu())
    return torch.cat(found)


def _student_answers(distiller: Distiller, sample: Sample) -> Answers | None:
    found = [distiller.student(images)[0] for images, _ in sample]
    if any(logits is None for logits in found):
        return None
    logits = torch.cat(found).float().cpu()
    labels = torch.cat([labels for _, labels in sample]).cpu()
    return Answers(logits, labels, torch.arange(logits.shape[1]))


def _student_words(student: Answers | None) -> str:
    return "" if student is None else f"; the student starts at {_percent(student.accuracy)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
