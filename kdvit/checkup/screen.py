"""A checkup on one screen: at most 100 columns and 45 lines."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kdvit.checkup.findings import Checkup, Finding, LossReading, StepCost

WIDTH, HEIGHT = 100, 45
#: Colour only repeats what the mark says.
MARKS = {"ok": ("\N{CHECK MARK}", "green"), "warning": ("!", "bold yellow"), "error": ("\N{BALLOT X}", "bold red")}
_BAR_WIDTH, _TITLE_WIDTH = 24, 12


def as_text(checkup: Checkup, width: int = WIDTH) -> str:
    """The screen without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(on_screen(checkup, width))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def on_screen(checkup: Checkup, width: int) -> RenderableType:
    """The fullest form that fits on the screen; what is left out is counted, and no error or warning goes first."""
    width = min(width, WIDTH)
    troubles = [finding for finding in checkup.findings if finding.level != "ok"]
    forms = [
        _form(checkup, checkup.findings, 12, width),
        _form(checkup, checkup.findings, 5, width),
        _form(checkup, troubles, 5, width),
        *(_form(checkup, troubles[:count], 3, width) for count in range(len(troubles), 0, -1)),
    ]
    return Constrain(next((form for form in forms if _height(form, width) <= HEIGHT), forms[-1]), width)


def _height(form: RenderableType, width: int) -> int:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    return len(console.render_lines(form))


def _form(checkup: Checkup, findings: Sequence[Finding], num_losses: int, width: int) -> RenderableType:
    shown = Table.grid(padding=(0, 1), pad_edge=False)
    shown.add_column(width=1)
    shown.add_column(no_wrap=True, width=_TITLE_WIDTH)
    shown.add_column(ratio=1, overflow="fold")
    for finding in findings:
        mark, style = MARKS[finding.level]
        text = Text(_wrapped(finding.sentence, width))
        if finding.cure:
            text.append("\n" + _wrapped(f"\N{RIGHTWARDS ARROW} {finding.cure}", width), style="bold")
        shown.add_row(Text(mark, style=style), Text(finding.title, style="bold"), text)
    parts: list[RenderableType] = [Text(checkup.heading, style="bold"), Text(""), shown]
    left_out = [finding for finding in checkup.findings if finding not in findings]
    if left_out:
        titles = ", ".join(dict.fromkeys(finding.title for finding in left_out))
        parts.append(Text(f"{len(left_out)} more in .findings: {titles}", style="dim"))
    if checkup.losses:
        parts += [Text(""), _losses(checkup.losses, num_losses)]
    if checkup.cost is not None:
        parts += [Text(""), _cost(checkup.cost)]
    return Group(*parts, Text(""), _verdict(checkup))


def _losses(losses: Sequence[LossReading], limit: int) -> RenderableType:
    table = _table("loss", "value", "weight", "share of the gradient")
    for reading in losses[:limit]:
        share = reading.gradient_share
        percent, bar = ("", Text("")) if share is None else (_percent(share), _bar(share))
        table.add_row(reading.name, f"{reading.value:.4g}", f"{reading.weight:.4g}", percent, bar)
    if len(losses) > limit:
        table.add_row(f"{len(losses) - limit} more", "", "", "", "")
    return Padding(table, (0, 0, 0, 2))


def _cost(cost: StepCost) -> RenderableType:
    table = _table("a step", "ms", "", "share of the time")
    for phase, seconds in cost.seconds.items():
        share = seconds / cost.total_seconds
        table.add_row(phase, f"{1000 * seconds:.3g}", "", _percent(share), _bar(share))
    return Padding(table, (0, 0, 0, 2))


def _table(first: str, second: str, third: str, share: str) -> Table:
    """Two tables with the same columns, so that they stand under each other."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, width=18, overflow="ellipsis", no_wrap=True)
    for header, width in ((second, 8), (third, 8), ("", 7)):
        table.add_column(header, justify="right", width=width, no_wrap=True)
    table.add_column(share, width=_BAR_WIDTH, no_wrap=True)
    return table


def _wrapped(sentence: str, width: int) -> str:
    """In lines for the last column, where a number stays with its unit: rich would break at a no-break space."""
    joined = re.sub(r"(?<=\d) (?=%|ms\b|s\b|min\b|h\b|days\b|MiB\b)", "\N{NO-BREAK SPACE}", sentence)
    lines = textwrap.wrap(joined, width - _TITLE_WIDTH - 3, break_on_hyphens=False)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _bar(share: float) -> Text:
    return Text("\N{FULL BLOCK}" * math.ceil(share * _BAR_WIDTH - 0.5), style="cyan")


def _verdict(checkup: Checkup) -> Text:
    def counted(number: int, word: str) -> str:
        return f"{number} {word}{'s' if number != 1 else ''}"

    counts = f"{counted(len(checkup.errors), 'error')}, {counted(len(checkup.warnings), 'warning')}"
    if checkup.errors:
        return Text(f"{counts}: not ready to train", style="bold red")
    if checkup.warnings:
        return Text(f"{counts}: look at them before you train", style="bold yellow")
    return Text(f"{counts}: ready to train", style="bold green")
