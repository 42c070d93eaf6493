"""A run folder as the report reads it: whatever is missing or damaged is said, and the rest is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdvit.report.classes import Classes, classes_of

Points = list[tuple[float, float]]
#: Entries of run.json that are tables.
TABLES = ("settings", "transform", "versions", "weights", "losses", "result")


@dataclass(frozen=True)
class Insight:
    """The samples that `kdvit.training.insight.write_insight` kept."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Args:
        name: how the page calls it.
        facts: run.json; empty where it cannot be read.
        steps: the lines of metrics.jsonl that belong to steps: losses, and shares of the gradient.
        evaluations: its evaluation lines.
        speeds: (step, images a second), from timing.jsonl, or from the step lines of older runs.
        insight: None where there is none.
        classes: from evaluation.json, None where there is none.
        notes: a sentence for everything that is missing or damaged.
    """

    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    speeds: Points = field(default_factory=list)
    insight: Insight | None = None
    classes: Classes | None = None
    notes: Sequence[str] = ()

    @property
    def result(self) -> Mapping[str, Any]:
        """What the run came to, in numbers; empty where it did not finish."""
        return self.facts.get("result") or {}

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.facts.get("settings") or {}

    @property
    def top1(self) -> float | None:
        """The student's accuracy in percent at the last evaluation."""
        last = self.series("top1", self.evaluations)[-1:]
        return last[0][1] if last else _number(self.result.get("top1"))

    @property
    def teacher_top1(self) -> float | None:
        return _number(self.result.get("teacher_top1"))

    @property
    def last_step(self) -> int:
        return max((int(record["step"]) for record in (*self.steps, *self.evaluations)), default=0)

    def series(self, key: str, records: Iterable[Mapping[str, Any]] | None = None, inside: str | None = None) -> Points:
        """(step, value) of one entry of the step lines, or of other lines; ``inside``: of an entry of that entry."""
        found = []
        for record in self.steps if records is None else records:
            entries = record if inside is None else record.get(inside)
            value = _number(entries.get(key)) if isinstance(entries, Mapping) else None
            if value is not None:
                found.append((float(record["step"]), value))
        return found

    def names(self, inside: str) -> list[str]:
        """All names that an entry of the step lines has had: the losses, in the order in which they appeared."""
        entries = (record.get(inside) for record in self.steps)
        return list(dict.fromkeys(name for entry in entries if isinstance(entry, Mapping) for name in entry))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several run folders; they are called by what their paths do not share.

    Raises:
        ValueError: a folder holds no run, or is named twice.
    """
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise ValueError(f"report: each run must be named once, got '{paths[index]}' twice; leave one out.")
    if len(resolved) == 1:
        return [read_run(paths[0], resolved[0].name)]
    common = os.path.commonpath(resolved)
    return [read_run(path, os.path.relpath(where, common)) for path, where in zip(paths, resolved, strict=True)]


def read_run(path: Path, name: str) -> Run:
    """Read one run folder.

    Raises:
        ValueError: there is neither a run.json nor a metrics.jsonl.
    """
    if not any((path / file).is_file() for file in ("run.json", "metrics.jsonl")):
        got, cure = "a folder without them" if path.is_dir() else "no folder", "give the --output of a training run"
        inside = sorted(file.parent for pattern in ("*/run.json", "*/*/run.json") for file in path.glob(pattern))
        if inside:  # of a comparison, or of stages
            got, cure = f"a folder of {len(inside)}", f"name those, such as '{inside[-1]}'"
        raise ValueError(f"report: '{path}' must be a run folder with run.json and metrics.jsonl, got {got}; {cure}.")
    notes: list[str] = []
    facts = _facts(path / "run.json", notes)
    lines = _lines(path / "metrics.jsonl", notes)
    timing = _lines(path / "timing.jsonl", notes) if (path / "timing.jsonl").exists() else lines
    insight, classes = _insight(path / "insight", notes), _classes(path / "evaluation.json", notes)
    steps = [line for line in lines if line.get("kind") in ("step", "gradient")]
    evaluations = [line for line in lines if line.get("kind") == "evaluation"]
    run = Run(name, facts, steps, evaluations, insight=insight, classes=classes)
    if facts and not run.result:
        notes.append(f"The run did not finish: its last line of metrics is that of step {run.last_step}.")
    return replace(run, speeds=run.series("images_per_second", timing), notes=tuple(notes))


def _number(value: Any) -> float | None:
    """The value as a number, None where it is none; NaN and infinity cannot be drawn."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _facts(file: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        facts = json.loads(file.read_text())
    except FileNotFoundError:
        notes.append("run.json is missing: settings, versions and the result are not known.")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"run.json cannot be read ({_reason(error)}): settings, versions and the result are not known.")
        return {}
    if not isinstance(facts, dict):
        notes.append("run.json holds no settings.")
        return {}
    for name in TABLES:
        if facts.get(name) is not None and not isinstance(facts[name], dict):
            notes.append(f"run.json: {name} cannot be read, and is left out.")
            facts[name] = None
    if facts.get("result"):
        facts["result"] = {name: _number(value) for name, value in facts["result"].items()}
    return facts


def _lines(file: Path, notes: list[str]) -> list[Mapping[str, Any]]:
    """The lines of JSON that can be read and name their step."""
    try:
        rows = file.read_bytes().decode(errors="replace").splitlines()
    except FileNotFoundError:
        notes.append(f"{file.name} is missing: there are no curves.")
        return []
    except OSError as error:
        notes.append(f"{file.name} cannot be read ({_reason(error)}): there are no curves.")
        return []
    found, damaged = [], 0
    for row in rows:
        try:
            line = json.loads(row)
        except ValueError:
            line = None
        if isinstance(line, dict) and _number(line.get("step")) is not None:
            found.append(line)
        else:
            damaged += 1
    if damaged:
        notes.append(f"{file.name}: lines that cannot be read are left out: {damaged} of {len(rows)}.")
    return found


def _insight(folder: Path, notes: list[str]) -> Insight | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not folder.is_dir():
        return None
    try:
        facts = json.loads((folder / "insight.json").read_text())
        insight = Insight(facts, load_file(folder / "insight.safetensors"))
        _check(insight)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        notes.append(f"insight/ cannot be read ({_reason(error)}): maps and layers are left out.")
        return None
    return insight


def _classes(file: Path, notes: list[str]) -> Classes | None:
    try:
        return classes_of(json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        notes.append(f"{file.name} cannot be read ({_reason(error)}): the classes are left out.")
        return None


def _check(insight: Insight) -> None:
    """Refuse what does not fit together, so that the page may rely on it."""
    facts, tensors = insight.facts, insight.tensors
    num_images = len(facts["labels"])
    if tensors["images"].ndim != 4 or tensors["images"].dtype != np.uint8 or len(tensors["images"]) != num_images:
        raise ValueError("images do not fit their labels")
    for side in ("student", "teacher"):
        if facts[side]:
            _check_model(side, facts[side], tensors, num_images)
    similarity = facts["similarity"]
    if similarity and similarity["note"] is None:
        rows, columns = similarity["student_layers"], similarity["teacher_layers"]
        shape = (len(_texts(rows)), len(_texts(columns)))
        if tensors["cka"].shape != shape or tensors["relation_distance"].shape != shape or not similarity["num_images"]:
            raise ValueError("the similarities do not fit the layers")


def _check_model(side: str, model: Mapping[str, Any], tensors: Mapping[str, np.ndarray], num_images: int) -> None:
    _texts([model["name"], model["kind"] or "", model["note"] or ""])
    for index, _ in enumerate(_texts(model["layers"])):
        if tensors[f"{side}.{index}"].ndim != 3 or len(tensors[f"{side}.{index}"]) != num_images:
            raise ValueError(f"the {side}'s maps do not fit the images")
    predictions = model["predictions"]
    if predictions is not None and len(predictions) != num_images:
        raise ValueError(f"the {side}'s predictions do not fit the images")
    for likeliest in predictions or ():
        if not likeliest or any(_number(share) is None for _, share in likeliest):
            raise ValueError(f"the {side}'s predictions are no classes with their probabilities")


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} must be a list of names")
    return values


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
