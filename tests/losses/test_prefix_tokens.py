"""Prefix tokens of any number on either side: none of them gets into a patch grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdvit.losses.loss import split_input
from tests.losses.cases import CASES, Case, example
from tests.losses.test_contract import run

#: Signals whose token axis begins with prefix tokens, and that axis.
TOKEN_AXIS = {
    **dict.fromkeys(("tokens", "normed_tokens"), 1),
    **dict.fromkeys(("query", "key", "value", "cls_attention", "attention"), 2),
}
#: A teacher's tail runs on the teacher's own prefix tokens: there they belong.
READS_PREFIX = {
    name: case
    for name, case in CASES.items()
    if "teacher_tail" not in case.make().inputs()
    and any(side != "student" and signal in TOKEN_AXIS for side, signal in map(split_input, case.make().inputs()))
}
every_reader = pytest.mark.parametrize("case", READS_PREFIX.values(), ids=READS_PREFIX)


def values(case: Case, prefix: dict[str, int], edit: Any = None) -> dict[str, Tensor]:
    """The terms of a loss that is built for so many prefix tokens, with its inputs edited."""
    loss = case.make()
    torch.manual_seed(3)
    given = example(loss, prefix=prefix)
    loss.build(given.student, given.teacher)
    inputs = {k: edit(k, x) if edit else x for k, x in given.inputs.items()}
    return run(loss, inputs, case)


def with_other_registers(first: int, count: int) -> Any:
    """Draws the teacher's prefix tokens from ``first`` on anew."""

    def edit(name: str, x: Any) -> Any:
        side, signal = split_input(name)
        if side == "student" or signal not in TOKEN_AXIS:
            return x
        if isinstance(x, tuple):
            return tuple(edit(name, one) for one in x)
        x = x.clone()
        for axis in (2, 3) if signal == "attention" else (TOKEN_AXIS[signal],):
            tokens = x.narrow(axis, first, count)
            tokens.copy_(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(9)) * tokens.abs().max())
        return x

    return edit


@every_reader
@pytest.mark.parametrize("num_prefix", [1, 0])
def test_registers_of_the_teacher_play_no_part(case, num_prefix):
    prefix = {"student": num_prefix, "teacher": 5}
    try:
        expected = values(case, prefix)
    except ValueError as error:
        assert "prefix" in str(error) or "class token" in str(error)  # refused, and says why
        return
    assert all(value.isfinite() for value in expected.values())
    torch.testing.assert_close(values(case, prefix, with_other_registers(1, 4)), expected)


@every_reader
def test_patches_do_play_a_part(case):
    """The check above can fail: the same edit on patch tokens is seen."""
    prefix = {"student": 1, "teacher": 5}
    try:
        expected = values(case, prefix)
    except ValueError:
        return
    other = values(case, prefix, with_other_registers(5, 4))
    assert any(not torch.allclose(other[name], value) for name, value in expected.items())


def test_readers_were_found():
    assert {"tinymim", "minilm", "attndistill"} <= {case.make().name for case in READS_PREFIX.values()}
