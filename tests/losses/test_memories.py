"""Queues and memories in two gloo processes: equal in both, and those of one process with the joined batches."""

from __future__ import annotations

import pytest
import torch

from tests.losses.cases import Case, built
from tests.losses.memory_worker import BOTH, CASES, NUM_BATCHES, batches, train
from tests.processes import run_two

every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    return run_two(["-m", "tests.losses.memory_worker"], tmp_path_factory.mktemp("memories"))


@every_case
def test_all_processes_remember_the_same(case, ranks):
    first, second = (rank[case]["buffers"] for rank in ranks)
    assert first and first.keys() == second.keys()
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@every_case
def test_they_are_one_process_with_the_joined_batches(case, ranks):
    one = train(case, BOTH)
    assert len(one["values"]) == NUM_BATCHES and one["gradients"]
    values = (ranks[0][case]["values"] + ranks[1][case]["values"]) / 2
    torch.testing.assert_close(values, one["values"], rtol=1e-12, atol=0)
    gradients = {name: (x + ranks[1][case]["gradients"][name]) / 2 for name, x in ranks[0][case]["gradients"].items()}
    torch.testing.assert_close(gradients, one["gradients"], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(ranks[0][case]["buffers"], one["buffers"], rtol=1e-12, atol=1e-14)


@every_case
def test_a_checkpoint_holds_what_is_remembered(case):
    buffers = train(case, BOTH)["buffers"]
    assert any(name.endswith(("memory", "rows")) and x.abs().sum() > 0 for name, x in buffers.items())


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_memories_may_be_in_half_precision(case, dtype):
    """Of a Distiller that is cast as a whole."""

    def values(dtype: torch.dtype) -> torch.Tensor:
        loss = built(Case(CASES[case])).train().to(dtype)
        terms = []
        for inputs in batches(loss):
            given = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
            found = loss(**given)
            terms += found.values() if isinstance(found, dict) else [found]
        sum(terms).backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in loss.parameters())
        assert {x.dtype for name, x in loss.named_buffers() if x.is_floating_point()} == {dtype}
        return torch.stack(terms).detach()

    found = values(dtype)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, values(torch.float32), rtol=0.1, atol=1e-3)
