"""A run that is killed with SIGKILL, at any moment, comes to the very same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY


def files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, byte by byte, but what the clock and the folder's name are in."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("timing.jsonl", "run.json")
    }
    summary = json.loads((folder / "run.json").read_text())
    for name in ("written", "command"):
        del summary[name]
    for name in ("seconds", "folder"):
        del summary["result"][name]
    return {**found, "run.json": json.dumps(summary).encode()}


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
