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
    resuming needs · ``curves.png`` with the extra ``plot``.

    Args:
        path: made if missing. A folder with an earlier run's metrics is refused unless that run is resumed.
        resume: go on with the run that is there.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        self.resumes = resume and self.state_file.is_file()
        if self.metrics_file.is_file() and not self.resumes:
            raise ValueError(
                f"run folder '{path}' must be empty, but holds an earlier run; choose another folder, "
                "remove it, or resume it with --resume."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run folder '{path}' cannot be made ({error.strerror}); choose another.") from error

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def state_file(self) -> Path:
        return self.path / "state" / "last.pt"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics so far."""
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]

    def save_student(self, model: nn.Module, which: str, normalisation: Any, class_names: Sequence[str]) -> None:
        """Save the plain model under ``student/`` or ``best/``."""
        save_model(model, self.path / which, normalisation=normalisation, class_names=class_names)

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write resumable state: the old one stays until the new one is whole on the disk."""
        self.state_file.parent.mkdir(exist_ok=True)
        temporary = self.state_file.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.state_file)

    def load_state(self) -> dict[str, Any]:
        """Read it back; nothing in the file is executed."""
        return torch.load(self.state_file, map_location="cpu", weights_only=True)

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
