"""Every recipe runs: --smoke takes a few images and steps of it."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.py"))
#: Run folders inside the one that a recipe is given, where it trains more than once.
PARTS = {
    "fashion_teacher_vit": ("1-whole", "2-crops", "3-whole-again"),
    "fashion_vit_tiny_tinymim": ("1-pretraining", "2-finetuning"),
}


def test_every_recipe_is_collected():
    assert len(RECIPES) == 6


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(recipe, tmp_path, monkeypatch):
    output = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    arguments = ["--smoke", "--data", "fashion-mnist-sample", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [str(recipe), *arguments])
    runpy.run_path(str(recipe), run_name="__main__")
    for part in PARTS.get(recipe.stem, (".",)):
        facts = json.loads((output / part / "run.json").read_text())
        assert facts["result"]["num_steps"] >= 1 and facts["command"] == [recipe.name, *arguments]
        assert (output / part / "student" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing is written elsewhere


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_helps(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(recipe), "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(recipe), run_name="__main__")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Command " in text and "accelerate launch" in text and f"recipes/{recipe.name}" in text
    options = " ".join(text.partition("options:")[2].split())
    assert "--smoke, --no-smoke a few images" in options
    assert not re.findall(r"--[\w-]+(?: [A-Z]+)? \[", options)  # no option without a text
