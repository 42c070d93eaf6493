"""Curves as a PNG, where matplotlib is installed."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from kdvit import Trainer, Training
from kdvit.training.curves import draw_curves
from tests.training.conftest import distiller

STEPS = [
    {"kind": "step", "step": s, "epoch": s / 2, "lr": 0.1 / s, "losses": {"task": 2.0 / s, "kd": 0.0}}
    for s in (1, 2, 3)
]
EVALUATIONS = [{"kind": "evaluation", "step": 2, "epoch": 1, "top1": 50.0}]


def test_a_run_draws_its_curves(tiny_data, tmp_path):
    pytest.importorskip("matplotlib", reason="curves need the extra `plot`")
    Trainer(distiller(), tiny_data, Training(epochs=1, batch_size=32, log_steps=1), tmp_path / "run", quiet=True).fit()
    with Image.open(tmp_path / "run" / "curves.png") as image:
        assert image.width > 1000 and len(image.convert("L").histogram()) == 256
        assert image.convert("L").getextrema()[0] < 100  # not an empty page


@pytest.mark.parametrize(
    "records",
    [STEPS + EVALUATIONS, STEPS, EVALUATIONS, [], [*STEPS, {**STEPS[0], "step": 4, "losses": {"late": 1.0}}]],
    ids=["both", "steps", "scores", "none", "changing"],
)
def test_runs_of_every_kind_are_drawn(tmp_path, records):
    pytest.importorskip("matplotlib", reason="curves need the extra `plot`")
    from matplotlib import get_backend

    backend = get_backend()
    assert draw_curves(records, tmp_path / "curves.png", 91.0) is True
    with Image.open(tmp_path / "curves.png") as image:
        image.verify()
    assert get_backend() == backend  # a notebook keeps its own


def test_without_matplotlib_there_is_no_picture_and_no_error(tiny_data, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)
    assert draw_curves(STEPS, tmp_path / "curves.png", None) is False
    settings = Training(epochs=1, batch_size=32)
    result = Trainer(distiller(), tiny_data, settings, tmp_path / "run", quiet=True).fit()
    assert (result.folder / "run.json").is_file() and not (result.folder / "curves.png").exists()
