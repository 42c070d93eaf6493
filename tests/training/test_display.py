"""What is shown: a bar in a terminal, plain lines elsewhere, nothing where quiet."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from kdvit.training.display import Display
from tests.training.conftest import distiller

LOSSES = {
    "task": 2.30258,
    "vitkd.mimic": 0.000123456,
    "vitkd.generate": 1234.5,
    "dkd.target": 0.5,
    "dkd.non_target": 0.25,
}


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, width: int = 80, show: bool = True) -> str:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None)
    with Display(10, first_step=3, title="student", show=show, console=console) as display:
        display.line("teacher 'vit[big]': 91.20 % top-1 " + 60 * "x")
        display.step()
        display.step(LOSSES)
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_a_bar_with_time_left_and_the_losses(monkeypatch, width):
    text = shown(monkeypatch, terminal=True, width=width)
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", text).splitlines() if line.strip()]
    bars = [line for line in lines if "5/10" in line.replace(" ", "")]
    assert re.match(r"student ━+.* 5/10 \d:\d\d:\d\d left [-\d]:[-\d]{2}:[-\d]{2}", bars[-1])
    below = " ".join(lines[lines.index(bars[-1]) + 1 :]).replace("\N{NO-BREAK SPACE}", " ")
    for value in ("task 2.3", "vitkd.mimic 0.000123", "vitkd.generate 1.23e+03", "dkd.non_target 0.25"):
        assert value in " ".join(below.split())
    assert all(len(line) <= width for line in lines if "xxx" not in line)


def test_elsewhere_there_are_plain_lines(monkeypatch):
    assert shown(monkeypatch, terminal=False) == "teacher 'vit[big]': 91.20 % top-1 " + 60 * "x" + "\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_nothing(monkeypatch, terminal):
    assert shown(monkeypatch, terminal=terminal, show=False) == ""


def test_a_quiet_run_prints_nothing(make_trainer, capfd):
    make_trainer(distiller()).fit()
    assert capfd.readouterr() == ("", "")


def test_a_run_says_how_teacher_and_student_do(make_trainer, capfd):
    result = make_trainer(distiller(), epochs=2, quiet=False, title="mine").fit()
    out = capfd.readouterr().out.splitlines()
    assert out[0] == f"teacher 'vit_tiny_patch16_224': {result.teacher_top1:.2f} % top-1"
    assert out[2] == f"mine: epoch 2/2  top-1 {result.top1:.2f} %" and len(out) == 3
