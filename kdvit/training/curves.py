"""Curves of a run as a PNG (extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: Path, teacher_top1: float | None) -> bool:
    """Draw losses, accuracy and learning rate; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which would change the backend of a notebook
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False

    steps = [record for record in metrics if record["kind"] == "step"]
    evaluations = [record for record in metrics if record["kind"] == "evaluation"]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    losses, accuracy, rate = figure.subplots(1, 3)
    for name in dict.fromkeys(name for r in steps for name in r["losses"]):  # a term may come and go
        losses.plot(
            [r["step"] for r in steps], [r["losses"].get(name, math.nan) for r in steps], label=name, linewidth=1.2
        )
    losses.set(title="losses (unweighted)", xlabel="step", yscale="log")
    if steps:
        losses.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    accuracy.plot([r["epoch"] for r in evaluations], [r["top1"] for r in evaluations], marker="o", label="student")
    if teacher_top1 is not None:
        accuracy.axhline(teacher_top1, color="grey", linestyle="--", label="teacher")
    accuracy.set(title="top-1 on the test images (%)", xlabel="epoch")
    accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.legend(frameon=False, fontsize="small")
    if not evaluations:
        accuracy.set_axis_off()
        accuracy.set_title("no classifier was trained")
        accuracy.get_legend().remove()
    rate.plot([r["step"] for r in steps], [r["lr"] for r in steps], color="tab:green")
    rate.set(title="learning rate", xlabel="step")
    for axis in (losses, accuracy, rate):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True
