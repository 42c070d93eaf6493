"""kdvit: make a big vision model teach a small one.

>>> import kdvit
>>> kdvit.losses.make("dkd", alpha=1.0, beta=8.0)
DKD(alpha=1.0, beta=8.0, temperature=4.0)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Looked up on first use, so that `import kdvit.losses` costs torch alone.
_HOMES = {
    "Bilevel": "kdvit.bilevel",
    "Distiller": "kdvit.distiller",
    "StoredTeacher": "kdvit.cache",
    "Student": "kdvit.wrappers",
    "Teacher": "kdvit.wrappers",
    "Trainer": "kdvit.training",
    "Training": "kdvit.training",
    "calibrate": "kdvit.calibration",
    "create_model": "kdvit.models",
    "save_model": "kdvit.models",
    "Progress": "kdvit.signals",
}
_PACKAGES = ("losses", "data", "training", "models", "schedules", "signals", "generation", "cache")

__all__ = ["__version__", *_HOMES, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"kdvit.{name}")
    raise AttributeError(f"module 'kdvit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
