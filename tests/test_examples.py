"""Every example runs as it is, in a process and a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def run(example: Path, folder: Path) -> str:
    # From a checkout as it is, whether or not kdvit is installed.
    paths = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(example)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"'{re.escape(name)}': (-?[\d.]+)", text)]


def check_custom_loss(out: str, folder: Path) -> None:
    assert "student patch_tokens" in out and len(numbers(out, "cosine")) == 1
    assert 0 < numbers(out, "cosine")[0] < 2


def check_hugging_face_teacher(out: str, folder: Path) -> None:
    assert "ViTForImageClassification" in out and "change of normalisation" not in out.partition("losses")[0]
    relations = numbers(out, "tinymim.qk")
    assert len(relations) == 5 and all(value >= 0 for value in relations)


def check_own_loop(out: str, folder: Path) -> None:
    losses = numbers(out, "vitkd.mimic")
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "head.weight" in torch.load(folder / "student.pt", weights_only=True)


def check_accelerate_loop(out: str, folder: Path) -> None:
    losses = numbers(out, "tinymim.qk")
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "head.weight" in torch.load(folder / "student.pt", weights_only=True)


def check_views_and_held_out(out: str, folder: Path) -> None:
    for name in ("ntce", "ptloss", "mkd"):
        assert len(numbers(out, name)) == 4 and all(value > 0 for value in numbers(out, name))
    assert numbers(out, "task")[-1] < numbers(out, "task")[0]
    student, teacher = map(float, re.search(r"temperatures of student and teacher: \((.+), (.+)\)", out).groups())
    assert student != 1.0 != teacher  # they start at 1, and only bilevel steps move them


def check_teachers_and_deployment(out: str, folder: Path) -> None:
    for name in ("ca_mkd.logits", "ca_mkd.features", "kd", "simkd"):
        assert len(numbers(out, name)) == 4 and all(value > 0 for value in numbers(out, name))
    assert numbers(out, "simkd")[-1] < numbers(out, "simkd")[0]
    assert "the same logits: True" in out
    assert {path.name for path in (folder / "student").iterdir()} == {"config.json", "model.safetensors"}


CHECKS = {
    "accelerate_loop": check_accelerate_loop,
    "custom_loss": check_custom_loss,
    "hugging_face_teacher": check_hugging_face_teacher,
    "own_loop": check_own_loop,
    "teachers_and_deployment": check_teachers_and_deployment,
    "views_and_held_out": check_views_and_held_out,
}


def test_every_example_is_collected_and_checked():
    assert len(EXAMPLES) == 6
    assert [path.stem for path in EXAMPLES] == sorted(CHECKS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, tmp_path):
    if example.stem.startswith("hugging_face"):
        pytest.importorskip("transformers", reason="this example needs the extra `hf`")
    CHECKS[example.stem](run(example, tmp_path), tmp_path)


def test_the_loop_is_short():
    lines = (FOLDER / "own_loop.py").read_text().splitlines()
    assert len(lines) < 40
