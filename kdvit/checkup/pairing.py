"""How student, teachers and losses were put together: bridges, classes, signals, projectors, frozen parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdvit.cache.teacher import StoredTeacher
from kdvit.checkup.findings import Finding
from kdvit.checkup.wording import counted, listed
from kdvit.cost import human
from kdvit.distiller import Distiller
from kdvit.signals import SignalInfo
from kdvit.wrappers import Teacher, Wrapper


def look_at_pair(distiller: Distiller) -> Iterator[Finding]:
    """What the Distiller settled on when it was made; no image is needed."""
    yield _bridges(distiller)
    yield _classes(distiller)
    yield _signals(distiller)
    yield _projectors(distiller)
    yield from _frozen(distiller)


def look_at_images(distiller: Distiller, images: Tensor) -> Iterator[Finding]:
    """Whether a batch has the values that the student's normalisation can give."""
    if not images.isfinite().all():
        yield Finding("error", "images", "a batch of images holds NaN or infinity.", "look at what the loader gives.")
        return
    flat = images.flatten(1)
    blank = (flat.amax(1) == flat.amin(1)).nonzero().flatten().tolist()
    if blank:
        yield Finding(
            "warning",
            "images",
            f"{counted(len(blank), 'image')} of the first batch of {len(images)} have one value throughout "
            f"(first: number {blank[0]}).",
            "look at what the loader gives.",
        )
    if distiller.student.normalisation is None:
        return
    mean, std = map(torch.tensor, distiller.student.normalisation)
    low, high = (-mean / std).min().item(), ((1 - mean) / std).max().item()
    least, most = images.min().item(), images.max().item()
    slack = high - low  # noise, mixing and resizing overshoot; pixels of 0..255 are far beyond
    if least < low - slack or most > high + slack or (least >= 0 and most <= 1 and low < -0.5 and len(blank) == 0):
        yield Finding(
            "warning",
            "images",
            f"their values lie in {least:.3g}..{most:.3g}, but normalised for the student (mean {_values(mean)}, std "
            f"{_values(std)}) they lie in {low:.3g}..{high:.3g}.",
            "normalise the images with the student's mean and std, after scaling pixels to 0..1.",
        )


def _bridges(distiller: Distiller) -> Finding:
    student = distiller.student
    parts = [f"student {_size(student)}, {_normalisation(student)}"]
    for teacher in distiller.teachers:
        steps = teacher.bridge.describe()
        done = "nothing to convert" if steps == "none" else f"{steps} -> {_size(teacher)}, {_normalisation(teacher)}"
        half = ""
        if isinstance(teacher, Teacher) and teacher.dtype is not None:
            half = f", in {str(teacher.dtype).removeprefix('torch.')}"
        unknown = " (it states no normalisation)" if teacher.normalisation is None else ""
        parts.append(f"to {_called(distiller, teacher)}: {done}{unknown}{half}")
    return Finding("ok", "bridge", "; ".join(parts))


def _classes(distiller: Distiller) -> Finding:
    own = f"{distiller.num_classes}" if distiller.num_classes is not None else "none"
    mapped = [teacher for teacher in distiller.teachers if teacher.class_map is not None]
    maps = [f"class map of {_called(distiller, teacher)} {_shortened(teacher.class_map)}" for teacher in mapped]
    return Finding("ok", "classes", "; ".join([own, *(maps or ["no class map"])]))


def _signals(distiller: Distiller) -> Finding:
    parts = []
    student = _shapes(distiller.signals["student"][0].values())
    parts.append(f"student {student or 'none'}")
    for teacher, signals in zip(distiller.teachers, distiller.signals["teacher"], strict=True):
        parts.append(f"{_called(distiller, teacher)} {_shapes(signals.values()) or 'none'}")
    return Finding("ok", "signals", "; ".join(parts))


def _projectors(distiller: Distiller) -> Finding:
    sizes = {
        name: sum(p.numel() for p in loss.parameters() if p.requires_grad) for name, loss in distiller.losses.items()
    }
    found = [f"{name} {human(size)}" for name, size in sizes.items() if size]
    trained = f"{listed(found, 6)} parameters, trained with the student and not shipped" if found else "none"
    return Finding("ok", "projectors", trained)


def _frozen(distiller: Distiller) -> Iterator[Finding]:
    # A fixed sine-cosine position embedding is a parameter without a gradient by design.
    frozen = {
        name: p
        for name, p in distiller.student.model.named_parameters()
        if not p.requires_grad and "pos_embed" not in name
    }
    if frozen:
        all_of = sum(p.numel() for p in distiller.student.model.parameters())
        size = sum(p.numel() for p in frozen.values())
        yield Finding(
            "warning",
            "frozen",
            f"{counted(len(frozen), 'tensor')} of the student ({human(size)} of {human(all_of)} parameters) are not "
            f"trained: {listed(frozen)}.",
            "call student.requires_grad_(True), unless that is meant.",
        )


def _called(distiller: Distiller, teacher: Teacher | StoredTeacher) -> str:
    return "teacher" if len(distiller.teachers) == 1 else f"'{teacher.name}'"


def _size(wrapper: Wrapper | StoredTeacher) -> str:
    return "x".join(map(str, wrapper.input_size))


def _normalisation(wrapper: Wrapper | StoredTeacher) -> str:
    if wrapper.normalisation is None:
        return "normalisation not known"
    return "mean {} std {}".format(*map(_values, wrapper.normalisation))


def _values(values: object) -> str:
    return "/".join(f"{float(value):.3g}" for value in values)


def _shapes(infos: object) -> str:
    """``tokens@blocks.3 50x192, logits 10``; locations of one signal and shape together."""
    grouped: dict[tuple[str, str], list[str]] = {}
    info: SignalInfo
    for info in infos:
        shape = "x".join(map(str, info.shape)) or "function"
        grouped.setdefault((info.signal, shape), []).append(info.location)
    shown = []
    for (signal, shape), places in grouped.items():
        where = "" if places == ["output"] else f" at {listed(places, 2)}"
        shown.append(f"{signal} {shape}{where}")
    return listed(shown, 4)


def _shortened(class_map: Tensor) -> str:
    classes = class_map.tolist()
    return str(classes) if len(classes) <= 10 else f"of {len(classes)}: {str(classes[:6])[:-1]}, ...]"
