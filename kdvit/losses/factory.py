"""Losses by name, with the options that all of them have."""

from __future__ import annotations

import inspect

from kdvit.losses.loss import Loss, get
from kdvit.losses.scheduled import Scheduled
from kdvit.losses.standardized import Standardized
from kdvit.schedules import Schedule
from kdvit.signals import Progress, nearest


def make(name: str, *, standardize: bool = False, **options) -> Loss:
    """Make a loss by its registered name.

    Args:
        name: registered name, see `names`.
        standardize: z-score the logits before the loss sees them (`kdvit.losses.Standardized`).
        options: constructor arguments of the loss; a number may be one of `kdvit.schedules` (`Scheduled`).

    Raises:
        ValueError: unknown name or option; the sentence has the nearest match.

    Example:
        >>> make("kd", temperature=4.0)
        KD(temperature=4.0)
    """
    cls = get(name)
    known = [*inspect.signature(cls).parameters, "standardize"]
    for option in options:
        if option not in known:
            hint = nearest(option, known) or ";"
            raise ValueError(f"{name}: unknown option '{option}'{hint} Known: {', '.join(known)}.")
    if not isinstance(standardize, bool):
        raise TypeError(f"{name}: standardize must be True or False, got {standardize!r}; write one of them.")
    schedules = {name: value for name, value in options.items() if isinstance(value, Schedule)}
    # Made with what its schedules begin with, so that it checks them as it does a number.
    loss = cls(**options | {name: schedule(Progress()) for name, schedule in schedules.items()})
    loss = Scheduled(loss, **schedules) if schedules else loss
    return Standardized(loss) if standardize else loss
