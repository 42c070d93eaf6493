"""`python benchmarks/peers.py`: every tool does the same job, and each command runs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import peer_tools
import peers
import pytest
from peer_tools import HAND, TRAINER

HAS_TORCHDISTILL = importlib.util.find_spec("torchdistill") is not None
OTHERS = ["kdvit", "timm", *(["torchdistill"] if HAS_TORCHDISTILL else [])]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """The small models on 4 images; DeiT is the same code. Curves are not drawn: it takes longer than such a run."""
    monkeypatch.setattr("kdvit.training.trainer.draw_curves", lambda *arguments: False)
    monkeypatch.setitem(peers.SIZES, "small", replace(peers.SIZES["small"], batch_size=4))


def test_time_and_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "DOCS", tmp_path)
    options = ["--output", str(tmp_path / "runs")]
    peers.main(["time", "--sizes", "small", "--rounds", "2", "--steps", "1", *options])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "runs" / "time.json").read_text())
    record = found["sizes"]["small"]
    assert set(record["seconds"]) == {TRAINER, HAND, *OTHERS, peers.LOADING}
    assert all(len(values) == 2 for values in record["seconds"].values())  # the check and the warm-up do not count
    assert ("torchdistill: left out" in printed) == (not HAS_TORCHDISTILL)
    # All have done the same number of steps on the same batches, not only the same first one.
    losses = record["last_loss"]
    assert all(loss == pytest.approx(losses[HAND], rel=1e-4) for loss in losses.values()) and len(losses) >= 4
    assert set(found["facts"]) >= {"command", "device", "versions", "date", "rounds"}

    peers.main(["page", *options])
    text = (tmp_path / "peers.md").read_text()
    assert all(f"| {name} |" in text for name in record["seconds"])
    assert "0.1 * cross-entropy + 0.9 * T^2 * KL" in text and "batch 4" in text
    assert json.loads((tmp_path / "peers.json").read_text())["time"] == found


def test_without_the_trainer_the_loop_by_hand_drives():
    record = peers.measure(peers.SIZES["small"], [HAND, "timm"], rounds=1, count=2)
    assert list(record["seconds"]) == [HAND, "timm", peers.LOADING]
    assert all(len(values) == 1 for values in record["seconds"].values())


@pytest.mark.parametrize("what, factor, offset", [("gradient", 1.001, 0.0), ("loss", 1.0, 0.01)])
def test_another_job_is_refused(monkeypatch, what, factor, offset):
    def other(student, teacher):
        reference = peer_tools.reference_loss
        return peer_tools.own_loop(student, lambda x, y: factor * reference(student, teacher.eval(), x, y) + offset)

    monkeypatch.setitem(peers.TOOLS, "other", other)
    with pytest.raises(SystemExit, match=rf"the first {what} of 'other' is \S+ from that of the loop by hand"):
        peers.measure(peers.SIZES["small"], [HAND, "other"], rounds=1, count=1)


def test_the_gradient_of_another_is_told_apart():
    job = peer_tools.Job(peers.SIZES["small"], 1)
    hand, timm = (peer_tools.Loop(job, peer_tools.TOOLS[name]) for name in (HAND, "timm"))
    hand.step()
    assert timm.watch.difference(hand.watch) == float("inf")  # it has not stepped
    timm.step()
    assert 0 <= timm.watch.difference(hand.watch) < peers.TOLERANCE
    timm.watch.gradients["head.bias"][3] += 1.0
    assert timm.watch.difference(hand.watch) > 0.1


@pytest.mark.parametrize("name", [TRAINER, "kdvit", "timm"])
def test_memory_of_one_tool(name):
    found = peers.alone(peers.SIZES["small"], name)
    assert found["process"] > 100  # MiB: torch alone is more
    assert 0.5 < found["step"] < 50


@pytest.mark.slow
def test_memory(tmp_path, capsys):
    peers.main(["memory", "--sizes", "small", "--only", "timm", "--repeats", "1", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "memory.json").read_text())["sizes"]["small"]
    assert list(found) == ["timm"] and found["timm"]["step"] > 1


def test_a_missing_tool_is_left_out_with_a_line_how_to_get_it(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchdistill" else real(name))
    assert peers.installed(["kdvit", "torchdistill"]) == ["kdvit"]
    assert capsys.readouterr().out == (
        "torchdistill: left out, it is not installed; to compare with it: pip install torchdistill\n"
    )
