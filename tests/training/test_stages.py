"""Runs of several parts, and what stops them in the middle."""

from __future__ import annotations

import os
import signal

import pytest

from kdvit import Distiller, Student, Training
from kdvit.losses import KD
from kdvit.training import Stage, run_stages
from kdvit.training.interruption import Interrupted
from tests.training.conftest import MEAN, STD, newest_state, same_weights, vit
from tests.training.test_faults import At
from tests.training.test_reproducibility import differences

SETTINGS = {"batch_size": 16, "log_steps": 1, "lr": 3e-3}


def two(stop_at: int | None = None, part: int = 0, ema_decay: float | None = None) -> list[Stage]:
    """Pretraining with features, fine-tuning with labels; SIGTERM in the first (0) or second (1) at a step."""
    student = Student(vit(1), mean=MEAN, std=STD, name="small")
    stops = [At(stop_at if part == number else -1, lambda: os.kill(os.getpid(), signal.SIGTERM)) for number in (0, 1)]
    return [
        Stage(
            "features",
            lambda: Distiller(vit(7, embed_dim=32), student, ["vitkd", stops[0]], task_loss=None),
            Training(epochs=2, ema_decay=ema_decay, **SETTINGS),
        ),
        Stage("labels", lambda: Distiller(None, student, [stops[1]]), Training(epochs=2, **SETTINGS)),
    ]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob("*/*/model.safetensors")}


@pytest.fixture
def run(tiny_data, no_curves):
    return lambda stages, folder, **options: run_stages(stages, tiny_data, folder, quiet=True, **options)


@pytest.mark.parametrize("part", [0, 1])
def test_a_run_that_was_stopped_in_any_part_ends_as_it_would_have(run, tmp_path, part):
    results = run(two(ema_decay=0.5), tmp_path / "whole")
    assert [result.folder.name for result in results] == ["1-features", "2-labels"]
    assert results[0].top1 is not None  # At reads the logits
    with pytest.raises(Interrupted):
        run(two(5, part, ema_decay=0.5), tmp_path / "parts")
    assert (tmp_path / "parts" / "2-labels").exists() == bool(part)
    run(two(ema_decay=0.5), tmp_path / "parts", resume=True)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    for name in ("1-features", "2-labels"):
        assert differences(newest_state(tmp_path / "parts" / name), newest_state(tmp_path / "whole" / name)) == []
    before = files(tmp_path / "whole")
    run(two(0, 0, ema_decay=0.5), tmp_path / "whole", resume=True)  # finished: no step is taken again
    assert files(tmp_path / "whole") == before


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_second_part_starts_where_the_first_ended(run, tmp_path, ema_decay):
    stages = two(ema_decay=ema_decay)
    seen = []
    begin = stages[1].distiller

    def look() -> Distiller:
        made = begin()
        seen.append({name: value.clone() for name, value in made.student_state_dict().items()})
        return made

    stages[1] = Stage("labels", look, stages[1].settings)
    run(stages, tmp_path / "run")
    saved = vit(0)
    from safetensors.torch import load_file

    saved.load_state_dict(load_file(tmp_path / "run" / "1-features" / "student" / "model.safetensors"))
    expected = vit(0)
    expected.load_state_dict(seen[0])
    assert same_weights(expected, saved)


def test_what_cannot_be_run_in_parts_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"run_stages: stages must have different names, at least one, got \[\];"):
        run([], tmp_path)
    first, second = two()
    with pytest.raises(ValueError, match=r"must have different names, at least one, got \['features', 'features'\];"):
        run([first, Stage("features", second.distiller, second.settings)], tmp_path)
    other = Stage("other", lambda: Distiller(vit(7), Student(vit(3)), [KD()]), first.settings)
    with pytest.raises(ValueError, match="all stages must train one student model, got another one in 'other'; make"):
        run([first, other], tmp_path)
