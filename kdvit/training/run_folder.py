"""What a run leaves behind: run.json, metrics.jsonl, the student, resumable state, curves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdvit.models import save_model


class RunFolder:
    """One folder for one run.

    ``run.json`` settings, versions, commit, device, result · ``metrics.jsonl`` one JSON object a line ·
    ``student/`` the student as timm saves it · ``best/`` the same at its best evaluation · ``state/last.pt`` what
    resuming needs, ``state/previous.pt`` the one before it · ``curves.png`` with the extra ``plot``.

    Args:
        path: made if missing. A folder with an earlier run's metrics is refused unless that run is resumed.
        resume: go on with the run that is there.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        self.resumes = resume and any(file.is_file() for file in self.state_files)
        if self.metrics_file.is_file() and not self.resumes:
            way_out = (
                "that run stopped before its first whole epoch, so choose another folder or remove it."
                if resume
                else "choose another folder (--output), remove it, or resume that run (--resume)."
            )
            raise ValueError(f"run folder '{path}' must be empty, but holds an earlier run; {way_out}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run folder '{path}' cannot be made ({error.strerror}); choose another.") from error

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def state_files(self) -> tuple[Path, Path]:
        """The last state, and the one before it."""
        return self.path / "state" / "last.pt", self.path / "state" / "previous.pt"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics so far."""
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]

    def drop_metrics_after(self, step: int) -> None:
        """Forget the lines of an epoch that was not finished: a resumed run writes them again."""
        if not self.metrics_file.is_file():
            return
        lines = [line for line in self.metrics_file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        self.metrics_file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))

    def save_student(self, model: nn.Module, which: str, normalisation: Any, class_names: Sequence[str]) -> None:
        """Save the plain model under ``student/`` or ``best/``."""
        save_model(model, self.path / which, normalisation=normalisation, class_names=class_names)

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write resumable state: the old one stays until the new one is whole on the disk, and then as the previous."""
        last, previous = self.state_files
        last.parent.mkdir(exist_ok=True)
        temporary = last.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        if last.is_file():
            last.replace(previous)
        temporary.replace(last)

    def load_state(self) -> tuple[dict[str, Any], str]:
        """(the newest state that can be read, a note where that is not the last one); nothing in it is executed.

        Raises:
            ValueError: no state can be read.
        """
        note = ""
        for file in filter(Path.is_file, self.state_files):
            try:
                return torch.load(file, map_location="cpu", weights_only=True), note
            except Exception as error:  # torch raises many kinds for damaged files
                note = f"'{file}' cannot be read ({type(error).__name__}); the state of the epoch before it is used."
        raise ValueError(
            f"run folder '{self.path}': {note.partition(';')[0]}, and there is no earlier one; start the run again in "
            "another folder."
        )

    def write_summary(self, **facts: Any) -> None:
        """Write run.json: the given facts, and the machine and versions that they were made with."""
        record = {
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "python": platform.python_version(),
            "versions": {name: metadata.version(name) for name in ("torch", "timm", "accelerate", "datasets")},
            "commit": _commit(),
            **facts,
        }
        (self.path / "run.json").write_text(json.dumps(record, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _commit() -> str | None:
    """The commit of the checkout that kdvit runs from; None when it is installed elsewhere."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return result.stdout.strip() if result.returncode == 0 else None
