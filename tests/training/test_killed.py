"""A run that is killed with SIGKILL, at any moment, comes to the very same files."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest

from tests.processes import REPOSITORY

#: All that a run leaves, byte by byte, but what the clock and the folder's name are in.
files = runpy.run_path(str(REPOSITORY / "tools" / "soak.py"))["files"]


@pytest.mark.parametrize("num_kills", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_run_ends_in_the_same_files(tmp_path, num_kills):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.training.kill_worker", str(tmp_path), str(num_kills), "0"]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, timeout=1800)
    report = json.loads((tmp_path / "kills.json").read_text())
    assert len(report["kills"]) == num_kills
    # safetensors writes its file under a temporary name of its own.
    assert any(kill.startswith("while ") for kill in report["kills"]), "no kill came while a state was written"
    assert "between writes" in report["kills"]
    expected = files(tmp_path / "whole")
    assert {"student/model.safetensors", "metrics.jsonl", "state/step_00000030/tensors.safetensors"} < expected.keys()
    for number in range(report["runs"]):
        found = files(tmp_path / f"run{number}")
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
