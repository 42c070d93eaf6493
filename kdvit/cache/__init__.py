"""Stored teachers: the teacher runs once for each image and augmentation epoch, training then runs without it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kdvit.cache.teacher import StoredTeacher

__all__ = ["StoredTeacher", "build"]


def __getattr__(name: str) -> Any:
    """Building needs the trainer's parts, which a stored teacher does not."""
    if name == "build":
        return import_module("kdvit.cache.builder").build
    raise AttributeError(f"module 'kdvit.cache' has no attribute '{name}'")
