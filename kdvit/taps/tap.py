"""Forward hooks that keep what passes through a module while a capture is open, and that survive copies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class TapPoint(NamedTuple):
    """One place to read: a module path and which part of its call.

    ``part`` is ``"output"``, ``"input"`` for ``(args, kwargs)`` of the call, or ``"copied input"`` for the first of its
    arguments, copied before the module can change it in place.
    """

    path: str
    part: str = "output"


class StopForward(Exception):
    """Raised by the last tap of a model that need not run any further."""


class Caught:
    """What the taps of one model caught in the forward pass that is going on.

    ``values`` is None outside of a capture, so that an evaluation pass between two steps leaves nothing behind.
    """

    def __init__(self, num_points: int, stop_early: bool, name: str) -> None:
        self.values: dict[TapPoint, Any] | None = None
        self.versions: dict[TapPoint, int] = {}
        self.needs_graph = False
        self.num_points = num_points
        self.stop_early = stop_early
        self.name = name

    def open(self, model: nn.Module) -> dict[TapPoint, Any]:
        """Begin a capture."""
        self.values, self.versions = {}, {}
        self.needs_graph = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
        return self.values

    def keep(self, point: TapPoint, value: Any) -> None:
        if self.values is None:
            return
        if point in self.values:
            raise ValueError(
                f"{self.name}: the module at '{point.path}' must run once in a forward pass, it runs more often; "
                "choose a module that runs once, such as the block around it."
            )
        if self.needs_graph and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.name}: the module at '{point.path}' must run with a graph, or no loss trains it, but it runs "
                "under no_grad; use activation checkpointing with use_reentrant=False."
            )
        self.values[point] = value
        if isinstance(value, Tensor) and not torch.compiler.is_compiling() and not value.is_inference():
            self.versions[point] = value._version
        if self.stop_early and len(self.values) == self.num_points:
            raise StopForward

    def check(self, values: dict[TapPoint, Any]) -> None:
        """Refuse a tensor that the model changed in place after its module gave it."""
        for point, version in self.versions.items():
            if values[point]._version != version:
                raise ValueError(
                    f"{self.name}: the output at '{point.path}' must stay as its module gave it, but the model changes "
                    "it in place afterwards (a ReLU with inplace=True, or +=); choose the module that does so, or "
                    "turn it off."
                )


class Tap:
    """The hook itself. A copy or an unpickled tap is inert: it belongs to no capture (an EMA copy, a checkpoint)."""

    def __init__(self, point: TapPoint, caught: Caught | None = None) -> None:
        self.point = point
        self.caught = caught

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> None:
        if self.caught is None:
            return
        # A forward pre-hook is called with (args, kwargs), a forward hook with (args, output).
        value = {"output": rest[0], "input": (args, rest[0])}.get(self.point.part)
        self.caught.keep(self.point, args[0].clone() if self.point.part == "copied input" else value)

    def __deepcopy__(self, memo: dict) -> Tap:
        return Tap(self.point)

    def __reduce__(self) -> tuple:
        return Tap, (self.point,)


class Taps:
    """All taps of one model: one hook per place, whatever the number of losses that read there.

    Args:
        model: the model to read.
        points: where to read.
        stop_early: end the model's forward as soon as every tap has fired.
        name: how error sentences call the model.
    """

    def __init__(
        self, model: nn.Module, points: Iterable[TapPoint], *, stop_early: bool = False, name: str = "model"
    ) -> None:
        remove_inert_taps(model)
        self.points = tuple(dict.fromkeys(points))
        self.caught = Caught(len(self.points), stop_early and bool(self.points), name)
        self._handles = []
        for point in self.points:
            module = model.get_submodule(point.path)
            tap = Tap(point, self.caught)
            if point.part != "output":
                self._handles.append(module.register_forward_pre_hook(tap, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(tap))

    def run(self, model: nn.Module, images: Any) -> tuple[Any, dict[TapPoint, Any]]:
        """Call the model and return (its output, what the taps caught); the output is None if it was stopped.

        Raises:
            ValueError: a tapped module ran twice, or its output was changed in place.
            RuntimeError: a tapped module ran without a graph although the model is being trained.
        """
        values = self.caught.open(model)
        try:
            output = model(images)
        except StopForward:
            output = None
        finally:
            self.caught.values = None
        self.caught.check(values)
        return output, values

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def remove_inert_taps(model: nn.Module) -> None:
    """Drop the taps that a copy of a tapped model inherited and that catch nothing."""
    for module in model.modules():
        for hooks, with_kwargs in (
            (module._forward_hooks, {}),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [k for k, hook in hooks.items() if isinstance(hook, Tap) and hook.caught is None]:
                del hooks[key]
                with_kwargs.pop(key, None)
