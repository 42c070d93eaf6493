"""Options whose mistakes are one sentence, like every other error."""

from __future__ import annotations

import argparse
import re
from difflib import get_close_matches
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Raises a ValueError, with the nearest known option, where argparse would print the whole usage."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0.7) if unknown else []
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ValueError(f"{message}; {hint}see `{self.prog} --help`.")
