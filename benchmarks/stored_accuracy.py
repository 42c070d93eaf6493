"""The small job with a live teacher and with stored ones: does the accuracy survive each form?

`stored_teacher.py accuracy` runs it.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from response_methods import METHODS as RESPONSE_METHODS
from small_job import TRAINING, VIT, Method, folder, one, student
from small_job import distiller as live_distiller

from kdvit import Distiller, Trainer, Training
from kdvit.cache import StoredTeacher, build
from kdvit.data import FASHION_MNIST_TRANSFORM, ImageData

KD, VITKD = RESPONSE_METHODS["kd"], Method(one("vitkd"), 1.0, VIT)
#: At its published weights ViTKD has less than 1 % of the gradient here, so that its teacher's rounding cannot be seen.
STRONG = Method(one("vitkd", 100.0), 1.0, VIT)
#: Method, and the form in which its teacher is stored; None: live.
ROWS: dict[str, tuple[Method, str | None]] = {
    "labels alone": (RESPONSE_METHODS["alone"], None),
    "kd": (KD, None),
    "kd, fp16": (KD, "fp16"),
    "kd, top10": (KD, "top10"),
    "kd, top3": (KD, "top3"),
    "vitkd": (VITKD, None),
    "vitkd, fp16": (VITKD, "fp16"),
    "vitkd, int8": (VITKD, "int8"),
    "100 vitkd": (STRONG, None),
    "100 vitkd, fp16": (STRONG, "fp16"),
    "100 vitkd, int8": (STRONG, "int8"),
}


def bytes_per_image(path: Path, num_images: int) -> float:
    """Of all files of rows, with what they begin with."""
    return sum(file.stat().st_size for file in path.glob("epoch-*/*.safetensors")) / num_images


def train(name: str, seed: int, runs: Path, data: ImageData, settings: Training = TRAINING) -> dict[str, Any]:
    """One run; its accuracy and seconds. A run that is there already is kept."""
    path = folder(runs, name, seed)
    if not (path / "result.json").is_file():
        method, form = ROWS[name]
        settings = replace(settings, seed=seed)
        subject = live_distiller(method, seed, runs)
        options: dict[str, Any] = {"transform": FASHION_MNIST_TRANSFORM, "quiet": True}
        cache = folder(runs / "caches", name, seed)
        record: dict[str, Any] = {"row": name, "seed": seed}
        if form is not None:
            build(cache, subject, data, settings, form=form, **options)
            record["bytes"] = bytes_per_image(cache, len(data.train) * settings.epochs)
            learner = student(method.distilled, seed)  # right before the Distiller, as there: projectors are alike
            subject = Distiller(
                StoredTeacher(cache), learner, method.losses(runs, seed), task_weight=method.task_weight
            )
        result = Trainer(subject, data, settings, path, resume=path.exists(), **options).fit()
        record |= {"top1": result.top1, "seconds": result.seconds}
        (path / "result.json").write_text(json.dumps(record) + "\n")
        shutil.rmtree(cache, ignore_errors=True)
    return json.loads((path / "result.json").read_text())


def accuracy_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Mean and standard deviation over seeds; the difference to the live teacher is taken seed by seed."""
    found = {(run["row"], run["seed"]): run for run in results}
    lines = ["| row | teacher | top-1, % | minus live | bytes an image | training, s |", "|---|---|---|---|---|---|"]
    for name, (method, form) in ROWS.items():
        runs = [run for (row, _), run in found.items() if row == name]
        if not runs:
            continue
        live = name.split(", ")[0]
        gains = [run["top1"] - found[live, run["seed"]]["top1"] for run in runs if (live, run["seed"]) in found]
        gain = mean_and_deviation(gains, "+") if form is not None and gains else "-"
        size = f"{runs[0]['bytes']:,.0f}" if form is not None else "-"
        seconds = statistics.mean(run["seconds"] for run in runs)
        top1 = mean_and_deviation([run["top1"] for run in runs])
        lines.append(f"| {name} | {method.teacher or 'none'} | {top1} | {gain} | {size} | {seconds:.0f} |")
    return lines


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.2f} +- {deviation:.2f}"
