"""`python benchmarks/feature_methods.py memory`: every row can be made, and ours is the formula."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import feature_memory
import pytest
import torch

SCRIPT = Path(feature_memory.__file__).parent / "feature_methods.py"


def test_the_command_prints_a_table(monkeypatch, capsys):
    command = [str(SCRIPT), "memory", "--methods", "attndistill", "--rounds", "1", "--batch-size", "1"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()
    assert rows[-1].startswith("| `attndistill` | 1.8 MiB |") and rows[-1].count("|") == rows[-2].count("|")


@pytest.mark.parametrize("name", ["tinymim", "minilm", "attndistill"])
def test_both_versions_are_the_same_loss(name):
    torch.manual_seed(0)
    feature_memory.check(name, feature_memory.SUBJECTS[name](name, 1, torch.device("cpu")))
