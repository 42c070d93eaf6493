"""One seed is one run, bit for bit: run twice, with other workers, and in two parts."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdvit.losses import KD, FitNet, Loss, ViTKD, make
from kdvit.training import Trainer
from tests.training.conftest import distiller, newest_state, same_weights, vit

RANDOM = {"drop_rate": 0.2, "drop_path_rate": 0.3, "proj_drop_rate": 0.1}


def run(make_trainer, **options) -> nn.Module:
    trainer = make_trainer(distiller(["kd", "vitkd"], **RANDOM), epochs=2, mixup_alpha=0.5, **options)
    trainer.fit()
    return trainer.student


def test_one_seed_is_one_run_whatever_the_workers(make_trainer):
    first = run(make_trainer, seed=5)
    torch.rand(7)  # what others draw in between does not matter
    assert same_weights(first, run(make_trainer, seed=5))
    assert same_weights(first, run(make_trainer, seed=5, num_workers=2))
    assert not same_weights(first, run(make_trainer, seed=6))


def test_dropout_differs_from_step_to_step(make_trainer):
    """The seed of a step is its place in the run, not one for all."""
    seen = []

    class Seer(nn.Module):
        def forward(self, x):
            seen.append(torch.rand(3).tolist())
            return x

    subject = distiller()
    subject.student.model.head_drop = Seer()
    trainer = make_trainer(subject, epochs=2)
    seen.clear()
    trainer._train_epoch(_Silent())
    assert len(seen) == 4 and len({tuple(row) for row in seen}) == 4


class Fuse:
    """A weight of a loss that breaks the run at a step, as a power cut would."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def __call__(self, progress) -> float:
        if progress.step == self.step:
            raise ConnectionError("power cut")
        return 0.5


def start(make_trainer, folder, blows_at: int | None, *, resume: bool = False, **options) -> Trainer:
    losses = [(Fuse(blows_at), KD()), FitNet(), ViTKD()]
    return make_trainer(
        distiller(losses, **RANDOM), folder=folder, resume=resume,
        **{"epochs": 3, "lr": 3e-3, "ema_decay": 0.9, "mixup_alpha": 0.2, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation_steps": 2, "optimizer": "momentum"},
        {"num_workers": 2},
        {"save_steps": 1},
        {"save_steps": 1, "log_steps": 4},  # in the middle of a line of metrics
        {"save_steps": 3, "num_workers": 2, "log_steps": 5},
        {"save_steps": 1, "accumulation_steps": 2, "batch_size": 8},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_same_run(make_trainer, tmp_path, options):
    whole = start(make_trainer, tmp_path / "whole", None, **options)
    expected = whole.fit()
    # In the second of three epochs, of 4 steps or 2.
    blows_at = 3 if options.get("accumulation_steps") == 2 and "batch_size" not in options else 6
    with pytest.raises(ConnectionError):
        start(make_trainer, tmp_path / "parts", blows_at, **options).fit()
    # The second part may look at the run in another way; only what changes the result must be equal.
    resumed = start(make_trainer, tmp_path / "parts", None, resume=True, **options)
    assert (resumed.epoch, resumed.step) == ((1, blows_at) if "save_steps" in options else (1, whole.steps_per_epoch))
    result = resumed.fit()
    assert same_weights(resumed.plain, whole.plain)  # the student and the projectors
    assert same_weights(resumed.ema, whole.ema)
    for field in ("top1", "top5", "best_top1", "best_epoch", "teacher_top1", "num_steps"):
        assert getattr(result, field) == getattr(expected, field), field
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert differences(*(newest_state(tmp_path / name) for name in ("parts", "whole"))) == []


def test_what_is_drawn_from_other_generators_is_resumed_too(make_trainer, tmp_path):
    class Draws(Loss):
        def forward(self, student_logits: Tensor) -> Tensor:
            return (random.random() + np.random.rand()) * student_logits.square().mean()

    def begin(folder: str, blows_at: int | None, **options) -> Trainer:
        return make_trainer(distiller([(Fuse(blows_at), Draws())]), folder=tmp_path / folder, epochs=2, **options)

    begin("whole", None).fit()
    with pytest.raises(ConnectionError):
        begin("parts", 5).fit()
    begin("parts", None, resume=True).fit()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


#: Losses with more than weights: memories, queues, what was fitted before, meta-parameters, a classifier.
REMEMBERING = {
    "crd": lambda: make("crd", dim=8, num_negatives=8),
    "cls_queue": lambda: make("cls_queue", queue_size=24),
    "ft": lambda: make("ft", paraphraser_steps=3),
    "ofd": lambda: make("ofd"),
    "simkd": lambda: make("simkd", feature="pooled"),
    "mmkd": lambda: make("mmkd", batch_size=16, meta_interval=1, meta_lr=1e-2),
}


@pytest.mark.parametrize("save_steps", [None, 1], ids=["", "within"])
@pytest.mark.parametrize("ema_decay", [None, 0.9], ids=["", "ema"])
@pytest.mark.parametrize("name", REMEMBERING)
def test_what_a_loss_remembers_is_resumed(make_trainer, tmp_path, name, ema_decay, save_steps):
    def begin(folder: str, blows_at: int | None, **options) -> Trainer:
        teacher = [vit(7, embed_dim=32), vit(8)] if name == "mmkd" else vit(7, embed_dim=32)
        subject = distiller([(Fuse(blows_at), REMEMBERING[name]())], teacher, **RANDOM)
        settings = {"epochs": 2, "lr": 3e-3, "ema_decay": ema_decay, "save_steps": save_steps, **options}
        return make_trainer(subject, folder=tmp_path / folder, **settings)

    begin("whole", None).fit()
    with pytest.raises(ConnectionError):
        begin("parts", 5).fit()  # in the second epoch, of 4 steps, or of 3 where images are held out
    resumed = begin("parts", None, resume=True)
    assert resumed.epoch == 1 and (save_steps is None or resumed.step == 5)
    resumed.fit()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    states = [newest_state(tmp_path / part) for part in ("parts", "whole")]
    assert differences(*states) == []
    assert any(key.startswith("losses.") for key in states[0]["distiller"])


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """The places at which two nested states are not equal, bit for bit."""
    if isinstance(ours, dict) and ours.keys() == theirs.keys():
        return [place for key in ours for place in differences(ours[key], theirs[key], f"{where}/{key}")]
    if isinstance(ours, (list, tuple)) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [place for index, pair in pairs for place in differences(*pair, f"{where}/{index}")]
    equal = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    return [] if equal else [where]


def test_differences_are_found():
    state = {"a": [torch.zeros(2), {"b": 1}], "c": None}
    assert differences(state, {"a": [torch.zeros(2), {"b": 1}], "c": None}) == []
    assert differences(state, {"a": [torch.tensor([0.0, 1e-9]), {"b": 2}], "c": None}) == ["/a/0", "/a/1/b"]
    assert differences(state, {"a": [], "c": 0}) == ["/a", "/c"]


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_is_not_run_again(make_trainer, tmp_path):
    first = start(make_trainer, tmp_path / "run", None).fit()
    before = records(tmp_path / "run")
    again = start(make_trainer, tmp_path / "run", 11, resume=True).fit()
    assert again == first
    assert records(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["top1"] == first.top1


def test_resume_without_an_earlier_run_starts_one(make_trainer, tmp_path):
    assert start(make_trainer, tmp_path / "new", None, resume=True, epochs=1).fit().num_steps == 4


class _Silent:
    def step(self, losses=None) -> None: ...

    def line(self, text: str) -> None: ...
