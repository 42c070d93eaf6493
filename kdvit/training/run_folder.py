"""What a run leaves behind: run.json, metrics.jsonl, the student, resumable state, curves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from kdvit.files import WRITE_ERRORS, lock, whole_files, why, write_whole
from kdvit.models import save_model
from kdvit.training.checkpoints import Checkpoints


class RunFolder:
    """One folder for one run.

    ``run.json`` settings, versions, commit, device, result · ``metrics.jsonl`` one JSON object a line, equal for equal
    runs · ``timing.jsonl`` what the clock said · ``student/`` the student as timm saves it · ``best/`` the same at its
    best evaluation · ``state/`` what resuming needs, see `Checkpoints` · ``curves.png`` with the extra ``plot``.

    Args:
        path: made if missing. A folder with an earlier run's state or metrics is refused unless that run is resumed.
        resume: go on with the run that is there.
        keep_states: generations of state.

    It is held until `release`, or until the process ends, however it ends.

    Raises:
        ValueError: the folder holds another run, cannot be made or written, or another process trains in it.
    """

    _lock: int | None = None

    def __init__(self, path: str | Path, *, resume: bool = False, keep_states: int = 2) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "state", keep_states)
        self.resumes = resume and bool(self.checkpoints.generations)
        has_metrics = self.metrics_file.is_file() and self.metrics_file.stat().st_size > 0
        if not self.resumes and (has_metrics or self.checkpoints.generations):
            way_out = (
                "its state is gone, so choose another folder or remove it."
                if resume
                else "choose another folder (--output), remove it, or resume that run (--resume)."
            )
            raise ValueError(f"run folder '{path}' must be empty, but holds an earlier run; {way_out}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            self.hold()
        except OSError as error:
            raise ValueError(f"run folder '{path}' cannot be written ({why(error)}); choose another.") from error

    def hold(self) -> None:
        """Keep other processes out; their states and metrics would get mixed up with ours."""
        if self._lock is not None:
            return
        try:
            self._lock = lock(self.path / ".lock")
        except BlockingIOError as error:
            raise ValueError(
                f"run folder '{self.path}' must be used by one process at a time, but another trains in it; wait for "
                "it, or choose another folder."
            ) from error

    def release(self) -> None:
        """Let other processes use it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None}  # it is sent to the other processes of a run, and the main one holds it

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timing_file(self) -> Path:
        return self.path / "timing.jsonl"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        self._append(self.metrics_file, record)

    def log_timing(self, record: Mapping[str, Any]) -> None:
        """Append one line of what the clock said."""
        self._append(self.timing_file, record)

    def _append(self, path: Path, record: Mapping[str, Any]) -> None:
        with self.written(path), path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics so far."""
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]

    def save_student(self, model: nn.Module, which: str, **facts: Any) -> None:
        """Save the plain model under ``student/`` or ``best/``, with the facts that `kdvit.save_model` takes."""
        with self.written(self.path / which), whole_files(self.path / which) as folder:
            save_model(model, folder, **facts)

    def save_state(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a generation of state, with the length that the metrics have come to."""
        with self.written(self.metrics_file), self.metrics_file.open("ab") as file:
            os.fsync(file.fileno())
            length = file.tell()
        self.checkpoints.save(step, {"metrics_bytes": length, **state})

    def load_state(self) -> tuple[dict[str, Any], str]:
        """(the newest state that is sound, a note where that is not the last one); see `Checkpoints.load`."""
        return self.checkpoints.load()

    def rewind(self, metrics_bytes: int, step: int) -> float:
        """Forget the lines that were written after a state, since the resumed run writes them again; seconds so far.

        Raises:
            ValueError: lines that were written before it are missing.
        """
        found = self.metrics_file.stat().st_size if self.metrics_file.is_file() else 0
        if found < metrics_bytes:
            raise ValueError(
                f"run folder '{self.path}': {self.metrics_file.name} must have at least the {metrics_bytes} bytes that "
                f"it had when the state was saved, got {found}; bring it back, or start again in another folder."
            )
        with self.written(self.metrics_file):
            os.truncate(self.metrics_file, metrics_bytes)
        lines = self.timing_file.read_text().splitlines() if self.timing_file.is_file() else []
        kept = [line for line in map(_parsed, lines) if line and line["step"] <= step]
        with self.written(self.timing_file):
            write_whole(self.timing_file, "".join(json.dumps(line) + "\n" for line in kept))
        return kept[-1]["seconds"] if kept else 0.0

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
        with self.written(self.path / "run.json"):
            write_whole(self.path / "run.json", json.dumps(record, indent=2, default=_plain) + "\n")

    @contextmanager
    def written(self, path: Path) -> Iterator[None]:
        """Say in one sentence what could not be written, and what is left."""
        try:
            yield
        except WRITE_ERRORS as error:
            raise RuntimeError(
                f"run folder: '{path}' could not be written ({why(error)}); {self.checkpoints.kept()}: make room or "
                "give it write permission, then resume."
            ) from error


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of JSON; None for what is left of one that was being written when the process was killed."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that kdvit runs from; None when it is installed elsewhere."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return result.stdout.strip() if result.returncode == 0 else None
