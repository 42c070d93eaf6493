"""Command-line options from a flat dataclass: one option a field, its help from the docstring."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Settings = TypeVar("Settings")


def parse(settings: type[Settings], description: str | None = None, argv: Sequence[str] | None = None) -> Settings:
    """Read a dataclass of settings from the command line.

    Args:
        settings: a dataclass; fields may be bool, int, float, str, a tuple of one type, or one of these or None.
        description: shown by ``--help``, such as the recipe's docstring.
        argv: by default what the process was called with.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, settings)
    return settings(**vars(parser.parse_args(argv)))


def add_arguments(parser: argparse._ActionsContainer, settings: type, skip: Sequence[str] = ()) -> None:
    """Add one option for each field."""
    helps, hints = _helps(settings), get_type_hints(settings)
    for item in fields(settings):
        if item.name in skip:
            continue
        default = item.default if item.default is not MISSING else item.default_factory()
        option = f"--{item.name.replace('_', '-')}"
        text = " ".join(filter(None, (helps.get(item.name), f"[{default}]"))).replace("%", "%%")
        kind, count = _kind(hints[item.name])
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            more = {"nargs": count, "action": _Tuple} if count else {}
            parser.add_argument(option, type=kind, default=default, help=text, metavar=kind.__name__.upper(), **more)


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _kind(hint: Any) -> tuple[type, int | str | None]:
    """(type of one value; how many there are in a tuple, "+" for any number, None where it is no tuple)."""
    options = [arg for arg in get_args(hint) if arg is not type(None)]
    if get_origin(hint) is tuple:
        return options[0], "+" if Ellipsis in options else len(options)
    return _kind(options[0]) if options else (hint, None)


def _helps(settings: type) -> dict[str, str]:
    """The entries of a docstring's ``Args:`` section."""
    section = re.search(r"Args:\n(.*?)(\n\s*\n|\Z)", settings.__doc__ or "", re.DOTALL)
    if section is None:
        return {}
    entries = re.findall(r"^\s+(\w+): (.*?)(?=^\s+\w+: |\Z)", section[1] + "\n", re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
