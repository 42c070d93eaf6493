"""Stored and live give the same loss to fp16 rounding on every one of 1,000 samples.

With the shipped images and teachers; 0 and 2 loader workers, 1 and 2 processes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdvit import Training
from kdvit.cache import build
from tests.cache.thousand import NUM_SAMPLES, TEACHERS, compare, live_teacher, make_distiller, thousand
from tests.processes import run_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of each shipped teacher, in shards of some hundred rows."""
    folder = tmp_path_factory.mktemp("caches")
    for name in TEACHERS:
        settings = Training(epochs=1, batch_size=100)
        build(folder / name, make_distiller(live_teacher(name)), thousand(), settings, shard_mib=1, quiet=True)
    return folder


def check(found: Tensor) -> None:
    assert sorted(found[:, 0].long().tolist()) == list(range(NUM_SAMPLES))
    for ours, theirs, bound in (found[:, 1:4].T, found[:, 4:7].T):
        assert (theirs > 0).all() and (bound < 0.02 * theirs + 0.01).all()  # a bound that everything meets says nothing
        excess = (ours - theirs).abs() - bound
        assert (excess <= 0).all(), f"sample {int(found[excess.argmax(), 0])}"
        assert (ours != theirs).float().mean() > 0.5  # it is not the live teacher twice


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_process(name: str, num_workers: int, caches: Path):
    check(compare(name, caches / name, num_workers))


def test_two_processes(caches: Path):
    first, second = run_two(["-m", "tests.cache.thousand"], caches)
    for name in TEACHERS:
        assert len(first[name]) == len(second[name]) == NUM_SAMPLES // 2
        check(torch.cat([first[name], second[name]]))
