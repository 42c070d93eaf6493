"""Losses and model options as they are typed on the command line."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

from kdvit.losses import Loss, make
from kdvit.schedules import Cosine, Linear, Schedule, Steps, WarmUp

_SCHEDULES = {cls.__name__: cls for cls in (WarmUp, Steps, Linear, Cosine)}


def parse_options(text: str, owner: str) -> dict[str, Any]:
    """``"alpha=1,beta=8,kind=hard"`` -> ``{"alpha": 1, "beta": 8, "kind": "hard"}``; only literals, nothing is run.

    Raises:
        ValueError: not of this form, or a name is given twice.
    """
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise _NotAnOption
        options = {keyword.arg: _value(keyword.value) for keyword in call.keywords}
        if len(options) < len(call.keywords):
            raise _NotAnOption
        return options
    except (SyntaxError, _NotAnOption) as error:
        rule = "options must be NAME=VALUE,NAME=VALUE, each once"
        raise ValueError(f"{owner}: {rule}, got '{text}'; put paths into quotes, and see --help.") from error


class _NotAnOption(Exception):
    """Text that is no literal, or no option at all."""


def _value(node: ast.expr) -> Any:
    """A literal, a bare word, or one of the schedules; what a schedule says of its arguments is passed on."""
    if isinstance(node, ast.Name):  # a bare word is a string, but nobody means the string "false"
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SCHEDULES:
        cls, values = _SCHEDULES[node.func.id], {keyword.arg: _value(keyword.value) for keyword in node.keywords}
        arguments = [_value(argument) for argument in node.args]
        try:
            inspect.signature(cls).bind(*arguments, **values)
        except TypeError as error:  # arguments that it does not have
            raise _NotAnOption from error
        return cls(*arguments, **values)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise _NotAnOption from error


def parse_loss(text: str) -> tuple[float | Schedule, Loss]:
    """``[WEIGHT*]NAME[:OPTIONS]``, such as ``dkd``, ``0.5*dkd:beta=2,temperature=1`` or ``9*kd:standardize=True``.

    The weight, and any number among the options, may be one of `kdvit.schedules`: ``WarmUp(8,epochs=20)*ntce``.

    Example:
        >>> parse_loss("0.5*kd:temperature=2")
        (0.5, KD(temperature=2.0))
        >>> parse_loss("WarmUp(2, epochs=5)*kd:temperature=Linear(8, 2)")
        (WarmUp(value=2, epochs=5), Scheduled(KD(temperature=8.0), temperature=Linear(start=8, end=2)))
    """
    match = re.fullmatch(r"(?:(.+?)\*)?\s*(\w+)(?::(.*))?", text.strip())
    if match is None:
        raise ValueError(f"--loss must be [WEIGHT*]NAME[:OPTION=VALUE,...], got '{text}'; try 0.5*dkd:beta=2.")
    weight, name, options = match.groups()
    swapped = name.isdecimal() and weight is not None
    cure = f"the weight comes first: {name}*{weight}." if swapped else f"try 0.5*{name}."
    weight = parse_weight(weight or "1.0", "--loss", f" in '{text}'; {cure}")
    return weight, make(name, **parse_options(options or "", f"--loss {name}"))


def parse_weight(text: str, option: str = "--task-weight", advice: str = "; try 0.5.") -> float | Schedule:
    """A number or a schedule: ``0.5``, ``Steps({0: 0, 50: 1})``."""
    try:
        return float(text)
    except ValueError:
        pass  # it may be a schedule
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, _NotAnOption):
        value = None
    if not isinstance(value, Schedule):
        known = ", ".join(_SCHEDULES)
        raise ValueError(f"{option}: the weight must be a number or a schedule ({known}), got '{text}'{advice}")
    return value
