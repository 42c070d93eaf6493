"""``kdvit evaluate`` and ``kdvit compare``: what they print, what they leave, and one sentence for each mistake."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console

from kdvit import create_model
from kdvit.cli import evaluate, main
from kdvit.data import open_data
from kdvit.models import save_model
from kdvit.similarity import LayerSimilarity
from kdvit.training.fidelity import FIGURES

VIT = "vit_tiny_patch16_224"
SIZES = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY = ",".join(f"{name}={value}" for name, value in SIZES.items())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images (40 + 20 in ten classes), a teacher, and a comparison of two seeds."""
    place = tmp_path_factory.mktemp("place")
    data = open_data("fashion-mnist-sample").subset(40, 20)
    for name, split in (("train", data.train), ("val", data.test)):
        for index, label in enumerate(split.labels):
            (place / "images" / name / f"class{label}").mkdir(parents=True, exist_ok=True)
            split.image(index).save(place / "images" / name / f"class{label}" / f"{index}.png")
    torch.manual_seed(0)
    model = timm.create_model(VIT, **SIZES, num_classes=10, pretrained_cfg_overlay={"input_size": (1, 28, 28)})
    save_model(model, place / "teacher", normalisation=((0.2,), (0.3,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("kdvit.training.trainer.draw_curves", lambda *arguments: False)
        assert compare("--seeds", "0", "2") == 0
        yield place


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdvit.training.trainer.draw_curves", lambda *arguments: False)


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "120")


def compare(*more: str, student: str = VIT, output: str = "runs/compare") -> int:
    what = ["--data", "images", "--teacher", "teacher", "--student", student, "--student-options", TINY]
    return main(["compare", *what, "--steps", "2", "--batch-size", "8", "--output", output, *more])


def same(found: dict, expected: dict) -> bool:
    """Equal numbers at equal names, to rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    return found == pytest.approx(expected, rel=1e-5, abs=1e-6) if expected is not None else found is None


def run_evaluate(*more: str) -> int:
    return main(["evaluate", *more, "--data", "images"])


def cells(text: str, title: str) -> list[str]:
    """The numbers of a line of the table."""
    line = next(line for line in text.splitlines() if line.strip().startswith(title))
    return line.strip().removeprefix(title).split()


# compare


def test_compare_prints_the_table_and_what_it_says(place: Path, capsys):
    assert compare("--seeds", "0", "2") == 0  # all runs are there
    out = capsys.readouterr().out
    record = json.loads((place / "runs/compare/comparison.json").read_text())
    assert record["seeds"] == [0, 2] and [line["name"] for line in record["figures"]][:7] == list(FIGURES)
    for line in record["figures"][:7]:
        first = cells(out, line["title"])
        digits = line["digits"]
        assert first[0] == f"{line['alone']['mean']:.{digits}f}"
        assert first[2] == f"{line['alone']['deviation']:.{digits}f}"
        assert first[6] == f"{line['difference']['mean']:+.{digits}f}"
    assert " ".join(record["verdict"].split()) in " ".join(out.split())
    assert "Written to runs/compare/comparison.md and .json." in out


def test_the_distilled_run_is_that_of_distill(place: Path, no_curves: None):
    """One command for all seeds trains what `kdvit distill --seed 2` trains."""
    what = ["--data", "images", "--teacher", "teacher", "--student", VIT, "--student-options", TINY]
    assert main(["distill", *what, "--steps", "2", "--batch-size", "8", "--seed", "2", "--output", "runs/single"]) == 0
    single, compared = (
        create_model(f"runs/{name}/student").state_dict() for name in ("single", "compare/distilled/seed2")
    )
    assert all(torch.equal(single[name], compared[name]) for name in single)


def test_the_student_alone_learns_from_labels(place: Path):
    summary = json.loads((place / "runs/compare/alone/seed2/run.json").read_text())
    assert (summary["teacher"], summary["losses"], summary["weights"]) == (None, {}, {"task": 1.0})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--seeds", "0", "0"],
            "compare: seeds must be one or more different whole numbers, got (0, 0); list each once.",
        ),
        (["--seed", "3"], "unrecognized arguments: --seed 3; did you mean '--seeds'? see `kdvit compare --help`."),
        (
            ["--no-task-loss", "--loss", "vitkd"],
            "compare: the losses must train the student's classifier, or its accur",
        ),
        (
            ["--steps", "3"],
            "Trainer: steps must be 2 as in the run in 'runs/compare/alone/seed0', got 3; resume it as ",
        ),
    ],
)
def test_a_mistake_in_compare_is_one_sentence(more, sentence, capsys):
    assert compare(*more) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kdvit: {sentence}") and error.count("\n") == 1


# evaluate


def test_evaluate_a_run_beside_its_baseline_and_teacher(place: Path, capsys):
    runs = "runs/compare/distilled/seed2", "--baseline", "runs/compare/alone/seed2/student"
    assert run_evaluate(*runs, "--teacher", "teacher", "--json", "found.json") == 0
    out = capsys.readouterr().out
    found = json.loads((place / "found.json").read_text())
    compared = json.loads((place / "runs/compare/comparison.json").read_text())["runs"]
    assert same(found["models"]["student"], compared["distilled"][1]["fidelity"])
    assert same(found["models"]["baseline"], compared["alone"][1]["fidelity"])
    names = {"student": f"{runs[0]} (1x28x28 images)", "baseline": f"{runs[2]} (1x28x28 images)", "teacher": "teacher"}
    assert found["names"] == names
    student, teacher = found["models"]["student"], found["models"]["student"]["teacher"]
    top1 = [f"{model['accuracy']['top1']:.2f}" for model in (student, found["models"]["baseline"], teacher)]
    assert cells(out, "top-1, %") == top1
    assert cells(out, "agreement, %")[0] == f"{student['agreement']:.2f}" and len(cells(out, "agreement, %")) == 2
    assert f"student  {runs[0]}" in out and "20 test images." in out
    assert len(re.findall(r"^ *class class\d, % +\d", out, re.MULTILINE)) == 5
    assert found["layers"]["student"] == found["layers"]["teacher"] == ["blocks.0", "blocks.1"]
    assert cells(out, "blocks.1") == [f"{value:.2f}" for value in found["layers"]["cka"][1]]


def test_evaluate_without_a_teacher(capsys):
    assert run_evaluate("runs/compare/alone/seed0") == 0
    out = capsys.readouterr().out
    assert "KL(" not in out and "CKA" not in out and "agreement" not in out
    assert len(cells(out, "top-1, %")) == 1 and "the student's of the lowest accuracy" in out


def test_evaluate_a_shipped_model(capsys):
    more = "--image-size", "28", "--teacher", "fashion_mnist_cnn", "--layers", "2"
    assert run_evaluate("fashion_mnist_cnn", *more) == 0
    out = capsys.readouterr().out
    assert cells(out, "agreement, %") == ["100.00"] and cells(out, "KL(teacher||model)") == ["0.000"]
    assert float(cells(out, "top-1, %")[0]) >= 85
    assert cells(out, "layer4")[1] == "1.00" and "student  fashion_mnist_cnn (1x28x28 images)" in out


def test_a_models_own_transform_is_used(place: Path):
    """The run's normalisation where there is a run, else that of the config; the teacher gets its own."""
    run = evaluate._subject("runs/compare/distilled/seed0")
    summary = json.loads((place / "runs/compare/distilled/seed0/run.json").read_text())
    assert list(run.transform.mean) == summary["transform"]["mean"] == [0.2]
    assert evaluate._subject("runs/compare/distilled/seed0/best").transform == run.transform
    assert run.student.normalisation == ((0.2,), (0.3,))
    assert evaluate._subject("teacher").transform.std == (0.3,)


def test_a_student_that_is_deployed_with_its_teachers_classifier(no_curves: None, capsys):
    assert main(
        ["distill", "--data", "images", "--teacher", "teacher", "--student", VIT, "--student-options", TINY, "--steps",
         "1", "--batch-size", "8", "--loss", "simkd:feature='pooled'", "--no-task-loss", "--output", "runs/simkd"]
    ) == 0  # fmt: skip
    top1 = json.loads(Path("runs/simkd/run.json").read_text())["result"]["top1"]
    capsys.readouterr()
    assert run_evaluate("runs/simkd", "--teacher", "teacher") == 0
    out = capsys.readouterr().out
    assert cells(out, "top-1, %")[0] == f"{top1:.2f}" and len(cells(out, "blocks.1")) == 2


def test_no_layers_on_demand(capsys):
    assert run_evaluate("runs/compare/alone/seed0", "--teacher", "teacher", "--layers", "0") == 0
    assert "CKA" not in capsys.readouterr().out


def test_layers_that_cannot_be_compared_leave_the_figures(place: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate, "_LAYER_IMAGES", 3)
    assert run_evaluate("teacher", "--teacher", "fashion_mnist_vit", "--json", "few.json") == 0
    out = capsys.readouterr().out
    reason = "The layers are not compared: layer_similarity: batches must hold at least 4 images, got 3; give more."
    assert len(cells(out, "top-1, %")) == 2 and reason in out
    assert json.loads((place / "few.json").read_text())["layers"] == reason


MISTAKES = {
    "model": (
        ["runs/nothing"],
        "model folder 'runs/nothing' must hold config.json and model.safetensors; check the path",
    ),
    "empty run": (["half"], "model folder 'half/student' must hold config.json and model.safetensors; check the path."),
    "summary": (["odd"], "evaluate: 'odd/run.json' must be the run.json of a run with its transform, and is not ("),
    "classes": (
        ["five"],
        "evaluate: 'five' must have the 10 classes of data 'images', got 5; evaluate it on data of its",
    ),
    "teacher's classes": (["teacher", "--teacher", "five"], "Distiller: teacher 'five' teaches 5 classes but student"),
    "layers": (
        ["teacher", "--teacher", "teacher", "--layers", "-1"],
        "--layers: it must be >= 0, got -1; 0 compares none.",
    ),
    "json": (
        ["teacher", "--json", "no/such.json"],
        "--json: 'no/such.json' must be in a folder that exists, got none;",
    ),
    "json folder": (
        ["teacher", "--json", "images"],
        "--json: 'images' must be a file, got a folder; name a file in it.",
    ),
    "batch": (["teacher", "--batch-size", "0"], "EpochBatchSampler: batch_size must be >= 1, got 0;"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_evaluate_is_one_sentence(case, place: Path, capsys):
    (place / "half").mkdir(exist_ok=True)
    (place / "half" / "run.json").write_text("{}")
    (place / "odd" / "student").mkdir(exist_ok=True, parents=True)
    for name in ("odd/student", "five"):
        overlay = {"input_size": (1, 28, 28)}
        save_model(timm.create_model(VIT, **SIZES, num_classes=5, pretrained_cfg_overlay=overlay), place / name)
    (place / "odd" / "run.json").write_text('{"transform": {"size": 3}}')
    more, sentence = MISTAKES[case]
    assert run_evaluate(*more) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kdvit: {sentence}") and error.count("\n") == 1


# The heat table


def test_the_heat_table_shades_by_value():
    values = torch.tensor([[1.0, 0.5, -0.2], [torch.nan, 0.99, 0.0]])
    table = evaluate.heat_table(LayerSimilarity(("a", "b"), ("x", "y", "z"), values, values))
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue().split()
    assert text == ["x", "y", "z", "a", "1.00", "0.50", "-0.20", "b", "-", "0.99", "0.00"]
    styles = [[str(cell.style) for cell in column.cells] for column in table.columns[1:]]
    darkest, lightest = f"white on {evaluate._SHADES[-1]}", f"black on {evaluate._SHADES[0]}"
    assert styles == [[darkest, ""], [f"white on {evaluate._SHADES[4]}", darkest], [lightest, lightest]]
