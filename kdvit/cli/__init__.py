"""The command ``kdvit``: for people who write no Python."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from kdvit import __version__
from kdvit.signals import nearest

#: Command -> (module with ``main(argv)``, one line of help). A module is imported when its command is called.
COMMANDS = {
    "quickstart": ("kdvit.cli.quickstart", "train a small ViT alone and distilled, on images inside the package"),
    "distill": ("kdvit.cli.distill", "distil a teacher into a student on your images"),
    "evaluate": ("kdvit.cli.evaluate", "how good a student is, and how close to its teacher"),
    "compare": ("kdvit.cli.compare", "the student alone and distilled, over several seeds"),
    "doctor": ("kdvit.cli.doctor", "look such a training over before it starts, on a few batches"),
    "report": ("kdvit.cli.report", "one page to look at: curves, maps, layers, of one run or several"),
    "cache": ("kdvit.cli.cache", "store what a teacher says, and train without running it"),
    "list": ("kdvit.cli.listing", "what there is: losses, models, data"),
}

_USAGE = """usage: kdvit COMMAND [options]

Knowledge distillation for vision transformers: a big model teaches a small one.

{commands}

kdvit COMMAND --help   the options of a command
kdvit --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. What a user got wrong is one sentence and exit code 2; KDVIT_TRACEBACK=1 shows where it arose."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE.format(commands="\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())))
        return 0
    if argv[0] == "--version":
        print(f"kdvit {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return _fail(f"unknown command '{argv[0]}'{nearest(argv[0], COMMANDS) or ';'} Known: {', '.join(COMMANDS)}.")
    try:
        # A command that finds something wrong, but does what it was asked, says so by a code of its own.
        return import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0
    except (ValueError, TypeError, RuntimeError) as error:
        if os.environ.get("KDVIT_TRACEBACK"):
            raise
        # A loader process hands its traceback on; the sentence is the last line of it.
        return _fail(str(error).strip().splitlines()[-1])
    except KeyboardInterrupt as stop:
        # A run that saved its state says so itself, and which signal it was.
        return _fail(str(stop) or "stopped.", code=128 + getattr(stop, "number", signal.SIGINT))
    return 0


def _fail(sentence: str, code: int = 2) -> int:
    print(f"kdvit: {sentence}", file=sys.stderr)
    return code
