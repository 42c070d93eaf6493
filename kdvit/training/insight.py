"""What teacher and student make of a few test images, and how alike their layers are: kept for the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.data import ImageSplit, TransformSettings
from kdvit.data.randomness import preserved_generators
from kdvit.deployment import DeployedStudent
from kdvit.distiller import Distiller
from kdvit.files import whole_folder
from kdvit.similarity import layer_similarity
from kdvit.taps.family import logits_of
from kdvit.training.attention_maps import attention_maps
from kdvit.wrappers import Student, Teacher

#: How many classes are kept of each prediction.
NUM_PREDICTIONS = 3
#: Larger images are kept at this size, so that the folder stays below 2 MiB.
MAX_PIXELS = 224
_BATCH_SIZE = 16


def sample_batch(split: ImageSplit, transform: TransformSettings, num_images: int = 64) -> tuple[Tensor, Tensor]:
    """(images (n, C, H, W), labels (n,)) for `write_insight`: any first k of them show as many classes as k can."""
    indices = spread_indices(split.labels, num_images)
    evaluate = transform.evaluation()
    return torch.stack([evaluate(split.image(index)) for index in indices]), torch.tensor(split.labels[indices])


def spread_indices(labels: np.ndarray, count: int) -> list[int]:
    """``count`` samples, or all: one of every class, then another of every class; neighbours in the class list apart.

    Example:
        >>> spread_indices(np.array([0, 0, 0, 1, 1, 2, 2, 3]), 6)
        [0, 5, 3, 7, 1, 6]
    """
    by_class = np.argsort(labels, kind="stable")
    rank = np.empty(len(labels), dtype=np.int64)  # how many of its class come before a sample
    rank[by_class] = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])
    classes, of_class = np.unique(labels, return_inverse=True)
    # Class numbers with their bits reversed: every beginning of 0, 4, 2, 6, 1, ... is spread over the whole range.
    width = len(classes).bit_length()
    turn = np.array([int(f"{number:0{width}b}"[::-1], 2) for number in range(len(classes))])
    return np.lexsort((turn[of_class], rank))[:count].tolist()


@torch.no_grad()
def write_insight(
    distiller: Distiller,
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    folder: str | Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    model: nn.Module | None = None,
    num_shown: int = 8,
) -> None:
    """Write ``insight.safetensors`` and ``insight.json`` into ``folder``, whole or not at all; below 2 MiB.

    Called by the main process alone, at the end of a run. Of several teachers the first is looked at. What a model
    does not give (a stored teacher, a plain module without stages), or fails at, is left out, and the reason is kept:
    a finished run does not fail for want of its pictures. Both models run in eval mode and without a graph, and are
    left as they were: modes, statistics, taps, generators.

    Args:
        distiller: of the run.
        images: (n, C, H, W), transformed for evaluation, see `sample_batch`. The first ``num_shown`` are kept and
            looked at; all of them, 4 or more, tell how alike the layers are.
        labels: (n,) class ids.
        class_names: of the data.
        folder: replaced where it exists.
        mean: of the images' normalisation, one value or one for each channel.
        std: the same.
        model: what is looked at in the student's place: the average of its weights, where there is one.
        num_shown: how many images are kept.

    Raises:
        ValueError: ``images`` and ``labels`` are not as above.
        OSError: the folder cannot be written.
    """
    if images.ndim != 4 or not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"write_insight: images and labels must be (n, C, H, W) and (n,), got {tuple(images.shape)} and "
            f"{tuple(labels.shape)}; give one label for each image."
        )
    teacher = distiller.teacher
    student = distiller.student if model is None else _around(distiller.student, model)
    deployed = distiller.deployable if model is None else model
    images = images.to(next(student.parameters(), images).device)
    shown = images[:num_shown]
    with preserved_generators(), _in_eval_mode(student, deployed, *distiller.teachers):
        predict = {"student": lambda x: logits_of(deployed(x), student.name)}
        models = {"student": student}
        if isinstance(teacher, Teacher):
            predict["teacher"], models["teacher"] = teacher.predict, teacher
        facts = {side: _facts_of(each, predict[side], shown, class_names) for side, each in models.items()}
        similarity, tensors = _similarity(student, teacher, images)
    for side in models:
        tensors |= {f"{side}.{index}": values for index, values in enumerate(facts[side].pop("maps"))}
    if teacher is not None and "teacher" not in facts:
        reason = f"the outputs of '{teacher.name}' were stored: the model itself was not at hand"
        facts["teacher"] = {"name": teacher.name, "kind": None, "layers": [], "note": reason, "predictions": None}
    record = {
        "format": 1,
        "labels": [class_names[label] for label in labels[:num_shown].tolist()],
        "student": facts["student"],
        "teacher": facts.get("teacher"),
        "similarity": similarity,
    }
    tensors["images"] = _pixels(shown, mean, std)
    with whole_folder(Path(folder)) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary / "insight.safetensors")
        (temporary / "insight.json").write_text(json.dumps(record) + "\n")


def _around(student: Student, model: nn.Module) -> Student:
    """A Student around another copy of the model, which may be deployed with a loss's projector."""
    inner = model.student.model if isinstance(model, DeployedStudent) else model
    return Student(inner, input_size=student.input_size, name=student.name, **student.geometry)


def _facts_of(
    wrapper: Student | Teacher, predict: Callable[[Tensor], Tensor], images: Tensor, class_names: Sequence[str]
) -> dict[str, Any]:
    facts = {"name": wrapper.name, "kind": None, "layers": [], "note": None, "maps": (), "predictions": None}
    try:
        facts["predictions"] = _predictions(predict, images, class_names)
    except Exception as error:  # of a model that nobody foresaw, or for want of memory
        facts["note"] = f"no predictions: {_reason(error)}"
    try:
        found = attention_maps(wrapper, images)
        facts |= {"kind": found.kind, "layers": found.layers, "maps": found.maps}
    except Exception as error:  # a plain module, or one that nobody foresaw; the report says why there are no maps
        facts["note"] = _reason(error)
    return facts


def _reason(error: Exception) -> str:
    """A refusal is a sentence; another error says its kind too, and may go on for pages."""
    if isinstance(error, ValueError):
        return str(error)
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _predictions(
    predict: Callable[[Tensor], Tensor], images: Tensor, class_names: Sequence[str]
) -> list[list[tuple[str, float]]] | None:
    """For each image the likeliest classes and their probabilities; None without a classifier of these classes."""
    try:
        logits = predict(images)
    except TypeError:  # a backbone
        return None
    if logits.shape[1] != len(class_names):
        return None
    if not logits.isfinite().all():
        raise ValueError("its logits are NaN or infinite")
    top = logits.float().softmax(1).topk(min(NUM_PREDICTIONS, len(class_names)))
    return [
        [(class_names[index], round(value, 4)) for index, value in zip(indices, values, strict=True)]
        for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _similarity(
    student: Student, teacher: Teacher | None, images: Tensor
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    if not isinstance(teacher, Teacher):
        return None, {}
    facts = {"num_images": len(images), "student_layers": [], "teacher_layers": [], "note": None}
    try:
        found = layer_similarity(student, teacher, images.split(_BATCH_SIZE))
    except Exception as error:  # as for the maps
        return {**facts, "note": _reason(error)}, {}
    facts |= {"student_layers": found.student_layers, "teacher_layers": found.teacher_layers}
    return facts, {"cka": found.cka.float(), "relation_distance": found.relation_distance.float()}


def _pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(n, 1 or 3, h, w) uint8, as the images were before they were normalised."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    images = images.float() * std + mean
    images = images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)
    if max(images.shape[2:]) > MAX_PIXELS:
        shrink = MAX_PIXELS / max(images.shape[2:])
        images = F.interpolate(images, [max(1, round(axis * shrink)) for axis in images.shape[2:]], mode="area")
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def _in_eval_mode(*models: nn.Module) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
