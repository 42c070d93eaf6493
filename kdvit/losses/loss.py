"""The contract of a loss, and the one registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import nn

from kdvit.signals import LOCATED_SIGNALS, SIGNALS, Location, ModelInfo, nearest

#: Inputs of a loss that are not signals of a model.
CONTEXT_INPUTS = ("labels", "images", "sample_ids", "progress")

_registry: dict[str, type[Loss]] = {}


class Loss(nn.Module):
    """One distillation method: its inputs are the parameters of its ``forward``.

    A parameter is a signal name with ``student_`` or ``teacher_`` in front (``student_logits``), or one of
    ``labels``, ``images``, ``sample_ids``, ``progress``. A parameter that has a default is for direct callers
    (an injected mask or noise) and is never filled by the `kdvit.Distiller`.

    A subclass overrides `forward`; `locations` when it reads at blocks or stages; `build` when it has projectors
    or needs the geometry of what it reads. Its own parameters are trained with the student and never exported.

    ``forward`` returns a scalar, or a dict of named scalars that are added up.
    """

    name: ClassVar[str] = ""

    def locations(self) -> Mapping[str, Location | Sequence[Location]]:
        """Where each located input is read: ``{"student_tokens": -1, "teacher_tokens": (0, 1)}``.

        With one location ``forward`` receives a tensor, with a sequence a tuple of tensors.
        """
        return {}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Make projectors and check geometry, from real sizes and before the optimizer exists."""

    def inputs(self) -> tuple[str, ...]:
        """The names of what ``forward`` must be given; overridden where an option decides what is read."""
        parameters = inspect.signature(self.forward).parameters.values()
        return tuple(p.name for p in parameters if p.default is p.empty)

    def __repr__(self) -> str:
        """The call that makes this loss, from the arguments that it keeps under their own names."""
        arguments = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in arguments)})"


def register(name: str) -> Callable[[type[Loss]], type[Loss]]:
    """Class decorator that makes a loss known by a unique lower-case name.

    Raises:
        ValueError: the name is not lower case, or is taken.
        TypeError: the class is no `Loss`, or an input of its ``forward`` is not a known signal.
    """

    def decorate(cls: type[Loss]) -> type[Loss]:
        if not (isinstance(cls, type) and issubclass(cls, Loss)):
            raise TypeError(f"register('{name}'): the class must be a subclass of kdvit.losses.Loss, got {cls!r}.")
        if not name.isidentifier() or name != name.lower():
            raise ValueError(f"register: name must be a lower-case identifier, got '{name}'.")
        if name in _registry:
            raise ValueError(f"register: name '{name}' is taken by {_registry[name].__qualname__}; choose another.")
        for parameter in list(inspect.signature(cls.forward).parameters.values())[1:]:
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
                check_input(parameter.name, cls.__name__)
        cls.name = name
        _registry[name] = cls
        return cls

    return decorate


def check_input(name: str, owner: str) -> None:
    """Refuse an input that is neither a signal of the student or teacher nor part of the context."""
    side, _, signal = name.partition("_")
    if name in CONTEXT_INPUTS or (side in ("student", "teacher") and signal in SIGNALS):
        return
    known = [f"{s}_{n}" for s in ("student", "teacher") for n in SIGNALS] + list(CONTEXT_INPUTS)
    raise TypeError(f"{owner}: forward has an unknown input '{name}'{nearest(name, known)} Known: {', '.join(known)}.")


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_registry)


def get(name: str) -> type[Loss]:
    """The class registered under a name.

    Raises:
        ValueError: no such name; the sentence has the nearest match and the list.
    """
    if name not in _registry:
        raise ValueError(f"unknown loss '{name}'{nearest(name, _registry) or ';'} Known: {', '.join(names())}.")
    return _registry[name]


def make(name: str, *, standardize: bool = False, **options) -> Loss:
    """Make a loss by its registered name.

    Args:
        name: registered name, see `names`.
        standardize: z-score the logits before the loss sees them (`kdvit.losses.Standardized`).
        options: constructor arguments of the loss.

    Raises:
        ValueError: unknown name or option; the sentence has the nearest match and the list.

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
    loss = cls(**options)
    if not standardize:
        return loss
    from kdvit.losses.standardized import Standardized  # here, because it is itself a Loss

    return Standardized(loss)


def needs(loss: Loss, side: str) -> dict[str, Location | Sequence[Location] | None]:
    """What a loss reads of one side: ``{signal: location(s) or None}``.

    Raises:
        TypeError: an input is unknown, or a located signal has no location (an error of the loss's author).
    """
    wanted: dict[str, Location | Sequence[Location] | None] = {}
    locations = loss.locations()
    inputs = loss.inputs()
    for name in inputs:
        check_input(name, type(loss).__name__)
        input_side, _, signal = name.partition("_")
        if input_side != side or name in CONTEXT_INPUTS:
            continue
        if signal in LOCATED_SIGNALS and name not in locations:
            raise TypeError(f"{type(loss).__name__}: locations() must say where '{name}' is read.")
        wanted[signal] = locations.get(name)
    stray = [name for name in locations if name not in inputs]
    if stray:
        raise TypeError(f"{type(loss).__name__}: locations() names {stray}, which forward does not take.")
    return wanted


def reads_teacher(loss: Loss) -> bool:
    """Whether the loss needs a teacher at all."""
    return any(name.startswith("teacher_") for name in loss.inputs())
