"""torch.compile of the step: teacher, student, taps and losses in one graph, with the values of the eager step."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
from collections.abc import Iterator

import pytest
import torch

from kdvit import Distiller, Progress, calibrate, losses
from kdvit.schedules import Linear, WarmUp
from tests import tiny
from tests.every_method_worker import NUM_IMAGES, make

COMMON = ("kd", "dkd", "nkd", "dist", "fitnet", "vitkd", "tinymim", "minilm", "mgd", "rkd", "crd")
#: The AOT backends alone: torch 2.14 gives the gradient of this mse_loss other strides when it runs than it traced.
NOT_BY_AOT_EAGER = ("dense",)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(name: str, backend: str | None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(losses and their sum, gradients) of one training step."""
    distiller = make(name, 0)
    distiller.allocate(NUM_IMAGES)
    distiller.train()
    calibrate(distiller, [(tiny.images(4, seed=9), tiny.labels())])
    run = distiller if backend is None else torch.compile(distiller, fullgraph=True, backend=backend)
    context = {"second_images": tiny.images(4, seed=5)} if distiller.reads_second_view else {}
    context |= {"sample_ids": torch.arange(4), "progress": Progress(step=1, total_steps=4)}
    torch.manual_seed(3)
    out = run(tiny.images(4), tiny.labels(), **context)
    assert bool(out.weighted) == (backend is None)
    out.loss.backward()
    gradients = {key: p.grad for key, p in distiller.named_parameters() if p.grad is not None}
    return {**out.losses, "the sum": out.loss.detach()}, gradients


def check(name: str, backend: str, relative: float) -> None:
    (expected, gradient), (found, compiled) = step(name, None), step(name, backend)
    assert found.keys() == expected.keys() and len(found) >= 3 and compiled.keys() == gradient.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=relative, atol=1e-6, msg=key)
    scale = max(value.abs().max() for value in gradient.values())
    for key, value in gradient.items():
        torch.testing.assert_close(compiled[key] / scale, value / scale, rtol=relative, atol=relative, msg=key)


@pytest.mark.parametrize("name", COMMON[:3])
def test_one_graph(name):
    check(name, "aot_eager", relative=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in losses.names() if name not in (*COMMON[:3], *NOT_BY_AOT_EAGER)])
def test_one_graph_for_every_method(name):
    check(name, "aot_eager", relative=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own code generation
@pytest.mark.parametrize("name", ["kd", "vitkd", *NOT_BY_AOT_EAGER])
def test_inductor(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    drawn = name == "vitkd"  # inductor draws the masks in its own way
    if drawn:
        found, gradients = step(name, "inductor")
        assert all(value.isfinite() for value in (*found.values(), found["the sum"]))
        assert gradients.keys() == step(name, None)[1].keys()
    else:
        check(name, "inductor", relative=1e-4)


def scheduled() -> Distiller:
    return Distiller(tiny.vit(7, embed_dim=32), tiny.vit(), [(WarmUp(2.0, epochs=4), "dkd"), (Linear(1.0, 0.0), "kd")])


def test_each_schedule_costs_one_more_graph_at_most():
    """A graph for each value would run into torch's limit of 8, and with fullgraph that is an error."""
    torch._dynamo.utils.counters.clear()
    distiller, twin = scheduled(), scheduled()
    distiller.compile(backend="aot_eager", fullgraph=True)
    for step in range(12):
        progress = Progress(step, step / 3, 12, 4.0)
        out = distiller(tiny.images(4, seed=step), tiny.labels(), progress=progress)
        expected = twin(tiny.images(4, seed=step), tiny.labels(), progress=progress)
        torch.testing.assert_close(out.loss, expected.loss)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1 + 2


def test_a_step_that_is_compiled_in_place():
    distiller = make("fitnet", 0)
    names = list(distiller.state_dict())
    expected = distiller(tiny.images(), tiny.labels())
    distiller.compile(backend="eager", fullgraph=True)
    assert list(distiller.state_dict()) == names
    found = distiller(tiny.images(), tiny.labels())
    assert expected.weighted and not found.weighted  # the compiled part really ran
    torch.testing.assert_close(found.loss, expected.loss)
    with pytest.raises(ValueError, match="labels must be in 0..4, got 7..7"):  # the checks are outside
        distiller(tiny.images(), torch.full((4,), 7))


def test_a_copy_of_a_compiled_distiller_has_weights_of_its_own():
    distiller = make("kd", 0)
    distiller.compile(backend="eager")
    before = distiller(tiny.images(), tiny.labels()).loss
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        torch.testing.assert_close(twin(tiny.images(), tiny.labels()).loss, before)
        with torch.no_grad():
            for parameter in twin.student.parameters():
                parameter.zero_()
        assert twin(tiny.images(), tiny.labels()).losses["task"].item() == pytest.approx(math.log(5))
    torch.testing.assert_close(distiller(tiny.images(), tiny.labels()).loss, before)
