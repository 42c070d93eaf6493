"""The means and the speed between two lines of metrics."""

from __future__ import annotations

import pytest
import torch

from kdvit import Trainer, Training
from kdvit.distiller import DistillerOutput
from kdvit.training.window import Window
from tests.training.conftest import distiller


def output(loss: float) -> DistillerOutput:
    value = torch.tensor(loss)
    return DistillerOutput(value, {"task": value}, None, {})


def test_the_speed_is_that_of_the_steps_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("kdvit.training.window.time.perf_counter", lambda: now[0])
    window = Window()
    now[0] = 1000.0  # an evaluation, or another run
    window.start_clock()
    for loss in (1.0, 2.0):
        now[0] += 2.0
        window.add(output(loss), 8)
    resumed = Window()
    resumed.load_state_dict(window.state_dict(), torch.device("cpu"))
    assert window.close() == ({"task": 1.5}, 1.5, 4.0)
    now[0] += 2.0
    resumed.add(output(6.0), 8)  # the means are those of the run, the speed that of the steps since
    assert resumed.close() == ({"task": 3.0}, 3.0, 4.0)


@pytest.mark.usefixtures("no_curves")
def test_a_run_starts_the_clock_with_each_epoch(tiny_data, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(Window, "start_clock", lambda self: events.append("clock") or setattr(self, "started", -1.0))
    evaluate = Trainer._evaluate_student
    monkeypatch.setattr(Trainer, "_evaluate_student", lambda *args: events.append("evaluation") or evaluate(*args))
    monkeypatch.setattr(Window, "add", lambda self, *step: events.append("step"))
    monkeypatch.setattr(Window, "close", lambda self: ({}, 0.0, 1.0))
    settings = Training(epochs=2, batch_size=32, log_steps=100)
    Trainer(distiller(), tiny_data, settings, tmp_path / "run", quiet=True).fit()
    assert events[events.index("evaluation") + 1] == "clock" and events.count("evaluation") == 2
