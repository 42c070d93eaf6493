"""Losses of the whole batch in two gloo processes: with ``gather`` they are one on the joined batch, else two alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from kdvit.losses import get, names
from kdvit.losses.gathering import gather_batch
from tests.losses.gather_worker import BOTH, CASES, measure, rows
from tests.processes import run_two

every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What each process measured, by case and gather; they meet through a file, so no port is needed."""
    folder = tmp_path_factory.mktemp("gathering")
    return run_two(["-m", "tests.losses.gather_worker"], folder)


def averaged(parts: list[dict]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Value and gradients of the mean loss of two processes, which is what DistributedDataParallel steps along."""
    first, second = parts
    inputs = {name: torch.cat([first["inputs"][name], second["inputs"][name]]) / 2 for name in first["inputs"]}
    parameters = {name: (first["parameters"][name] + second["parameters"][name]) / 2 for name in first["parameters"]}
    return (first["value"] + second["value"]) / 2, inputs, parameters


def test_every_loss_with_the_option_is_compared():
    with_option = {name for name in names() if "gather" in inspect.signature(get(name)).parameters}
    assert {CASES[case](True).name for case in CASES} == with_option and len(with_option) >= 2
    assert all(not inspect.signature(get(name)).parameters["gather"].default for name in with_option)


@every_case
def test_gathered_it_is_one_process_on_the_joined_batch(case, ranks):
    value, inputs, parameters = averaged([rank[case, True] for rank in ranks])
    one = measure(case, True, BOTH)
    assert inputs
    torch.testing.assert_close(value, one["value"], rtol=1e-12, atol=0)
    torch.testing.assert_close(inputs, one["inputs"], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(parameters, one["parameters"], rtol=1e-9, atol=1e-14)


@every_case
def test_not_gathered_it_is_the_mean_of_the_separate_losses(case, ranks):
    found = averaged([rank[case, False] for rank in ranks])
    alone = averaged([measure(case, False, rows(rank)) for rank in range(2)])
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=0)


@every_case
def test_the_two_differ(case, ranks):
    apart, joined = (averaged([rank[case, gather] for rank in ranks]) for gather in (False, True))
    assert (apart[0] - joined[0]).abs() > 1e-4 * joined[0]
    differences = [(apart[1][name] - x).abs().max() / x.abs().max() for name, x in joined[1].items()]
    assert max(differences) > 1e-3


def test_with_one_process_nothing_is_copied():
    x = torch.rand(2, 3)
    assert gather_batch(x) is x
