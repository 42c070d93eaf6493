"""The command line: what it prints, what it leaves, and one sentence for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console

import kdvit
from kdvit.cli import COMMANDS, main, quickstart
from kdvit.cli.options import parse_loss, parse_options
from kdvit.data import open_data
from kdvit.losses import names
from kdvit.models import SHIPPED

TINY = "img_size=28,patch_size=7,in_chans=1,embed_dim=24,depth=2,num_heads=2"
VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 40 + 20 images in ten classes."""
    folder = tmp_path_factory.mktemp("data") / "images"
    data = open_data("fashion-mnist-sample").subset(40, 20)
    for name, split in (("train", data.train), ("val", data.test)):
        for index, label in enumerate(split.labels):
            (folder / name / f"class{label}").mkdir(parents=True, exist_ok=True)
            split.image(index).save(folder / name / f"class{label}" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a teacher that is as small as the student."""
    torch.manual_seed(0)
    options = dict(item.split("=") for item in TINY.split(","))
    model = timm.create_model(VIT, **{name: int(value) for name, value in options.items()}, num_classes=10)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save({"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture
def distill(images: Path, teacher: Path, tmp_path: Path, monkeypatch) -> Callable[..., int]:
    """distill("--loss", "dkd", output="run") -> exit code, of a tiny pair on tiny data."""
    monkeypatch.chdir(tmp_path)

    def run(*more: str, **changed: str | None) -> int:
        facts = {
            "data": str(images), "teacher": VIT, "teacher_options": f"{TINY},num_classes=10",
            "teacher_checkpoint": str(teacher), "student": VIT, "student_options": TINY, "output": "run", **changed,
        }  # fmt: skip
        options = [
            text
            for name, value in facts.items()
            if value is not None
            for text in (f"--{name.replace('_', '-')}", value)
        ]
        return main(["distill", *options, "--batch-size", "8", "--log-steps", "1", *more])

    return run


def summary(folder: str = "run") -> dict:
    return json.loads((Path(folder) / "run.json").read_text())


# Help and lists


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == main([]) == main(["-h"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"kdvit \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and f"usage: kdvit {command}" in capsys.readouterr().out


def test_distill_helps_with_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--warmup-epochs FLOAT linear warm-up" in text and "--epochs INT passes over the training images; " in text
    assert "example: kdvit distill --data ./images" in text


def test_list_losses(capsys):
    assert main(["list", "losses"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == names()
    assert main(["list", "losses", "KD"]) == 0  # a word in any case
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "} == {
        name for name in names() if "kd" in name
    }


def test_list_models(capsys):
    assert main(["list", "models", "fashion"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "] == list(SHIPPED)
    assert main(["list", "models", "deit_tiny_patch16"]) == 0
    assert re.search(r"deit_tiny_patch16_224 +timm, with published weights", capsys.readouterr().out)


def test_list_data(capsys):
    assert main(["list", "data"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("fashion-mnist-sample", "fashion-mnist:FOLDER", "FOLDER", "org/name"))


def test_the_console_script_and_the_module_are_the_same():
    done = subprocess.run([sys.executable, "-m", "kdvit", "lst"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"kdvit: unknown command 'lst'; did you mean 'list'? Known: {', '.join(COMMANDS)}.\n"


# Distil


def test_distill_with_schedules(distill):
    assert distill("--loss", "WarmUp(2.0, epochs=3)*kd:temperature=Linear(8, 2)", "--steps", "2") == 0
    run = summary()
    assert run["weights"]["kd"] == "WarmUp(value=2.0, epochs=3)"
    assert run["losses"]["kd"] == "Scheduled(KD(temperature=8.0), temperature=Linear(start=8, end=2))"


def test_distill_without_a_teacher(distill):
    assert distill("--loss", "uskd", "--loss", "0.1*tfkd:kind=label_smoothing", "--steps", "2", teacher=None) == 0
    assert summary()["teacher"] is None and summary()["losses"].keys() == {"uskd", "tfkd"}


def test_distill_with_a_second_view_and_held_out_images(distill):
    assert distill("--loss", "0.9*mlld", "--loss", "ptloss", "--loss", "mkd", "--steps", "2") == 0
    assert summary()["losses"].keys() == {"mlld", "ptloss", "mkd"}


def test_distill_by_pretraining_and_then_labels(distill):
    stages = "--loss", "Steps({0: 1, 1: 0})*minilm", "--task-weight", "Steps({0: 0, 1: 1})"
    assert distill(*stages, "--steps", "2") == 0
    assert summary()["weights"] == {"task": "Steps(values={0: 0, 1: 1})", "minilm": "Steps(values={0: 1, 1: 0})"}


def test_distill_with_several_teachers(distill, capsys):
    shipped = {"teacher_options": None, "teacher_checkpoint": None, "teacher": "fashion_mnist_vit"}
    two = "--teacher", "fashion_mnist_cnn", "--loss", "ca_mkd", "--loss", "0.5*kd"
    assert distill(*two, "--steps", "1", **shipped) == 0
    out = capsys.readouterr().out
    assert "teacher 'fashion_mnist_vit': " in out and "teacher 'fashion_mnist_cnn': " in out
    assert summary()["teacher"] == "fashion_mnist_vit + fashion_mnist_cnn"
    assert summary()["losses"].keys() == {"ca_mkd", "kd"}


def test_distill_a_student_that_is_deployed_with_its_teachers_classifier(distill, capsys):
    shipped = {"teacher_options": None, "teacher_checkpoint": None, "teacher": "fashion_mnist_cnn"}
    assert distill("--loss", "simkd", "--no-task-loss", "--steps", "2", **shipped) == 0
    out = capsys.readouterr().out
    assert summary()["result"]["top1"] is not None
    load = re.search(r"^load it:  (.*)$", out, re.MULTILINE)[1]
    model = eval(load, {"kdvit": kdvit})
    assert type(model).__name__ == "DeployedStudent" and model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_distill_end_to_end(distill, capsys):
    code = distill(
        "--loss", "0.5*dkd:beta=2,temperature=1", "--loss", "kd:standardize=True", "--steps", "7", "--lr", "2e-3",
        "--betas", "0.8", "0.95", "--ema-decay", "0.9", "--task-weight", "2",
    )  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert "standardized_kd" in out and "image bridge, student to teacher: none" in out
    assert f"teacher '{VIT}': " in out and f"{VIT}: epoch 2/2  top-1 " in out
    facts = summary()
    assert facts["losses"]["dkd"] == "DKD(alpha=1.0, beta=2.0, temperature=1.0)"
    assert facts["weights"] == {"task": 2.0, "dkd": 0.5, "standardized_kd": 1.0}
    settings = facts["settings"]
    assert (settings["epochs"], settings["steps"], settings["lr"], settings["betas"]) == (None, 7, 2e-3, [0.8, 0.95])
    assert facts["result"]["num_steps"] == 7
    load = re.search(r"^load it:  (.*)$", out, re.MULTILINE)[1]
    model = eval(load, {"timm": timm})  # what a user would paste
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_distill_with_a_shipped_teacher(distill):
    shipped = {"teacher_options": None, "teacher_checkpoint": None}
    assert distill("--steps", "1", "--loss", "dkd", teacher="fashion_mnist_vit", **shipped) == 0
    assert summary()["teacher"] == "fashion_mnist_vit"
    assert summary()["transform"]["mean"] == [0.286]  # the teacher's, where the student starts from scratch
    assert distill("--check", teacher="fashion_mnist_cnn", output="other", **shipped) == 0


def test_epochs_are_the_default(distill):
    assert distill("--check") == 0
    assert distill("--epochs", "1", output="one") == 0
    assert (summary("one")["settings"]["epochs"], summary("one")["settings"]["steps"]) == (1, None)
    assert summary("one")["losses"] == {"kd": "KD(temperature=4.0)"}


def test_check_trains_nothing(distill, capsys):
    assert distill("--check", "--loss", "tinymim") == 0
    assert "student query" in capsys.readouterr().out
    assert [path.name for path in Path("run").iterdir()] == [".lock"]


def test_without_a_task_loss(distill):
    assert distill("--no-task-loss", "--loss", "tinymim", "--steps", "2") == 0
    facts = summary()
    assert list(facts["losses"]) == ["tinymim"] and facts["result"]["top1"] is None


def test_resume_goes_on(distill, capsys):
    assert distill("--epochs", "1") == 0
    first = summary()
    assert distill("--epochs", "1") == 2
    assert "must be empty, but holds an earlier run; choose another folder (--output)" in capsys.readouterr().err
    assert distill("--epochs", "1", "--resume") == 0
    assert summary()["result"] == first["result"]


def test_a_class_map_and_a_student_to_go_on_from(distill, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps([9, 8, 7, 6, 5, 4, 3, 2, 1, 0]))
    assert distill("--steps", "1", "--class-map", "map.json") == 0
    saved = dict(teacher="run/student", teacher_options=None, teacher_checkpoint=None)
    assert (
        distill("--steps", "1", "--seed", "3", student="run/student", student_options=None, output="on", **saved) == 0
    )
    assert summary("on")["student"] == "run/student"


def test_ctrl_c_before_training_is_a_word(distill, monkeypatch, capsys):
    monkeypatch.setattr("kdvit.training.Trainer.__init__", lambda *a, **b: (_ for _ in ()).throw(KeyboardInterrupt))
    assert distill("--steps", "1") == 130
    assert capsys.readouterr().err == "kdvit: stopped.\n"


def test_a_traceback_on_demand(distill, monkeypatch):
    monkeypatch.setenv("KDVIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown loss 'dkdd'"):
        distill("--loss", "dkdd")


def test_an_error_of_a_loader_process_is_one_line(distill, images, tmp_path, capsys):
    """The damaged image is not among the 64 that are looked at first."""
    folder = tmp_path / "many"
    source = next((images / "train" / "class0").iterdir()).read_bytes()
    for label in range(10):
        for number in range(20):
            path = folder / "train" / f"class{label}" / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source)
    data = open_data(folder)
    looked_at = {round(index) for index in torch.linspace(0, len(data.train) - 1, 64).floor().tolist()}
    damaged = Path(data.train.where(next(index for index in range(len(data.train)) if index not in looked_at)))
    damaged.write_bytes(source[:30])
    assert distill("--epochs", "1", "--num-workers", "1", data=str(folder)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"data: {damaged} must be a readable image, got" in lines[0]


MISTAKES = {
    "command": (["distil"], f"unknown command 'distil'; did you mean 'distill'? Known: {', '.join(COMMANDS)}."),
    "far": (["zzz"], f"unknown command 'zzz'; Known: {', '.join(COMMANDS)}."),
    "list": (["list", "loses"], "argument what: invalid choice: 'loses' (choose from "),
    "word": (["list", "losses", "zzz"], "list: no losses have 'zzz' in their name; leave the word out."),
    "nothing": (
        ["distill"],
        "the following arguments are required: --data, --student; see `kdvit distill --help`.",
    ),
    "quickstart": (["quickstart", "--epochs", "0"], "Training: epochs must be >= 1, got 0;"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, sentence = MISTAKES[case]
    assert main(argv) == 2
    check_sentence(capsys, sentence)


DISTILL_MISTAKES = {
    "loss": (["--loss", "dkdd"], {}, "unknown loss 'dkdd'; did you mean 'dkd'? `kdvit list losses` shows all"),
    "option": (["--loss", "dkd:betta=2"], {}, "dkd: unknown option 'betta'; did you mean 'beta'? Known: "),
    "options": (
        ["--loss", "kd:temperature"],
        {},
        "--loss kd: options must be NAME=VALUE,NAME=VALUE, each once, got 'temperature'",
    ),
    "value": (["--loss", "kd:temperature=-1"], {}, "KD: temperature must be > 0, got -1;"),
    "kind": (["--loss", "kd:temperature=hot"], {}, "KD: temperature must be a number > 0, got 'hot';"),
    "twice": (
        ["--loss", "kd:temperature=1,temperature=2"],
        {},
        "--loss kd: options must be NAME=VALUE,NAME=VALUE, each once",
    ),
    "weight": (
        ["--loss", "x*kd"],
        {},
        "--loss: the weight must be a number or a schedule (WarmUp, Steps, Linear, Cosine), got 'x' in 'x*kd'; try "
        "0.5*kd.",
    ),
    "task weight": (
        ["--task-weight", "half"],
        {},
        "--task-weight: the weight must be a number or a schedule (WarmUp, Steps, Linear, Cosine), got 'half'; try 0.5",
    ),
    "two teachers, one checkpoint": (
        ["--teacher", "fashion_mnist_cnn"],
        {},
        "--teacher-checkpoint: there must be one --teacher for it, got 2; save such a teacher as a folder",
    ),
    "one teacher twice": (
        ["--teacher", "fashion_mnist_cnn"],
        {"teacher": "fashion_mnist_cnn", "teacher_options": None, "teacher_checkpoint": None},
        "--teacher: each must be another model, got 'fashion_mnist_cnn' twice; name it once.",
    ),
    "teachers in a list": (
        [],
        {"teacher": "fashion_mnist_cnn,fashion_mnist_vit"},
        "--teacher: it must name one model, got 'fashion_mnist_cnn,fashion_mnist_vit'; write --teacher once for each.",
    ),
    "weight behind the name": (
        ["--loss", "at*1000"],
        {},
        "--loss: the weight must be a number or a schedule (WarmUp, Steps, Linear, Cosine), got 'at' in 'at*1000'; the "
        "weight comes first: 1000*at.",
    ),
    "one teacher, two wanted": (["--loss", "ca_mkd"], {}, "CAMKD: teachers must be at least 2, got 1; pass a list of"),
    "schedule": (["--loss", "WarmUp(1, 2, 3)*kd"], {}, "--loss: the weight must be a number or a schedule (WarmUp,"),
    "steps": (["--loss", "Steps({5: 1.0})*kd"], {}, "Steps: values must say what holds from epoch 0, got {5: 1.0};"),
    "warm-up": (["--loss", "WarmUp(8,epochs=0)*kd"], {}, "WarmUp: epochs must be > 0, got 0; for none, use a plain"),
    "end": (["--loss", "kd:temperature=Linear(8,x)"], {}, "Linear: end must be a number, got 'x'; write Linear(8.0,"),
    "cooled": (["--loss", "kd:temperature=Linear(8,0)"], {}, "KD: temperature must be > 0, got 0.0;"),
    "flag": (["--loss", "dist:gather=no"], {}, "DIST: gather must be True or False, got 'no'; write one of them."),
    "standardize": (["--loss", "kd:standardize=off"], {}, "kd: standardize must be True or False, got 'off';"),
    "path": (
        ["--loss", "mekd:generator=runs/g"],
        {},
        "--loss mekd: options must be NAME=VALUE,NAME=VALUE, each once, got 'generator=runs/g'; put paths into quotes",
    ),
    "code": (["--loss", "open('x')*kd"], {}, "--loss: the weight must be a number or a schedule (WarmUp,"),
    "no teacher": ([], {"teacher": None}, "Distiller: loss 'kd' reads the teacher, got teacher=None; pass a teacher."),
    "nan weight": (["--loss", "nan*kd"], {}, "Distiller: the weight of 'kd' must be finite, got nan;"),
    "empty": (["--loss", ""], {}, "--loss must be [WEIGHT*]NAME[:OPTION=VALUE,...], got ''; try 0.5*dkd:beta=2."),
    "block": (
        ["--loss", "tinymim:student_block=9"],
        {},
        f"{VIT}: block must be in 0..1 (or -2..-1 from the end), got 9;",
    ),
    "teacher": (
        [],
        {"teacher": "fashion_mnist_cn"},
        "unknown model 'fashion_mnist_cn'; did you mean 'fashion_mnist_cnn'?",
    ),
    "student": (
        [],
        {"student": "vit_tny_patch16_224"},
        "unknown model 'vit_tny_patch16_224'; did you mean 'vit_tiny_patch16_224'?",
    ),
    "data": (
        [],
        {"data": "fashion-mnist-sampel"},
        "unknown data source 'fashion-mnist-sampel'; did you mean 'fashion-mnist-sample'?",
    ),
    "folder": ([], {"data": "./nowhere"}, "data: './nowhere' must exist, got no such file or folder;"),
    "model option": ([], {"student_options": "img_sizee=28"}, "model 'vit_tiny_patch16_224' cannot be made ("),
    "model sizes": (
        [],
        {"student_options": "embed_dim=25,num_heads=2"},
        "model 'vit_tiny_patch16_224' cannot be made (",
    ),
    "model options": ([], {"student_options": "28"}, "--student-options: options must be NAME=VALUE,NAME=VALUE"),
    "classes": ([], {"student_options": f"{TINY},num_classes=7"}, "Distiller: teacher 'vit_tiny_patch16_224' "),
    "attention": (
        ["--loss", "tinymim"],
        {"teacher": "fashion_mnist_cnn", "teacher_options": None, "teacher_checkpoint": None},
        "fashion_mnist_cnn gives no query at -1",
    ),
    "channels": (
        [],
        {"student_options": TINY.replace("in_chans=1", "in_chans=3")},
        "Teacher: 'vit_tiny_patch16_224' takes 1 channel",
    ),
    "checkpoint": (
        [],
        {"teacher_checkpoint": "nowhere.pt"},
        "checkpoint 'nowhere.pt' must be a file, and there is none;",
    ),
    "other checkpoint": ([], {"teacher_options": f"{TINY},num_classes=9"}, "checkpoint 'teacher.pt' must be one of"),
    "class map": (
        ["--class-map", "nowhere.json"],
        {},
        "--class-map: 'nowhere.json' must be a readable JSON file, got 'No such",
    ),
    "no json": (["--class-map", "text"], {}, "--class-map: 'text' must be a readable JSON file, got 'Expecting value"),
    "no list": (
        ["--class-map", "dict.json"],
        {},
        "--class-map: 'dict.json' must hold a list of whole numbers, got {'0': 1};",
    ),
    "short map": (["--class-map", "short.json"], {}, "Distiller: teacher 'vit_tiny_patch16_224' "),
    "output": ([], {"output": "text"}, "run folder 'text' cannot be written (File exists); choose another."),
    "unknown option": (
        ["--los", "kd"],
        {},
        "unrecognized arguments: --los kd; did you mean '--loss'? see `kdvit distill --help`.",
    ),
    "number": (["--epochs", "x"], {}, "argument --epochs: invalid int value: 'x'; see `kdvit distill --help`."),
    "pair": (["--betas", "0.9"], {}, "argument --betas: expected 2 arguments; see"),
    "both": (
        ["--epochs", "3", "--steps", "4"],
        {},
        "Training: exactly one of epochs and steps must be given, got epochs=3, steps=4;",
    ),
    "optimizer": (["--optimizer", "adamww"], {}, "Training: unknown optimizer 'adamww'; did you mean 'adamw'?"),
    "precision": (
        ["--mixed-precision", "fp8"],
        {},
        "Training: mixed_precision must be 'no', 'bf16' or 'fp16', got 'fp8';",
    ),
    "batch": (["--batch-size", "41"], {}, "Training: batch_size must be at most the 40 training images"),
    "seed": (["--seed", "-1"], {}, "EpochBatchSampler: seed must be in [0, 2**63), got -1;"),
}


@pytest.mark.parametrize("case", DISTILL_MISTAKES)
def test_a_mistake_in_distill_is_one_sentence(case, distill, capsys):
    Path("text").write_text("words")
    Path("dict.json").write_text('{"0": 1}')
    Path("short.json").write_text("[0, 1]")
    more, changed, sentence = DISTILL_MISTAKES[case]
    assert distill("--check", *more, **changed) == 2
    check_sentence(capsys, sentence)


def check_sentence(capsys, start: str) -> None:
    out, err = capsys.readouterr()
    assert err.startswith(f"kdvit: {start}"), err
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in out
    assert re.search(r"; |\. ", err) and err.rstrip().endswith((".", "?"))  # it says what to do


# The small language of options


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("beta=2,alpha=0.5", {"beta": 2, "alpha": 0.5}),
        ("kind=hard,name='a b'", {"kind": "hard", "name": "a b"}),
        ("on=True,off=false,empty=none", {"on": True, "off": False, "empty": None}),
        ("blocks=(0, 1),more=[qk,vv],low=-1", {"blocks": (0, 1), "more": ("qk", "vv"), "low": -1}),
    ],
)
def test_options_are_literals(text, options):
    assert parse_options(text, "test") == options


@pytest.mark.parametrize(
    "text", ["beta", "beta=", "=2", "a=1 b=2", "**x", "a=__import__('os')", "a=1,a=2", "a=b.c", "a=1)+(2"]
)
def test_what_is_no_literal_is_refused(text):
    with pytest.raises(ValueError, match="test: options must be NAME=VALUE,NAME=VALUE, each once, got '"):
        parse_options(text, "test")


@pytest.mark.parametrize(
    ("text", "weight", "loss"),
    [
        ("dkd", 1.0, "DKD(alpha=1.0, beta=8.0, temperature=4.0)"),
        ("1e-3*kd", 1e-3, "KD(temperature=4.0)"),
        (" 2 * kd:temperature=1 ", 2.0, "KD(temperature=1.0)"),
        ("kd:standardize=false", 1.0, "KD(temperature=4.0)"),
    ],
)
def test_losses_are_read(text, weight, loss):
    found = parse_loss(text)
    assert found[0] == weight and repr(found[1]) == loss


# Quickstart


def test_quickstart_compares_alone_and_distilled(tmp_path, monkeypatch):
    data = open_data("fashion-mnist-sample").subset(256, 32)
    rows = quickstart.compare(tmp_path / "quick", epochs=1, data=data, quiet=True)
    assert [row.name for row in rows] == ["teacher", "student, alone", "student, distilled"]
    assert rows[0].seconds is None and all(row.seconds >= 0 for row in rows[1:])
    assert rows[1].num_parameters == rows[2].num_parameters and rows[1].num_macs == rows[2].num_macs
    alone, distilled = (
        json.loads((tmp_path / "quick" / name / "run.json").read_text()) for name in ("alone", "distilled")
    )
    assert alone["settings"] == distilled["settings"]  # equal budget and seed
    assert (alone["teacher"], distilled["teacher"]) == (None, "fashion_mnist_cnn")
    console = Console(record=True, width=100)
    monkeypatch.setattr(quickstart, "Console", lambda: console)
    quickstart.show(rows, tmp_path / "quick")
    text = console.export_text()
    for row in rows:
        assert re.search(rf"{row.name} +│ +{row.top1:.2f} %", text)
    assert f"{rows[2].top1 - rows[1].top1:+.2f} points at equal epochs and seed" in text
    assert timm.create_model(f"local-dir:{tmp_path}/quick/distilled/student", pretrained=True).num_classes == 10


def test_quickstart_does_not_repeat_what_an_earlier_call_did(tmp_path):
    data = open_data("fashion-mnist-sample").subset(256, 32)
    first, again = (quickstart.compare(tmp_path / "quick", epochs=1, data=data, quiet=True) for _ in range(2))
    assert first == again  # the seconds, too: nothing was trained
    with pytest.raises(ValueError, match="Trainer: seed must be 0 as in the run in .*start another run"):
        quickstart.compare(tmp_path / "quick", seed=1, epochs=1, data=data, quiet=True)


# The teacher's precision


def test_a_teacher_in_another_precision(distill, monkeypatch):
    dtypes: list[tuple] = []
    trained = kdvit.Trainer.fit

    def fit(trainer):
        models = trainer.plain.teacher.model, trainer.plain.student.model
        dtypes.append(tuple({p.dtype for p in model.parameters()} for model in models))
        return trained(trainer)

    monkeypatch.setattr(kdvit.Trainer, "fit", fit)
    assert distill("--steps", "2", "--teacher-dtype", "bfloat16") == 0
    assert distill("--steps", "2", output="other") == 0
    assert dtypes == [({torch.bfloat16}, {torch.float32}), ({torch.float32}, {torch.float32})]


def test_an_unknown_precision_is_refused(distill, capsys):
    assert distill("--steps", "2", "--teacher-dtype", "fp8") == 2
    assert "--teacher-dtype: invalid choice: 'fp8'" in capsys.readouterr().err
