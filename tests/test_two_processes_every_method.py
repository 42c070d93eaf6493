"""Every registered loss under DistributedDataParallel: two gloo processes stay equal, and wait for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdvit import losses
from tests.every_method_worker import NUM_STEPS
from tests.processes import run_two


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    return run_two(["-m", "tests.every_method_worker"], tmp_path_factory.mktemp("every_method"))


def differing(ranks: tuple[dict, dict], name: str, step: int) -> list[str]:
    first, second = (rank[name][step] for rank in ranks)
    assert first.keys() == second.keys()
    return [key for key, value in first.items() if not torch.equal(value, second[key])]


def is_statistic(key: str) -> bool:
    """BatchNorm's, which DDP makes equal at the beginning of the next step."""
    return key.endswith(("running_mean", "running_var"))


@pytest.mark.parametrize("name", losses.names())
def test_processes_have_equal_parameters_and_memories_after_each_step(name, ranks):
    for step in range(NUM_STEPS):
        found = differing(ranks, name, step)
        assert "loss" in found  # each had images of its own
        assert [key for key in found if key != "loss" and not is_statistic(key)] == []
    values: list[Tensor] = [*ranks[0][name][-1].values()]
    assert all(value.isfinite().all() for value in values if value.is_floating_point())


def test_what_a_loss_remembers_has_moved(ranks):
    for key in ("crd.student_memory", "crd.seen_labels", "cls_queue.queue.rows", "cls_dense.queue.rows"):
        first, second = (state[f"losses.{key}"] for state in ranks[0][key.partition(".")[0]])
        assert not torch.equal(first, second), key


def test_statistics_are_the_only_exception(ranks):
    """The comparison would notice: projectors with BatchNorm see images of their own process."""
    assert any(map(is_statistic, differing(ranks, "fitnet", 0)))
