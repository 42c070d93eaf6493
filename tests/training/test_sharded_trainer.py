"""The Trainer with weights that FSDP2 shares out over two processes: the run of DDP, saved whole, and resumed."""

from __future__ import annotations

import pytest
import torch

from kdvit import Training, create_model
from kdvit.training.weights import weights_of
from tests.processes import run_two
from tests.training.conftest import newest_state
from tests.training.sharding_worker import DistributedType
from tests.training.test_reproducibility import differences


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("sharded_trainer")
    return folder, run_two(["-m", "tests.training.sharded_trainer_worker"], folder)


def tensors(state, where: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {where: state}
    entries = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {name: value for key, item in entries for name, value in tensors(item, f"{where}/{key}").items()}


def test_the_run_is_that_of_ddp(results):
    folder, (first, second) = results
    assert first == second
    ours, theirs = (tensors(newest_state(folder / name)) for name in ("fsdp", "ddp"))
    assert ours.keys() == theirs.keys() and len(ours) > 100  # weights, projectors, moments, the average
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert first["fsdp"]["loss"] == pytest.approx(first["ddp"]["loss"], rel=1e-5)


def test_the_saved_student_is_whole_and_plain(results):
    folder, _ = results
    ours, theirs = (create_model(str(folder / name / "student")).state_dict() for name in ("fsdp", "ddp"))
    assert ours.keys() == theirs.keys()
    state = newest_state(folder / "fsdp")
    for name, value in ours.items():
        assert torch.equal(value, state["ema"][f"module.{name}"])  # the average is what is saved


def test_a_sharded_run_that_was_stopped_ends_as_it_would_have(results):
    folder, (first, _) = results
    assert first["stopped"] == first["fsdp"]
    assert differences(newest_state(folder / "stopped"), newest_state(folder / "fsdp")) == []
    for file in ("student/model.safetensors", "best/model.safetensors", "metrics.jsonl"):
        assert (folder / "stopped" / file).read_bytes() == (folder / "fsdp" / file).read_bytes(), file


@pytest.mark.parametrize(("name", "value"), [("compile", True), ("gradient_share_steps", 5)])
def test_what_cannot_be_had_of_shards_is_refused(name, value):
    class Launched:
        distributed_type = DistributedType.FSDP

    with pytest.raises(
        ValueError, match=f"Training: {name} must be left out under FSDP, got {value}; use DDP, or drop"
    ):
        weights_of(None, Training(**{name: value}), Launched())
