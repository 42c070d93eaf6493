"""Experiment trackers of Accelerate, by name: TensorBoard, Weights & Biases, MLflow and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from kdvit.signals import nearest


def check_trackers(names: Sequence[str]) -> list[str]:
    """Refuse names that Accelerate does not know or that are not installed: it would leave them out silently.

    Raises:
        ValueError: such a name.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise ValueError(
                f"Training: unknown tracker '{name}'{nearest(name, LOGGER_TYPE_TO_CLASS) or ';'} Known: {known}."
            )
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"Training: tracker '{name}' must be installed; pip install {name.replace('_', '-')}.")
    return list(names)


def start_trackers(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Begin the trackers' records, with the settings that they can show: numbers, strings and booleans."""
    if accelerator.log_with:
        config = {
            name: value if isinstance(value, (int, float, str)) else str(value) for name, value in settings.items()
        }
        accelerator.init_trackers("kdvit", config=config)


def track(accelerator: Accelerator, values: Mapping[str, Any], step: int) -> None:
    """Hand one line of metrics on, nested values as ``losses/kd``; does nothing where there are no trackers."""
    if not accelerator.log_with:
        return
    flat: dict[str, float] = {}
    for name, value in values.items():
        flat |= {f"{name}/{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
    accelerator.log(flat, step=step)


def finish_trackers(accelerator: Accelerator) -> None:
    """End the records. Accelerate's own `end_training` ends the process group too, which another run may need."""
    for tracker in accelerator.trackers:
        tracker.finish()
