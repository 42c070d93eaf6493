"""The page behind `Distiller.describe`."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from kdvit.cache.teacher import StoredTeacher
from kdvit.cost import human, num_macs, num_parameters
from kdvit.deployment import DeployedStudent
from kdvit.losses.loss import SIDES, Loss, split_input
from kdvit.schedules import Schedule

if TYPE_CHECKING:
    from kdvit.distiller import Distiller
    from kdvit.wrappers import Wrapper


def describe(distiller: Distiller, width: int = 120) -> str:
    """Models, losses with what they read and train, bridges, and parameters that no loss reaches."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    models = _table("models", "", "model", "input", "parameters", "MACs", "normalisation")
    numbers = [f" {number}" for number, _ in enumerate(distiller.teachers, 1)] if len(distiller.teachers) > 1 else [""]
    models.add_row("student", *_model_row(distiller.student))
    for number, teacher in zip(numbers, distiller.teachers):
        models.add_row(f"teacher{number}", *_model_row(teacher))
    console.print(models)
    losses = _table("losses", "loss", "weight", "reads", "at", "shape", "trains")
    if distiller.task_loss is not None:
        losses.add_row("task", _weight(distiller, "task"), "student logits, labels", "output", "", "")
    for name, loss in distiller.losses.items():
        rows = [
            (f"{side}{number} {request.signal}", info.location, "x".join(map(str, info.shape)) or "function")
            for side in ("student", "teacher")
            for number, signals in zip([""] if side == "student" else numbers, distiller.signals[side])
            for request, info in signals.items()
            if request.signal in distiller.needs[side][name] and _wanted(distiller, side, name, request)
        ]
        rows += [(extra, "", "") for extra in loss.inputs() if split_input(extra)[0] not in SIDES]
        own = sum(parameter.numel() for parameter in _trained(loss))
        for index, row in enumerate(rows):
            first = (name, _weight(distiller, name)) if index == 0 else ("", "")
            losses.add_row(*first, *row, (human(own) if own else "nothing") if index == 0 else "")
        losses.add_section()
    console.print(losses)
    if isinstance(distiller.deployable, DeployedStudent):
        deployed = distiller.deployable
        size, name = human(num_parameters(deployed)), deployed.loss.name
        console.print(
            f"deployed: the student with the modules of {name} and the teacher's classifier, {size} parameters"
        )
    for number, teacher in zip(numbers, distiller.teachers):
        name = f"{number} '{teacher.name}'" if number else ""
        console.print(f"image bridge, student to teacher{name}: {teacher.bridge.describe()}")
        if teacher.class_map is not None:
            console.print(f"the classes of the teacher{name}, in the student's order: {teacher.class_map.tolist()}")
    unreached = distiller.parameters_without_gradient
    reach = f"{len(unreached)} tensors, first {unreached[0]}" if unreached else "none"
    console.print(f"trainable parameters that no loss reaches: {reach}")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _table(title: str, *headers: str) -> Table:
    """Narrow enough for a terminal of 80 columns: no lines between columns."""
    narrow = {"box": box.HORIZONTALS, "collapse_padding": True, "pad_edge": False}
    return Table(*headers, title=title, title_justify="left", **narrow)


def _wanted(distiller: Distiller, side: str, name: str, request: object) -> bool:
    from kdvit.taps.reader import requests_of

    wanted = distiller.needs[side][name]
    return any(request in requests_of(signal, location) for signal, location in wanted.items())


def _trained(loss: Loss) -> list[nn.Parameter]:
    """What learns in a loss: not the copy of a teacher's classifier, nor an autoencoder that was fitted before."""
    optimizer = loss.meta_optimizer()
    meta = [p for group in optimizer.param_groups for p in group["params"]] if optimizer is not None else []
    return [*meta, *(p for p in loss.parameters() if p.requires_grad)]


def _model_row(wrapper: Wrapper | StoredTeacher) -> tuple[str, ...]:
    size = "x".join(map(str, wrapper.input_size))
    normalisation = "not known"
    if wrapper.normalisation:
        normalisation = " / ".join(",".join(f"{value:.3g}" for value in values) for values in wrapper.normalisation)
    if isinstance(wrapper, StoredTeacher):
        return wrapper.name, size, human(wrapper.num_parameters), "stored", normalisation
    macs = human(num_macs(wrapper.model, wrapper.input_size))
    return wrapper.name, size, human(num_parameters(wrapper.model)), macs, normalisation


def _weight(distiller: Distiller, name: str) -> str:
    weight = distiller.weights[name]
    if isinstance(weight, Schedule):
        return repr(weight)
    return "function" if callable(weight) else f"{weight:g}"
