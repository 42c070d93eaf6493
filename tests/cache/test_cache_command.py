"""``kdvit cache`` and ``kdvit distill --stored-teacher``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kdvit.cli import main
from tests.cache.test_building import damage
from tests.test_cli import TINY, VIT, images, teacher  # noqa: F401 - fixtures

SHARD = "epoch-00000/shard-00000.safetensors"


@pytest.fixture
def call(images: Path, teacher: Path, tmp_path: Path, monkeypatch, capsys):  # noqa: F811
    """call("cache", "build", "a", ...) -> (exit code, output); the job's options are added where a job is named."""
    monkeypatch.chdir(tmp_path)
    job = [
        "--data", str(images), "--student", VIT, "--student-options", TINY, "--loss", "kd", "--loss", "fitnet",
        "--epochs", "2", "--batch-size", "8",
    ]  # fmt: skip
    live = ["--teacher", VIT, "--teacher-options", f"{TINY},num_classes=10", "--teacher-checkpoint", str(teacher)]

    def run(*argv: str, with_teacher: bool = True) -> tuple[int, str]:
        takes_job = argv[0] == "distill" or argv[1] == "build"
        options = [*job, *(live if with_teacher else [])] if takes_job else []
        options += ["--output", "run", "--log-steps", "1"] if argv[0] == "distill" else []
        code = main([*argv, *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def words(text: str) -> str:
    return " ".join(text.split())


def test_from_building_to_training(call):
    code, out = call("cache", "build", "a", "--form", "logits=top3")
    assert code == 0 and "whole: 2 shards; train with --stored-teacher a" in out
    assert "feature_map@1 fp16 768 1536 768 448 - -" in words(out) and "logits top3 16 40 20 - 44 -" in words(out)
    assert "40 images x 2 epochs x 792 bytes = 61.9 KiB, " in out and " free" in out
    code, out = call("cache", "verify", "a")
    assert code == 0 and re.fullmatch(r"a: whole, 2 files, 62\.\d KiB\n", out)  # 61.9 of rows, and their names
    code, out = call("cache", "show", "a")
    assert code == 0 and re.search(r"40 images of \S+/images, 2 epochs: 2 shards, 62\.\d KiB\nwhole\n", out)
    assert "logits output 10 top3 16" in words(out) and "  seed: 0\n" in out
    assert "  transform.crop_padding: 2\n" in out and "versions: torch " in out
    code, out = call("distill", "--stored-teacher", "a")
    assert code == 0 and f"teacher {VIT} 1x28x28 16.4k stored" in words(out) and f"teacher '{VIT}': " in out
    record = json.loads(Path("run/run.json").read_text())
    assert record["teacher"] == f"{VIT}, stored: logits (top3), feature_map@1 (fp16)"
    assert record["result"]["teacher_top1"] is not None


def test_the_live_teacher_need_not_be_there(call):
    assert call("cache", "build", "a")[0] == 0
    code, out = call("distill", "--stored-teacher", "a", "--check", with_teacher=False)
    assert code == 0 and f"teacher {VIT} 1x28x28 16.4k stored" in words(out)


def test_the_estimate_builds_nothing(call):
    code, out = call("cache", "build", "a", "--estimate", "--augmentation-epochs", "1")
    assert code == 0 and "40 images x 1 epoch x 796 bytes" in out and not Path("a").exists()


def test_verify_names_what_is_damaged_and_building_mends_it(call):
    call("cache", "build", "a")
    damage(Path("a") / SHARD, "altered")
    (Path("a") / "epoch-00001/shard-00000.safetensors").unlink()
    code, out = call("cache", "verify", "a")
    assert code == 2 and out == (
        f"a/{SHARD} was altered or cut short (its checksum differs)\n"
        "a/epoch-00001/shard-00000.safetensors is missing\n"
        "kdvit: cache 'a': 2 of 2 files are damaged; run its `kdvit cache build` command again: whole shards are kept, "
        "only these are made anew.\n"
    )
    code, out = call("distill", "--stored-teacher", "a")
    assert code == 2 and "is missing; run its `kdvit cache build` command again" in out
    assert call("cache", "build", "a")[0] == 0
    assert call("cache", "verify", "a")[0] == 0
    code, out = call("cache", "build", "a")
    assert code == 0 and "2 of 2 shards are there already and whole" in out


def test_a_cache_of_another_teacher_is_refused(call, tmp_path):
    call("cache", "build", "a")
    code, out = call("distill", "--stored-teacher", "a", "--teacher", "fashion_mnist_vit", with_teacher=False)
    assert code == 2 and "must be used with what it was made of, but teacher_weights is " in out
    two = ["--teacher", "fashion_mnist_vit", "--teacher", "fashion_mnist_cnn"]
    code, out = call("distill", "--stored-teacher", "a", *two, with_teacher=False)
    assert code == 2 and out == (
        "kdvit: --stored-teacher: 'a' must be made of one of the --teacher, each stored once, got one of "
        f"'{VIT}'; name that teacher too, or no --teacher at all.\n"
    )
    code, out = call("distill", "--stored-teacher", "a", "--stored-teacher", "a")
    assert code == 2 and "each stored once" in out


def test_a_stored_teacher_among_live_ones(call):
    two = ["--teacher", "fashion_mnist_vit", "--teacher", "fashion_mnist_cnn"]
    code, out = call("cache", "build", "both", *two, with_teacher=False)
    assert code == 0 and "--stored-teacher both/teacher-1" in out and "--stored-teacher both/teacher-2" in out
    code, out = call("distill", "--stored-teacher", "both/teacher-2", *two, "--check", with_teacher=False)
    assert code == 0 and re.search(r"teacher 1 fashion_mnist_vit 1x28x28 \S+ [\d.]+M ", words(out))
    assert re.search(r"teacher 2 fashion_mnist_cnn 1x28x28 \S+ stored", words(out))


def test_mistakes_are_one_sentence(call):
    assert call("cache", "verify", "nowhere") == (
        2,
        "kdvit: cache 'nowhere' must be a folder that `kdvit cache build` made, and has no manifest.json; check the "
        "path.\n",
    )
    code, out = call("cache", "bild", "a")
    assert code == 2 and "invalid choice: 'bild'" in out and "see `kdvit cache --help`" in out
    code, out = call("cache", "build", "a", "--form", "fp61")
    assert code == 2 and out.startswith("kdvit: cache: form must be one of fp16, fp32, int8")


def test_another_seed_is_refused(call):
    call("cache", "build", "a")
    code, out = call("distill", "--stored-teacher", "a", "--seed", "1", with_teacher=False)
    assert code == 2 and "seed is 0 there and 1 here; train as it was built" in out


def test_help_of_building(capsys):
    with pytest.raises(SystemExit):
        main(["cache", "build", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: kdvit cache build" in text and "--augmentation-epochs K" in text and "--warmup-epochs FLOAT" in text


def test_ctrl_c_says_that_building_goes_on(call, monkeypatch):
    monkeypatch.setattr("kdvit.cache.builder.Builder.run", lambda self, show: (_ for _ in ()).throw(KeyboardInterrupt))
    code, out = call("cache", "build", "a")
    assert code == 130 and out.endswith("kdvit: stopped; whole shards are kept, and the same command goes on.\n")
