"""FSDP2 on two CPU processes: the gradients of one process, and a whole state that a run without FSDP loads."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from kdvit.training.sharding import full_state, is_sharded, load_full_state, make_equal
from tests.processes import run_two
from tests.test_accumulation import COUPLED
from tests.training.sharding_worker import CASES, DECAY, METHODS, NUM_STEPS, batch, in_bfloat16, make, of_method, steps

#: Their masks and noise are drawn for a process's own images, or they are fitted on those of all processes.
DRAWN = ("cross_arch", "ft", "mgd", "mr_mae", "vitkd")
WAYS = ("hand", "accelerate")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    return run_two(["-m", "tests.training.sharding_worker", "cases"], tmp_path_factory.mktemp("sharding"))


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    return run_two(["-m", "tests.training.sharding_worker", "methods"], tmp_path_factory.mktemp("methods"))


@cache
def alone(case: str, count: int = NUM_STEPS) -> dict[str, Any]:
    """One process with the joined batch, without FSDP."""
    distiller, optimizer = make(case)
    found = steps(distiller, optimizer, slice(None), count=count)
    return found | {"distiller": distiller, "optimizer": optimizer}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 7
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_norms_and_weights_are_those_of_one_process(case, way, ranks):
    one = alone(case)
    for rank in ranks:
        two = rank[case, way]
        assert len(two["gradients"]) == NUM_STEPS
        for ours, theirs in zip(two["gradients"], one["gradients"], strict=True):
            assert_close(ours, theirs)
        torch.testing.assert_close(two["norms"], one["norms"], rtol=1e-7, atol=0)
        assert_close(two["final"], one["distiller"].state_dict())
    assert all(norm > 0.01 for norm in one["norms"])
    for step in range(NUM_STEPS):
        mean = (ranks[0][case, way]["losses"][step] + ranks[1][case, way]["losses"][step]) / 2
        torch.testing.assert_close(mean, one["losses"][step], rtol=1e-7, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_processes_begin_alike_and_stay_sharded(case, ranks):
    for rank in ranks:
        found = rank[case, "hand"]
        assert all(found["start"].values()) and found["finite"]
        assert found["sharded"] == ["", "student.model.blocks.0", "student.model.blocks.1"]


@pytest.mark.parametrize("case", CASES)
def test_the_whole_state_goes_on_in_one_process(case, ranks):
    """Saved after two steps under FSDP, and continued without it."""
    state = ranks[0][case, "hand"]["state"]
    distiller, optimizer = make(case, seed=5)
    distiller.load_state_dict(state["distiller"])
    optimizer.load_state_dict(state["optimizer"])
    steps(distiller, optimizer, slice(None), first=2, count=1)
    assert_close(distiller.state_dict(), alone(case)["distiller"].state_dict())


@pytest.mark.parametrize("case", CASES)
def test_the_plain_student_and_the_average(case, ranks):
    found, one = ranks[0][case, "hand"], alone(case)["distiller"]
    expected = {name: x for name, x in one.deployable.state_dict().items()}
    assert_close(found["student"], expected)
    assert not any(is_sharded(module) for module in (one, one.deployable))
    torch.testing.assert_close(found["prediction"], one.eval().deployable(batch(0, slice(None))[0]).detach())
    begin, after = make(case)[0].deployable.state_dict(), alone(case, 2)["distiller"].deployable.state_dict()
    averaged = {k: DECAY * x + (1 - DECAY) * after[k] for k, x in begin.items() if x.is_floating_point()}
    assert_close({name: x for name, x in found["averaged"].items() if x.is_floating_point()}, averaged)
    assert found["averaged"].keys() == begin.keys()


def test_mixed_precision_is_that_of_one_process(ranks):
    one, (first, second) = in_bfloat16(), (rank["bfloat16"] for rank in ranks)
    assert first["loss"].dtype == one["loss"].dtype == torch.float32
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, one["loss"], rtol=1e-2, atol=0)
    assert first["gradients"].keys() == one["gradients"].keys()
    for name, value in one["gradients"].items():
        assert first["gradients"][name].dtype == torch.float32
        assert float((first["gradients"][name] - value).norm() / value.norm().clamp_min(1e-2)) < 0.1, name


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name, methods):
    expected, found = of_method(name, slice(None), sharded=False), methods[0][name]
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, methods[1][name][key]) for key, value in found.items())
    scale = max(value.abs().max() for value in expected.values())
    worst = max(float((found[key] - value).abs().max() / scale) for key, value in expected.items())
    own_batch = name in DRAWN or (name in COUPLED)
    assert worst > 1e-6 if own_batch else worst < 1e-9


def test_the_output_is_a_tree_of_tensors():
    """Releases of torch before 2.14 find what to share out by this alone."""
    distiller, _ = make("logits")
    out = distiller(*batch(0, slice(None)))
    leaves, spec = tree_flatten(out)
    assert any(leaf is out.loss for leaf in leaves) and len(leaves) == 2 + 2 * 2
    twin = tree_unflatten(leaves, spec)
    assert twin.loss is out.loss and twin.losses == out.losses and twin.weighted == out.weighted


def test_without_shards_states_pass_as_they_are():
    distiller, optimizer = make("logits")
    steps(distiller, optimizer, slice(None), count=1)
    make_equal(distiller)  # one process: nothing to do
    state = full_state(distiller.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in distiller.state_dict().items())
    other, _ = make("logits", seed=3)
    load_full_state(other, state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        load_full_state(other, {})
    nested = full_state(optimizer.state_dict())
    assert nested["param_groups"][0]["lr"] == 1e-2 and nested["state"][0]["exp_avg"].shape == (1, 1, 24)
