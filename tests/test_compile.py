"""torch.compile of the whole step: teacher, student, taps and losses in one graph, with the values of the eager step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from kdvit import Progress, calibrate, losses
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


def test_the_weights_keep_their_names():
    distiller = make("fitnet", 0)
    compiled = torch.compile(distiller, backend="eager")
    assert compiled._orig_mod is distiller
    distiller.compile(backend="eager")  # in place: what the Trainer does
    assert set(make("fitnet", 0).state_dict()) == set(distiller.state_dict())
