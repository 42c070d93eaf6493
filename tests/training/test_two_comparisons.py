"""Two processes measure fidelity and compare a student alone and distilled: together as one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.processes import run_two
from tests.training import fidelity_worker


def test_two_processes_measure_what_one_does(results):
    """Seven images in batches of two: the last batch is evened out between them, and counted once."""
    expected = asdict(fidelity_worker.measure(Accelerator()))
    assert expected["accuracy"]["num_images"] == fidelity_worker.NUM_IMAGES
    _, pair = results
    assert pair[0]["fidelity"] == pair[1]["fidelity"]
    assert flat(pair[0]["fidelity"]) == pytest.approx(flat(expected), rel=1e-6)


def test_two_processes_compare(results):
    folder, pair = results
    assert pair[0]["comparison"] == pair[1]["comparison"]
    written = json.loads((folder / "compare" / "comparison.json").read_text())
    assert [line["alone"] for line in written["figures"]] == [line["alone"] for line in pair[0]["comparison"]]
    assert written["runs"]["distilled"][0]["fidelity"]["accuracy"]["num_images"] == 32


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple]:
    folder = tmp_path_factory.mktemp("two_comparisons")
    return folder, run_two(["-m", "tests.training.fidelity_worker"], folder)


def flat(facts: dict, prefix: str = "") -> dict[str, float]:
    """Every number by its path; None is left out."""
    values = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}.")
        else:
            rows = value if isinstance(value, tuple | list) else [value]
            values |= {f"{prefix}{name}.{index}": row for index, row in enumerate(rows) if row is not None}
    return values
