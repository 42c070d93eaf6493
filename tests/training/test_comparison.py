"""A student alone and distilled over several seeds: equal budgets, resumed runs, what may be said of a difference."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from torch import nn

from kdvit import Distiller, Student, Training
from kdvit.data import ImageData
from kdvit.losses import KD
from kdvit.models import create_model
from kdvit.training import Accuracy, Comparison, Fidelity, Result, compare
from kdvit.training.comparison import Run, Spread
from kdvit.training.fidelity import FIGURES
from tests.training.conftest import MEAN, STD, metrics, same_weights, vit

SETTINGS = Training(epochs=2, batch_size=16, log_steps=1, ema_decay=0.5)
SEEDS = (0, 3)


class Fuse:
    """A weight that breaks a run at a step, as a power cut would."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def __call__(self, progress) -> float:
        if progress.step == self.step:
            raise ConnectionError("power cut")
        return 0.5


def make_distiller(seed: int, distilled: bool, fuse: int | None = None) -> Distiller:
    student = Student(vit(seed, proj_drop_rate=0.1), mean=MEAN, std=STD, name="small")
    torch.manual_seed(1)
    return Distiller(vit(7, embed_dim=32), student, [(Fuse(fuse), KD())]) if distilled else Distiller(None, student, [])


@pytest.fixture(scope="module")
def no_curves_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdvit.training.trainer.draw_curves", lambda *arguments: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison") / "runs"


@pytest.fixture(scope="module")
def comparison(tiny_data: ImageData, folder: Path, no_curves_here: None) -> Comparison:
    return compare(make_distiller, tiny_data, SETTINGS, SEEDS, folder, quiet=True)


def summary(path: Path) -> dict:
    return json.loads((path / "run.json").read_text())


# The runs


def test_each_seed_leaves_two_runs_of_equal_budget(comparison: Comparison, folder: Path):
    for seed in SEEDS:
        alone, distilled = (summary(folder / name / f"seed{seed}") for name in ("alone", "distilled"))
        assert alone["settings"] == distilled["settings"] and alone["settings"]["seed"] == seed
        assert alone["transform"] == distilled["transform"]
        assert alone["result"]["num_steps"] == distilled["result"]["num_steps"] == 8
        assert alone["losses"] == {} and alone["teacher"] is None
        assert distilled["losses"] == {"kd": "KD(temperature=4.0)"}
    results = [run.result.folder for run in (*comparison.alone, *comparison.distilled)]
    assert results == [folder / name / f"seed{seed}" for name in ("alone", "distilled") for seed in SEEDS]


def test_accuracies_are_those_of_the_runs(comparison: Comparison):
    for run in (*comparison.alone, *comparison.distilled):
        assert run.fidelity.accuracy.top1 == run.result.top1 and run.fidelity.accuracy.num_images == 32
        assert run.fidelity.accuracy.top5 == run.result.top5
    for alone, distilled in zip(comparison.alone, comparison.distilled, strict=True):
        assert alone.fidelity.teacher == distilled.fidelity.teacher
        assert distilled.fidelity.teacher.accuracy.top1 == distilled.result.teacher_top1
        assert alone.fidelity.kl != distilled.fidelity.kl and alone.fidelity.agreement is not None


def test_what_is_measured_is_what_is_saved(comparison: Comparison, tiny_data: ImageData, folder: Path):
    """The average of the weights, where a run keeps one."""
    from kdvit.data import make_loader
    from kdvit.training import transform_for

    for run in (comparison.alone[1], comparison.distilled[1]):
        student = create_model(str(run.result.folder / "student")).eval()
        transform = transform_for(Student(student, mean=MEAN, std=STD))
        batch = next(iter(make_loader(tiny_data.test, transform, batch_size=32, train=False)))
        with torch.no_grad():
            loss = nn.functional.cross_entropy(student(batch["image"]), batch["label"]).item()
        assert run.fidelity.accuracy.loss == pytest.approx(loss, rel=1e-5)


def test_a_finished_run_is_not_trained_again(
    comparison: Comparison, tiny_data: ImageData, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments, **options):
        raise AssertionError("a finished run was trained again")

    before = {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    again = compare(make_distiller, tiny_data, SETTINGS, SEEDS, folder, quiet=True)
    assert len(before) == 4 and before == {path: path.read_bytes() for path in before}
    assert again.lines() == comparison.lines()


def test_runs_do_not_depend_on_the_other_seeds(
    comparison: Comparison, tiny_data: ImageData, folder: Path, tmp_path: Path, no_curves: None
):
    shutil.copytree(folder / "alone" / "seed3", tmp_path / "alone" / "seed3")
    more = compare(make_distiller, tiny_data, SETTINGS, (3,), tmp_path, quiet=True)
    assert more.seeds == (3,) and more.alone[0].fidelity == comparison.alone[1].fidelity
    assert more.distilled[0].fidelity == comparison.distilled[1].fidelity


def test_an_interrupted_comparison_goes_on(
    comparison: Comparison, tiny_data: ImageData, folder: Path, tmp_path: Path, no_curves: None
):
    """The power is cut in the second epoch of the last run."""

    def cut(seed: int, distilled: bool) -> Distiller:
        return make_distiller(seed, distilled, fuse=6 if seed == 3 else None)

    with pytest.raises(ConnectionError):
        compare(cut, tiny_data, SETTINGS, SEEDS, tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs" / "comparison.json").exists()
    resumed = compare(make_distiller, tiny_data, SETTINGS, SEEDS, tmp_path / "runs", quiet=True)
    assert resumed.lines() == comparison.lines()
    pair = (create_model(str(where / "distilled" / "seed3" / "student")) for where in (folder, tmp_path / "runs"))
    assert same_weights(*pair)
    assert [r["loss"] for r in metrics(tmp_path / "runs" / "distilled" / "seed3", "step")] == [
        r["loss"] for r in metrics(folder / "distilled" / "seed3", "step")
    ]


def test_without_a_teacher_that_predicts_these_classes(tiny_data: ImageData, tmp_path: Path, no_curves: None):
    """Self-distillation: agreement and KL have no meaning."""

    def make(seed: int, distilled: bool) -> Distiller:
        return Distiller(None, Student(vit(seed), mean=MEAN, std=STD), ["uskd"] if distilled else [])

    found = compare(make, tiny_data, replace(SETTINGS, epochs=1), [0], tmp_path, quiet=True)
    assert {line.name for line in found.lines()} & set(FIGURES) == {"top1", "top5", "loss", "calibration_error"}
    assert all(line.teacher is None for line in found.lines())
    text = (tmp_path / "comparison.md").read_text()
    assert "teacher: none" in text and "+-" not in text


# The table


def fidelity_of(top1: float, kl: float, classes: tuple = (50.0, 60.0), teacher: Fidelity | None = None) -> Fidelity:
    return Fidelity(Accuracy(top1, 90.0, 1.5, 2000), 3.0, classes, 70.0, kl, kl, teacher)


def made_up(alone: list[float], distilled: list[float]) -> Comparison:
    teacher = Fidelity(Accuracy(95.0, 100.0, 0.25, 2000), 1.0, (99.0, 70.0))
    result = Result(None, None, None, None, None, 1, 1.0, Path("run"))
    runs = (
        tuple(Run(result, fidelity_of(top1, 0.5, (top1, 60.0), teacher), 8000) for top1 in group)
        for group in (alone, distilled)
    )
    return Comparison(tuple(range(len(alone))), ("cat", "dog"), *runs)


def test_means_and_spreads_by_hand():
    line = made_up([80.0, 82.0, 84.0], [83.0, 83.0, 86.0]).lines()[0]
    assert (line.name, line.teacher) == ("top1", 95.0)
    assert (line.alone, line.distilled.mean) == (Spread(82.0, 2.0), 84.0)
    assert line.difference == Spread(2.0, 1.0)  # 3, 1, 2: paired, not the root of two variances
    assert line.cells() == ("top-1, %", "82.00 +- 2.00", "84.00 +- 1.73", "+2.00 +- 1.00", "95.00")


def test_lines_are_those_of_the_runs(comparison: Comparison):
    lines = {line.name: line for line in comparison.lines()}
    assert list(lines)[: len(FIGURES)] == list(FIGURES)
    for name in FIGURES:
        alone, distilled = ([r.fidelity.figures()[name] for r in g] for g in (comparison.alone, comparison.distilled))
        assert lines[name].alone == Spread(mean(alone), stdev(alone))
        difference = [b - a for a, b in zip(alone, distilled, strict=True)]
        assert lines[name].difference == Spread(mean(difference), stdev(difference))


def test_the_worst_classes_are_shown():
    line = made_up([80.0, 82.0], [83.0, 83.0]).lines()[len(FIGURES)]
    assert (line.name, line.title, line.teacher) == ("class cat", "class cat, %", 99.0)  # 16 below; dog is 10 below
    assert line.distilled == Spread(83.0, 0.0)


@pytest.mark.parametrize(
    ("alone", "distilled", "sentence"),
    [
        (
            [80.0, 82.0, 84.0],
            [83.0, 83.0, 86.0],
            "by +2.00 +- 1.00 points over 3 seeds: more than this difference varies",
        ),
        ([80.0, 82.0], [79.0, 81.0], "by -1.00 +- 0.00 points over 2 seeds: more than this difference varies"),
        (
            [80.0, 82.0],
            [82.0, 81.0],
            "by +0.50 +- 2.12 points over 2 seeds: no more than this difference varies from see",
        ),
        ([80.0, 82.0], [80.0, 82.0], "no more than this difference varies from seed to seed, so no effect is shown."),
        (
            [80.0],
            [82.0],
            "by +2.00 points with one seed, which shows no spread: it may be chance. Compare with more see",
        ),
    ],
)
def test_what_may_be_said_of_a_difference(alone, distilled, sentence):
    verdict = made_up(alone, distilled).verdict()
    assert verdict.startswith("Distillation changed top-1 ") and sentence in verdict


def test_one_seed_shows_no_spread():
    found = made_up([80.0], [82.0])
    assert found.lines()[0].cells() == ("top-1, %", "80.00", "82.00", "+2.00", "95.00")
    assert "standard deviation" not in found.note() and "standard deviation (n - 1)" in made_up([1, 2], [3, 4]).note()


def test_images_that_a_loss_holds_out_are_no_secret():
    found = made_up([80.0], [82.0])
    assert "holds images out" not in found.note()
    fewer = replace(found, distilled=tuple(replace(run, trained_images=7200) for run in found.distilled))
    assert "a loss holds images out: 8,000 train the student alone, 7,200 the distilled one. Cross" in fewer.note()


# The files


def test_the_json_has_all_of_it(comparison: Comparison, folder: Path):
    compare_again = json.loads((folder / "comparison.json").read_text())
    assert {"written", "command", "python", "versions", "commit", "device", "verdict"} <= set(compare_again)
    assert compare_again["versions"]["torch"] == version("torch")
    assert compare_again["classes"] == list(comparison.classes) and compare_again["settings"]["epochs"] == 2
    runs = compare_again["runs"]["distilled"]
    assert [run["seed"] for run in runs] == compare_again["seeds"]
    assert runs[-1]["folder"] == "distilled/seed3" and runs[-1]["trained_images"] == 64
    assert runs[-1]["fidelity"]["teacher"]["accuracy"]["top1"] == runs[-1]["teacher_top1"]


def test_the_page(comparison: Comparison, folder: Path):
    text = (folder / "comparison.md").read_text()
    assert text.startswith("# small: alone and distilled\n\nDistillation changed top-1 by ")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1 and len(table) == 2 + len(FIGURES) + 3
    assert re.match(r"\| top-1, % +\| +\d", table[2]) and r"KL(teacher\|\|model)" in text
    for word in ("- command: `", "- seeds: ", "- device: cpu", f"torch {version('torch')}", "teacher: "):
        assert word in text


# Mistakes


def changed(alone: Callable[[int], Distiller] | None = None, distilled: Callable[[int], Distiller] | None = None):
    def make(seed: int, distils: bool) -> Distiller:
        other = distilled if distils else alone
        return other(seed) if other is not None else make_distiller(seed, distils)

    return make


def feature_only(seed: int) -> Distiller:
    return Distiller(vit(7), Student(vit(seed, proj_drop_rate=0.1), mean=MEAN, std=STD), ["vitkd"], task_loss=None)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"seeds": []}, "compare: seeds must be one or more different whole numbers, got (); list each once."),
        ({"seeds": [0, -1]}, "compare: seeds must be whole numbers >= 0, got (0, -1); give some, such as 0 1 2."),
        ({"seeds": [0.5]}, "compare: seeds must be whole numbers >= 0, got (0.5,); give some, such as 0 1 2."),
        ({"seeds": [1, 1]}, "compare: seeds must be one or more different whole numbers, got (1, 1); list each once."),
        (
            {"make_distiller": changed(alone=lambda seed: make_distiller(seed + 1, False))},
            "compare: both students of seed 0 must be new ones with the same weights, and they are not; call torch",
        ),
        (
            {"make_distiller": changed(alone=lambda seed: make_distiller(seed, True))},
            "compare: the student alone must have no teacher, got 'vit_tiny_patch16_224'; let make_distiller(se",
        ),
        (
            {"make_distiller": changed(distilled=feature_only)},
            "compare: the losses must train the student's classifier, or its accuracy means nothing; keep the task ",
        ),
    ],
)
def test_mistakes_are_one_sentence_before_training(given, sentence, tiny_data: ImageData, tmp_path: Path):
    arguments = {"make_distiller": make_distiller, "seeds": [0], **given}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        compare(data=tiny_data, settings=SETTINGS, folder=tmp_path, quiet=True, **arguments)
    assert not list(tmp_path.iterdir())


def test_what_the_distilled_run_is_refused_for_is_said_before_the_other_is_trained(
    comparison: Comparison, tiny_data: ImageData, folder: Path, tmp_path: Path
):
    shutil.copytree(folder / "distilled" / "seed0", tmp_path / "distilled" / "seed0")
    longer = replace(SETTINGS, epochs=3)
    with pytest.raises(ValueError, match="epochs must be 2 as in the run in"):
        compare(make_distiller, tiny_data, longer, [0], tmp_path, quiet=True)
    assert not list((tmp_path / "alone").rglob("metrics.jsonl"))


def test_one_student_for_both_is_refused(tiny_data: ImageData, tmp_path: Path):
    student = vit(0)

    def make(seed: int, distilled: bool) -> Distiller:
        return Distiller(
            vit(7) if distilled else None, Student(student, mean=MEAN, std=STD), [KD()] if distilled else []
        )

    with pytest.raises(ValueError, match="both students of seed 0 must be new ones"):
        compare(make, tiny_data, SETTINGS, [0], tmp_path, quiet=True)
