"""The report: one file that needs nothing, shows what a run left, and says what it did not leave."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kdvit import Trainer, Training
from kdvit.cli import main
from kdvit.data import open_data
from kdvit.report import write_report
from kdvit.report.chart import MAX_POINTS, Series, area_chart, line_chart, matrix_chart, thinned
from kdvit.report.page import duration
from kdvit.report.run import read_run, read_runs
from kdvit.report.scale import log_ticks, nice_ticks, short, tick_format
from kdvit.training.insight import sample_batch, write_insight
from tests.training.conftest import distiller as make_distiller

SETTINGS = {"epochs": 4, "steps": None, "batch_size": 16, "optimizer": "adamw", "lr": 1e-3, "betas": [0.9, 0.999]}
LABELS = ["cat", "<script>alert(1)</script>"]


class Page(HTMLParser):
    """Every tag with its attributes, and all text; open tags must be closed in their order."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def charts(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]


def make_run(folder: Path, *, top1: float = 80.0, teacher_top1: float | None = 90.0, **facts: Any) -> Path:
    """A run of 40 steps and 4 evaluations, without an insight."""
    folder.mkdir(parents=True)
    record = {
        "written": "2026-01-01T00:00:00+00:00",
        "command": ["kdvit", "distill"],
        "versions": {"torch": "2.0", "timm": "1.0"},
        "result": {
            "top1": top1, "top5": 99.0, "best_top1": top1 + 1, "best_epoch": 3, "teacher_top1": teacher_top1,
            "num_steps": 40, "seconds": 75.0, "folder": str(folder),
        },
        "settings": SETTINGS,
        "transform": {"image_size": 28},
        "data": "toys, 8000 images",
        "student": "small",
        "teacher": "large",
        "losses": {"kd": "KD(temperature=4.0)"},
        "weights": {"task": 0.1, "kd": 0.9},
        "device": "cpu",
    } | facts  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    metrics, timing = [], []
    for step in range(10, 41, 10):
        shares = {"gradient_share": {"task": 0.25, "kd": 0.75}, "gradient_cosine": {"kd": 0.5}}
        metrics.append(
            {"kind": "step", "step": step, "epoch": step / 10, "lr": 1e-3 / step, "loss": 3.0 / step,
             "losses": {"task": 1.0 / step, "kd": 2.0 / step}, **shares}
        )  # fmt: skip
        metrics.append(
            {"kind": "evaluation", "step": step, "epoch": step // 10, "top1": top1 - 40 + step, "top5": 99.0}
        )
        timing.append({"step": step, "images_per_second": 100.0 + step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing))
    return folder


def add_insight(folder: Path) -> None:
    (folder / "insight").mkdir()
    predictions = [[["cat", 0.9], ["dog", 0.1]], [["dog", 0.7], [LABELS[1], 0.3]]]
    model = {"kind": "attention of the class token", "layers": ["blocks.0.attn", "blocks.1.attn"], "note": None}
    facts = {
        "format": 1,
        "labels": LABELS,
        "student": {"name": "small", **model, "predictions": predictions},
        "teacher": {"name": "large", **model, "predictions": None},
        "similarity": {
            "num_images": 64, "note": None, "student_layers": ["blocks.0", "blocks.1"], "teacher_layers": ["layer1"],
        },
    }  # fmt: skip
    generator = np.random.default_rng(0)
    maps = {
        f"{side}.{index}": generator.random((2, 4, 4), np.float32)
        for side in ("student", "teacher")
        for index in (0, 1)
    }
    matrices = {
        "cka": np.array([[0.5], [0.25]], np.float32),
        "relation_distance": np.array([[0.1], [np.nan]], np.float32),
    }
    images = generator.integers(0, 256, (2, 3, 28, 28), np.uint8)
    (folder / "insight" / "insight.json").write_text(json.dumps(facts))
    save_file({"images": images, **maps, **matrices}, folder / "insight" / "insight.safetensors")


def fidelity(*classes: float | None, teacher: dict | None = None) -> dict[str, Any]:
    accuracy = {"top1": 80.0, "top5": 99.0, "loss": 0.5, "num_images": 10}
    close = {"agreement": 85.0, "kl": 0.25} if teacher else {"agreement": None, "kl": None}
    return {"accuracy": accuracy, "calibration_error": 3.0, "class_accuracy": classes, "teacher": teacher, **close}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "first")
    add_insight(folder)
    return folder


def report(*runs: Path, **options: Any) -> Page:
    return Page(write_report(runs, runs[0].parent / "pages" / "report.html", **options))


def warnings_of(page: Page) -> str:
    found = re.search(r'<section class="warnings".*?</section>', page.source, re.DOTALL)
    return found[0] if found else ""


# The page


def test_the_page_loads_nothing(run):
    page = report(run)
    assert len(page.source) > 10_000 and "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base") and not {"src", "href", "srcset"} & set(
            attributes
        )
    addresses = re.findall(r"url\((.*?)\)", page.source)
    assert addresses and all(address.startswith("data:image/") for address in addresses)
    assert "@import" not in page.source and "http:" not in page.source and "https:" not in page.source


def test_numbers_of_the_head(run):
    page = report(run)
    assert "small learned from large on toys (8,000 training images) for 4 epochs." in page.text
    assert "Student 80.00 % top-1; best 81.00 % at epoch 3" in page.text
    assert "Teacher 90.00 % the student is 10.00 points below" in page.text
    assert "Time 1 min 15 s 125 images a second" in page.text
    assert "Baseline" not in page.text and not warnings_of(page)


def test_every_chart_is_there_and_whole(run):
    page = report(run)
    assert [chart.get("aria-label") for chart in page.charts] == [
        "Accuracy on the test images", "Weighted sum of the losses", "Gradient share of each loss",
        "Direction of each loss", "task", "kd",
        "CKA of student and teacher layers", "relation distance of student and teacher layers", "Learning rate",
        "Images a second",
    ]  # fmt: skip
    for legend in ("teacher 90.00 %", "task 25.0 %", "kd 75.0 %", "kd 0.5", "last 0.075", "last 140"):
        assert legend in page.text
    assert "attention of the class token" in page.text and "student: cat 90 %" in page.text
    assert page.source.count('class="right"') == page.source.count('class="wrong"') == 1
    assert len([1 for tag, facts in page.tags if facts.get("class") == "picture"]) == 2 * (1 + 2 + 2)
    for word in ("KD(temperature=4.0)", "cross-entropy with the labels", "0.9, 0.999", "torch 2.0, timm 1.0"):
        assert word in page.text


def test_of_many_losses_the_strongest_have_a_colour_each(tmp_path):
    folder = make_run(tmp_path / "many")
    shares = {"task": 0.001, **{f"loss{index}": index / 100 for index in range(1, 13)}}
    lines = [
        {"kind": "gradient", "step": step, "gradient_share": shares, "gradient_cosine": dict.fromkeys(shares, 0.5)}
        for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(folder)
    legend = re.findall(r'<li><i class="(.*?)"></i>(.*?) <b>(.*?)</b>', page.source)
    strongest = [("c0", "task"), *((f"c{index - 5}", f"loss{index}") for index in range(6, 13))]
    assert [one[:2] for one in legend[:8]] == strongest == [one[:2] for one in legend[9:17]]
    assert legend[8] == ("others", "5 others", "15.0 %")  # 1 + 2 + 3 + 4 + 5
    areas = [one.get("class") for one in page.charts[0].iter("polygon")]
    assert areas == [*(f"area {style}" for style, _ in strongest), "area others"]


def test_a_single_term_needs_no_share(tmp_path):
    folder = make_run(tmp_path / "alone")
    (folder / "metrics.jsonl").write_text('{"kind": "gradient", "step": 1, "gradient_share": {"task": 1.0}}\n')
    assert "Gradient share" not in report(folder).text


def test_text_of_runs_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    folder = make_run(
        tmp_path / "<b>run", student=evil, teacher=evil, data=evil, losses={evil: evil}, weights={evil: 1.0},
        settings={"optimizer": evil, evil: 1}, command=[evil], versions={evil: evil},
    )  # fmt: skip
    add_insight(folder)
    lines = [
        {"kind": "step", "step": 1, "losses": {evil: 1.0}, "gradient_share": {evil: 1.0}, "gradient_cosine": {evil: 1}}
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {"classes": [evil], "models": {"student": fidelity(50.0, teacher=fidelity(60.0)), evil: fidelity(1.0)}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = report(folder)
    assert evil not in page.source and "<b>run" not in page.source
    assert page.source.count("&lt;script&gt;") > 15
    assert {tag for tag, _ in page.tags} & {"script"} == set()


def test_several_runs_are_laid_over_each_other(tmp_path, run):
    second, alone = (
        make_run(tmp_path / "second", top1=82.0),
        make_run(
            tmp_path / "alone", top1=75.0, teacher_top1=None, teacher=None, losses={}, settings=SETTINGS | {"lr": 0.01}
        ),
    )
    page = report(run, second, baseline=alone)
    assert "Baseline 75.00 % the student is 5.00 points above" in page.text
    assert "Gap closed 33 % of the way from baseline to teacher" in page.text
    accuracy = page.charts[0]
    drawn = [line.get("class") for line in accuracy.iter("polyline")]
    assert drawn == ["line baseline", "line c1", "line c0"]  # the subject on top
    assert "The baseline is not trained alike: lr 0.001 against 0.01." in page.text
    for legend in ("first 80.00 %", "second 82.00 %", "alone 75.00 %", "teacher 90.00 %"):
        assert legend in page.text
    differing = re.findall(r'<tr class="differs"><th>(.*?)</th>', page.source)
    assert differing == ["teacher", "lr"]
    assert [tag for tag, facts in page.tags].count("polyline") == 3 + 1 + 3 * 5


def test_a_curve_of_one_of_several_runs_names_it(tmp_path, run):
    second = make_run(tmp_path / "second")
    with (second / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 50, "losses": {"other": 7.5}}\n')
    assert "other second 7.5" in report(run, second).text and "other last 7.5" in report(second).text


def test_a_baseline_among_the_runs_is_drawn_once(tmp_path, run):
    alone = make_run(tmp_path / "alone", top1=75.0)
    page = report(run, alone, baseline=run / ".." / "alone")
    drawn = [line.get("class") for line in page.charts[0].iter("polyline")]
    assert drawn == ["line baseline", "line c0"]


def test_runs_are_called_by_what_their_paths_do_not_share(tmp_path):
    paths = [make_run(tmp_path / kind / seed) for kind in ("alone", "distilled") for seed in ("seed0", "seed1")]
    assert [each.name for each in read_runs(paths)] == [
        "alone/seed0", "alone/seed1", "distilled/seed0", "distilled/seed1",
    ]  # fmt: skip
    assert [each.name for each in read_runs(paths[:2])] == ["seed0", "seed1"]


def test_classes_come_from_an_evaluation(run):
    student = fidelity(70.0, 95.0, None, teacher=fidelity(90.0, 92.0, 50.0))
    record = {"classes": ["cat", "dog", "eel"], "models": {"student": student, "baseline": fidelity(60.0, 90.0, None)}}
    (run / "evaluation.json").write_text(json.dumps(record))
    page = report(run)
    assert "agreement with the teacher 85.00 % – –" in page.text and "KL(teacher || model), nats 0.250 – –" in page.text
    assert page.text.index("cat 70.00 % 90.00 % −20.00") < page.text.index("dog 95.00 % 92.00 % +3.00")
    assert "eel" not in page.text
    record["classes"] = ["cat"]
    (run / "evaluation.json").write_text(json.dumps(record))
    page = report(run)
    assert "evaluation.json cannot be read (the accuracies of the student do not fit the 1 classes)" in page.text
    assert "Class by class" not in page.text


def test_photographs_are_kept_as_jpeg(run):
    tensors = load_file(run / "insight" / "insight.safetensors")
    assert report(run).source.count("data:image/jpeg") == 0
    rows = np.linspace(0, 255, 224).astype(np.uint8)
    tensors["images"] = np.broadcast_to(rows[:, None], (2, 3, 224, 224)).copy()
    save_file(tensors, run / "insight" / "insight.safetensors")
    assert report(run).source.count("data:image/jpeg") == 2


# What is missing


def test_what_is_missing_is_said(tmp_path):
    empty = make_run(tmp_path / "no insight")
    assert "No insight/ folder: the maps of both models" in warnings_of(report(empty))
    unfinished = make_run(tmp_path / "unfinished", result=None)
    page = report(unfinished)
    assert "The run did not finish: its last line of metrics is that of step 40." in warnings_of(page)
    assert "Student 80.00 % top-1 on the test images" in page.text and "Time" not in page.text
    worse = make_run(tmp_path / "worse", teacher_top1=70.0)
    assert "The teacher (70.00 %) is worse than the student (80.00 %)" in warnings_of(report(worse))
    better = make_run(tmp_path / "better", top1=85.0)
    assert "5.00 points below the baseline &#39;better&#39;: distillation did not help" in warnings_of(
        report(empty, baseline=better)
    )
    other = make_run(tmp_path / "other", data="toys, 10 images")
    assert "data &#39;toys, 8000 images&#39; against &#39;toys, 10 images&#39;" in warnings_of(
        report(empty, baseline=other)
    )


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run.json", None, "run.json is missing: settings, versions"),
        ("run.json", b'{"settings": ', "run.json cannot be read (Expecting value"),
        ("run.json", b"[]", "run.json holds no settings."),
        ("run.json", b'{"settings": 3}', "run.json: settings cannot be read, and is left out."),
        ("run.json", b'{"versions": [1], "result": "x"}', "run.json: result cannot be read, and is left out."),
        ("run.json", b'{"result": {"seconds": NaN, "best_top1": "x"}}', "Student 80.00 % top-1 on the test images"),
        ("metrics.jsonl", None, "metrics.jsonl is missing: there are no curves."),
        ("metrics.jsonl", b'{"kind": "step", "step": 1}\n{"kind": "st', "metrics.jsonl: lines that cannot be read"),
        ("metrics.jsonl", b"\xff\xfe\n[1]\n", "lines that cannot be read are left out: 2 of 2."),
        ("timing.jsonl", b"nonsense\n", "timing.jsonl: lines that cannot be read are left out: 1 of 1."),
        ("insight/insight.json", None, "insight/ cannot be read (No such file"),
        ("insight/insight.json", b"{}", "insight/ cannot be read ('labels' is missing)"),
        ("insight/insight.json", b"[]", "insight/ cannot be read ("),
        ("insight/insight.safetensors", None, "insight/ cannot be read (No such file"),
        ("insight/insight.safetensors", b"12345678901234567890", "insight/ cannot be read ("),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_the_rest_is_shown(run, file, content, said):
    (run / file).unlink()
    if content is not None:
        (run / file).write_bytes(content)
    page = report(run)
    assert said in page.text
    assert ("Where they look" in page.text) == (not file.startswith("insight"))
    assert ("125 images a second" in page.text) == file.startswith(("insight", "metrics"))


def test_an_insight_that_does_not_fit_together_is_left_out(run):
    file = run / "insight" / "insight.json"
    facts = json.loads(file.read_text())
    for change in (
        {"labels": ["cat"]},
        {"student": facts["student"] | {"predictions": []}},
        {"teacher": facts["teacher"] | {"layers": ["a", "b", "c"]}},
        {"similarity": facts["similarity"] | {"teacher_layers": ["a", "b"]}},
        {"similarity": facts["similarity"] | {"teacher_layers": [None]}},
        {"student": facts["student"] | {"layers": {"a": 1}}},
        {"student": facts["student"] | {"predictions": [[["cat", 0.9]], []]}},
        {"student": facts["student"] | {"predictions": [[["cat", 0.9]], [["cat", math.nan]]]}},
        {"student": {name: value for name, value in facts["student"].items() if name != "kind"}},
    ):
        file.write_text(json.dumps(facts | change))
        page = report(run)
        assert "insight/ cannot be read" in page.text and "Where they look" not in page.text


def test_an_older_run_has_its_throughput_in_the_metrics(run):
    (run / "timing.jsonl").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with (run / "metrics.jsonl").open("w") as file:
        for line in lines:
            file.write(json.dumps(line | ({"images_per_second": 55.0} if line["kind"] == "step" else {})) + "\n")
    assert "55 images a second" in report(run).text


def test_values_that_cannot_be_drawn_are_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 50, "loss": NaN, "losses": {"task": Infinity, "kd": "x"}, "lr": null}\n')
        file.write('{"kind": "step", "step": 60, "losses": 3, "gradient_share": null}\n')
    found = read_run(run, "first")
    assert found.series("loss")[-1][0] == 40 and found.series("task", inside="losses")[-1][0] == 40
    assert report(run).charts[1].get("aria-label") == "Weighted sum of the losses"


def test_a_run_without_a_classifier_shows_no_guesses_of_the_student(tmp_path):
    folder = make_run(tmp_path / "features")
    add_insight(folder)
    record = json.loads((folder / "run.json").read_text())
    record["result"] |= {"top1": None, "best_top1": None}
    (folder / "run.json").write_text(json.dumps(record))
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "evaluation" not in line]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = report(folder)
    assert "student: cat" not in page.text and "Student – no accuracy" in page.text
    assert "No accuracy: nothing was evaluated, or no classifier was trained." in page.text


def test_models_without_maps_say_why(run):
    file = run / "insight" / "insight.json"
    facts = json.loads(file.read_text())
    facts["teacher"] |= {"kind": None, "layers": [], "note": "its outputs were stored"}
    facts["student"] |= {"note": "no predictions: its logits are NaN", "predictions": None}
    facts["similarity"] = facts["similarity"] | {"note": "a plain module", "student_layers": [], "teacher_layers": []}
    file.write_text(json.dumps(facts))
    page = report(run)
    assert "Teacher (large): no maps, since its outputs were stored" in page.text
    assert "Student (small): attention of the class token; no predictions: its logits are NaN" in page.text
    assert "Not compared: a plain module" in page.text
    assert len([1 for tag, attributes in page.tags if attributes.get("class") == "picture"]) == 2 * (1 + 2)
    facts["teacher"] = facts["similarity"] = None
    file.write_text(json.dumps(facts))
    assert "Teacher (" not in report(run).text


# Errors and the command


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path, run):
    cases = {
        (): "report: runs must name a run folder, got none; give the --output of a training run.",
        (
            tmp_path / "none",
        ): f"report: '{tmp_path / 'none'}' must be a run folder with run.json and metrics.jsonl, got no "
        "folder; give the --output of a training run.",
        (
            run / "insight",
        ): f"report: '{run / 'insight'}' must be a run folder with run.json and metrics.jsonl, got a folder without "
        "them; give the --output of a training run.",
        (
            tmp_path,
        ): f"report: '{tmp_path}' must be a run folder with run.json and metrics.jsonl, got a folder of 1; name those, "
        f"such as '{run}'.",
        (
            run,
            run / ".." / "first",
        ): f"report: each run must be named once, got '{run / '..' / 'first'}' twice; leave one out.",
    }
    for runs, sentence in cases.items():
        with pytest.raises(ValueError) as error:
            write_report(runs, tmp_path / "report.html")
        assert str(error.value) == sentence
    with pytest.raises(
        ValueError, match="report: baseline must be another run than the first, got '.*' for both; name"
    ):
        write_report([run], tmp_path / "report.html", baseline=run)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"report: '.*' cannot be written \(.*\); choose another --output\."):
        write_report([run], tmp_path / "file" / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_command(tmp_path, run, capsys):
    alone = make_run(tmp_path / "alone", top1=75.0)
    output = tmp_path / "page.html"
    assert main(["report", str(run), "--baseline", str(alone), "--output", str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"written: {output} (0.") and "Gap closed" in Page(output).text
    assert main(["report", str(tmp_path)]) == 2
    assert "kdvit: report: '" in capsys.readouterr().err
    assert main(["report"]) == 2


def test_a_real_run_is_shown(tmp_path):
    tiny_data = open_data("fashion-mnist-sample").subset(64, 32)
    distiller = make_distiller()
    settings = Training(epochs=1, batch_size=16, log_steps=1)
    trainer = Trainer(distiller, tiny_data, settings, tmp_path / "run", quiet=True)
    trainer.fit()
    images, labels = sample_batch(tiny_data.test, trainer.transform)
    facts = {"mean": trainer.transform.mean, "std": trainer.transform.std}
    write_insight(distiller, images, labels, tiny_data.classes, tmp_path / "run" / "insight", **facts)
    page = report(tmp_path / "run")
    assert (
        f"small learned from {distiller.teacher.name} on fashion-mnist-sample (64 training images) for 1 epoch."
        in page.text
    )
    assert len(page.charts) >= 7 and "Where they look" in page.text and "blocks.1" in page.text


# The charts


def test_lines_go_through_their_points():
    chart = ElementTree.fromstring(line_chart([Series("a", [(0, 0.0), (50, 10.0), (100, 5.0)])], "a"))
    points = chart.find("polyline").get("points").split()
    xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert xs[1] == pytest.approx((xs[0] + xs[2]) / 2) and ys[2] == pytest.approx((ys[0] + ys[1]) / 2)
    assert ys[1] < ys[2] < ys[0]  # up is up
    assert [text.text for text in chart.iter("text") if text.get("class") == "y"] == ["0", "2", "4", "6", "8", "10"]
    titles = [title.text for title in chart.iter("title")]
    assert titles == ["step 0\na: 0", "step 50\na: 10", "step 100\na: 5"]


def test_a_wide_range_is_logarithmic():
    points = [(0, 1000.0), (1, 10.0), (2, 0.1)]
    log, linear = (ElementTree.fromstring(line_chart([Series("a", points)], "a", log=log)) for log in (None, False))
    ys = [
        [float(point.split(",")[1]) for point in chart.find("polyline").get("points").split()]
        for chart in (log, linear)
    ]
    assert ys[0][1] == pytest.approx((ys[0][0] + ys[0][2]) / 2, abs=0.11)
    assert ys[1][1] > ys[1][2] - 5


def test_areas_fill_the_whole():
    series = [Series("a", [(0, 0.25), (10, 0.5)], "c0"), Series("b", [(0, 0.75), (10, 0.5)], "c1")]
    chart = ElementTree.fromstring(area_chart(series, "shares"))
    areas = [[tuple(map(float, p.split(","))) for p in one.get("points").split()] for one in chart.iter("polygon")]
    top, bottom = min(y for area in areas for _, y in area), max(y for area in areas for _, y in area)
    assert [y for _, y in areas[0][:2]] == [bottom - 0.25 * (bottom - top), bottom - 0.5 * (bottom - top)]
    assert [y for _, y in areas[1][:2]] == [top, top] and areas[1][2:] == areas[0][1::-1]
    single = ElementTree.fromstring(area_chart([Series("a", [(3, 1.0)])], "one"))
    assert len(single.find("polygon").get("points").split()) == 4


def test_a_matrix_shows_its_numbers():
    values = np.array([[1.0, 0.0], [np.nan, -0.25]])
    chart = ElementTree.fromstring(
        matrix_chart(values, ["a", "b"], ["x", "layers.2.blocks.17.mlp"], "m", style="alike")
    )
    cells = [text.text for text in chart.iter("text") if "cell" in text.get("class")]
    assert cells == ["1.00", "0.00", "–", "−0.25"]
    strength = [float(box.get("fill-opacity")) for box in chart.iter("rect") if box.get("class") == "alike"]
    assert strength == [1.0, 0.06, 0.06, 0.06]
    heads = [text.text for text in chart.iter("text") if text.get("class") == "head"]
    assert heads[0] == "x" and heads[1].startswith("…") and heads[1].endswith("17.mlp")
    assert "student a · teacher layers.2.blocks.17.mlp: 0.00" in [title.text for title in chart.iter("title")]


def test_long_curves_are_thinned_to_means():
    points = [(float(step), float(step % 2)) for step in range(10 * MAX_POINTS)]
    found = thinned(points)
    assert len(found) == MAX_POINTS and found[0] == (4.5, 0.5) and found[-1][0] == 10 * MAX_POINTS - 5.5
    assert thinned(points[:5]) == points[:5]


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (1e-6, 1e-3), (-0.3, 0.9), (74.2, 75.9), (5.0, 5.0), (0.0, 0.0), (-3.0, -3.0), (1.0, 1e6)],
)
def test_ticks_are_few_round_and_enclose(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 8
    assert len({tick_format(ticks)(tick) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(("low", "high"), [(0.003, 0.9), (1.0, 60.0), (1e-8, 1e5), (0.2, 20.0), (1.0, 100.0)])
def test_ticks_of_a_logarithmic_axis(low, high):
    ticks = log_ticks(low, high)
    assert ticks[0] <= low * 1.01 and ticks[-1] >= high * 0.99 and 3 <= len(ticks) <= 12
    assert len({short(tick) for tick in ticks}) == len(ticks)


def test_numbers_are_written_as_people_read_them():
    assert tick_format([0.3, 0.32, 0.34])(0.3) == "0.30" and tick_format([0.0, 2e-4])(2e-4) == "2e-4"
    assert tick_format([-0.5, 0.0, 0.5])(-0.5) == "−0.5" and tick_format([0.0, 1000.0])(1000.0) == "1,000"
    assert [duration(s) for s in (0.4, 59.6, 3600)] == ["0 s", "1 min 0 s", "1 h 0 min"]
