"""`python benchmarks/stored_teacher.py`: each command runs, and the contenders are what their names say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import stored_accuracy
import stored_teacher
import torch
from stored_teacher import ALONE, CONSTANT, LIVE, LOADING, STORED

from kdvit import Teacher, Training, create_model
from kdvit.data import TransformSettings, open_data
from tests import tiny


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """DeiT is the same code. Curves are not drawn: it takes longer than such a run."""
    monkeypatch.setattr("kdvit.training.trainer.draw_curves", lambda *arguments: False)
    pair = {"num_classes": 10, "depth": 3}
    monkeypatch.setattr(
        stored_teacher, "models", lambda teacher: (tiny.vit(0, **pair), tiny.vit(1, embed_dim=32, **pair))
    )
    monkeypatch.setattr(stored_teacher, "TRANSFORM", TransformSettings(image_size=32))
    monkeypatch.setattr(
        stored_teacher, "FORMS", {"kd": ("fp32", "fp16", "top3"), "vitkd": ("fp32", "fp16", "int8", "project8")}
    )


def test_time_bytes_and_page(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_teacher, "DOCS", tmp_path)
    options = ["--teachers", "small", "--output", str(tmp_path / "runs")]
    stored_teacher.main(["time", "--rounds", "2", "--steps", "1", "--batch-size", "2", *options])
    timed = json.loads((tmp_path / "runs" / "time.json").read_text())
    assert list(timed["pairs"]) == ["deit_small_patch16_224, kd", "deit_small_patch16_224, vitkd"]
    for record in timed["pairs"].values():
        assert list(record["seconds"]) == [LIVE, STORED, CONSTANT, ALONE, LOADING]
        assert all(len(values) == 2 for values in record["seconds"].values())
        assert 0 < record["first_loss_difference"] < stored_teacher.TOLERANCE  # rounded, and no more than that
    assert timed["pairs"]["deit_small_patch16_224, vitkd"]["bytes"] > 1000

    stored_teacher.main(["bytes", "--images", "4", *options])
    sizes = json.loads((tmp_path / "runs" / "bytes.json").read_text())["teachers"]["small"]
    # A row holds 10 logits, or 3 of them with their classes and the rest; the id (8 bytes) and the file's head come on
    # top, alike for all but their names.
    assert sizes["kd"]["fp32"] - sizes["kd"]["fp16"] == pytest.approx(10 * 2, abs=4)
    # Two of 3 x 16 tokens of width 32.
    assert sizes["vitkd"]["fp32"] - sizes["vitkd"]["fp16"] == pytest.approx(3 * 16 * 32 * 2, abs=4)
    assert sizes["vitkd"]["fp16"] - sizes["vitkd"]["project8"] == pytest.approx(3 * 16 * 24 * 2, abs=4)

    stored_teacher.main(["page", *options])
    text = (tmp_path / "stored_teacher.md").read_text()
    assert "## Time of a step" in text and "## Bytes" in text and "## Accuracy" not in text
    assert "constant       its signals are tensors that are always the same" in text
    assert f"| deit_small_patch16_224 | kd | top3 | {sizes['kd']['top3']:,.0f} |" in text
    assert json.loads((tmp_path / "stored_teacher.json").read_text())["time"] == timed


def test_another_loss_of_the_stored_teacher_is_refused(monkeypatch):
    monkeypatch.setattr(stored_teacher, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match=r"the first kd of stored is \S+ from that of live"):
        stored_teacher.time_steps("small", "kd", 1, 1, 2)


def test_a_constant_teacher_does_not_run_and_its_loss_does(monkeypatch):
    learner, model = stored_teacher.models("small")
    subject = stored_teacher.make_distiller(Teacher(model), learner, "vitkd")
    images, labels = tiny.images(), torch.arange(4)
    torch.manual_seed(0)
    expected = subject(images, labels).losses
    stored_teacher.with_constant_signals(subject, images)
    ran = []
    model.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    torch.manual_seed(0)
    found = subject(images, labels).losses
    assert not ran and set(found) == {"task", "vitkd.mimic", "vitkd.generate"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.manual_seed(0)
    others = subject(tiny.images(seed=2), labels).losses  # another student's answer, the same teacher's
    assert not ran and others["vitkd.mimic"] != expected["vitkd.mimic"]


def test_contenders_have_the_same_projectors():
    learner, model = stored_teacher.models("small")
    first, second = (stored_teacher.make_distiller(Teacher(model), learner, "vitkd") for _ in range(2))
    weights = first.state_dict(), second.state_dict()
    assert weights[0].keys() == weights[1].keys() and any("losses." in name for name in weights[0])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_accuracy_of_stored_rows(tmp_path):
    data, settings = open_data("fashion-mnist-sample").subset(64, 16), Training(epochs=2, batch_size=16)
    names = ("kd", "kd, fp16", "kd, top3")
    live, stored, top3 = (stored_accuracy.train(name, 3, tmp_path, data, settings) for name in names)
    assert stored["row"] == "kd, fp16" and stored["seed"] == 3 and 0 <= stored["top1"] <= 100
    assert stored["bytes"] > 10 * 2 and top3["bytes"] > 0 and "bytes" not in live
    assert not list((tmp_path / "caches").rglob("*.safetensors"))
    again = stored_accuracy.train("kd, fp16", 3, tmp_path, data, replace(settings, epochs=1))
    assert again == stored  # kept
    # The same seed, student, batches and teacher: the student is that of the live teacher to rounding (weights of no
    # effect, such as the biases of keys, may differ), and another one where seven of ten logits were dropped.
    students = [create_model(str(stored_accuracy.folder(tmp_path, name, 3) / "student")).eval() for name in names]
    with torch.no_grad():
        logits = [model(tiny.images(8, channels=1, size=(28, 28))) for model in students]
    assert (logits[1] - logits[0]).abs().max() < 5e-3
    assert (logits[2] - logits[0]).abs().max() > 0.1


def test_the_table_of_accuracies():
    runs = [
        {"row": "kd", "seed": 0, "top1": 80.0, "seconds": 10.0},
        {"row": "kd", "seed": 1, "top1": 82.0, "seconds": 12.0},
        {"row": "kd, top3", "seed": 0, "top1": 79.0, "seconds": 5.0, "bytes": 24.0},
        {"row": "kd, top3", "seed": 1, "top1": 83.0, "seconds": 5.0, "bytes": 24.0},
    ]
    assert stored_accuracy.accuracy_table(runs)[2:] == [
        "| kd | fashion_mnist_cnn | 81.00 +- 1.41 | - | - | 11 |",
        "| kd, top3 | fashion_mnist_cnn | 81.00 +- 2.83 | +0.00 +- 1.41 | 24 | 5 |",
    ]


def test_every_stored_row_has_a_live_one():
    forms = {name: form for name, (_, form) in stored_accuracy.ROWS.items()}
    assert sum(form is not None for form in forms.values()) >= 5
    for name, form in forms.items():
        if form is not None:
            live, stored = name.split(", ")
            assert forms[live] is None and stored == form
            assert stored_accuracy.ROWS[name][0] is stored_accuracy.ROWS[live][0]


def test_the_page_of_accuracies():
    facts = {"command": "python ...", "device": "cpu", "versions": {"torch": "2"}, "date": "today", "beside": "nothing"}
    runs = [{"row": "kd", "seed": 0, "top1": 80.0, "seconds": 10.0}]
    text = stored_teacher.page({"accuracy": {"facts": facts}}, runs)
    assert "| kd | fashion_mnist_cnn | 80.00 +- 0.00 | - | - | 10 |" in text and "over 1 seeds" in text
    assert "`python ...` on cpu, today, nothing beside it; torch 2." in text
