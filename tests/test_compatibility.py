"""Every method between models of every kind: docs/compatibility.md is what comes of trying it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from kdvit import losses
from kdvit.losses import Mismatch
from kdvit.losses.loss import split_input
from kdvit.signals import CALLABLE_SIGNALS, CLASS_SIGNALS

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        import compatibility_page
    finally:
        sys.path.remove(str(TOOLS))
    return compatibility_page


@pytest.fixture(scope="module")
def cells(tool) -> dict:
    """What works: the tool raises where a loss or its gradient is not finite, or where the student gets none."""
    return tool.table()


def column(tool: ModuleType, cells: dict, what: str) -> dict[str, str | None]:
    index = [name for _, _, name in tool.PAIRS].index(what)
    return {row: found[index].refusal for row, found in cells.items()}


def test_page_is_current(tool, cells):
    assert tool.PAGE.read_text() == tool.page(cells), "run `python tools/compatibility_page.py`"


def test_every_method_is_there_and_works_somewhere(tool, cells):
    rows = {row.partition(",")[0] for row in cells}
    assert rows == set(losses.names())
    for name in rows:
        own = [cell for row, found in cells.items() if row.partition(",")[0] == name for cell in found]
        assert any(cell.refusal is None for cell in own), name


def test_every_refusal_is_a_sentence_that_says_what_to_do(tool, cells):
    refusals = {cell.refusal for found in cells.values() for cell in found if cell.refusal is not None}
    assert refusals and all(map(tool.is_sentence, refusals)), [r for r in refusals if not tool.is_sentence(r)]


@pytest.mark.parametrize("what", ["P=1 from P=5", "width", "depth"])
def test_vits_of_other_prefix_width_and_depth_teach_by_every_method(tool, cells, what):
    refused = {row for row, refusal in column(tool, cells, what).items() if refusal is not None}
    no_dist_head = {"deit", "cskd"}
    needs_more = {"dino_heads", "mekd", "simkd"}  # a head, a generator, and a classifier behind the mean (or "pooled")
    assert refused == no_dist_head | needs_more


def test_without_a_class_token_what_needs_one_is_refused(tool, cells):
    refused = column(tool, cells, "P=0 from P=5")
    more = {row for row, refusal in refused.items() if refusal is not None}
    more -= {row for row, refusal in column(tool, cells, "P=1 from P=5").items() if refusal is not None}
    assert more and all("class token" in refused[row] for row in more)


def test_what_differs_is_said_by_every_method_that_reads_features():
    for name in losses.names():
        cls = losses.get(name)
        signals = {split_input(parameter)[1] for parameter in _inputs(cls)}
        compares = {s for s in signals if s not in (*CLASS_SIGNALS, *CALLABLE_SIGNALS)}
        reads_both = all(
            any(split_input(p) == (side, s) for p in _inputs(cls) for s in compares) for side in ("student", "teacher")
        )
        assert not reads_both or cls.mismatch != Mismatch(), name


def _inputs(cls: type) -> tuple[str, ...]:
    return tuple(name for name in cls().inputs() if name.startswith(("student_", "teacher")))
