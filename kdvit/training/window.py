"""Means of the losses between two lines of metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdvit.distiller import DistillerOutput


class Window:
    """Means of the losses, and images a second, since the last line of metrics."""

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.total: Tensor | float = 0.0
        self.count = 0
        self.start_clock()

    def start_clock(self) -> None:
        """Measure the speed from here on: without an evaluation, and without steps before a stop."""
        self.images, self.started = 0, time.perf_counter()

    def add(self, output: DistillerOutput, num_images: int) -> None:
        for name, value in output.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        self.total = self.total + output.loss.detach()
        self.count += 1
        self.images += num_images

    def state_dict(self) -> dict[str, Any]:
        """All but the clock, so that the next line of metrics of a resumed run is that of the run."""
        return {name: getattr(self, name) for name in ("losses", "total", "count")}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.losses = {name: value.to(device) for name, value in state["losses"].items()}
        self.total = state["total"].to(device) if isinstance(state["total"], Tensor) else state["total"]
        self.count = state["count"]

    def close(self) -> tuple[dict[str, float], float, float]:
        """(mean losses, mean total, images a second), and start anew."""
        losses = {name: float(value) / self.count for name, value in self.losses.items()}
        total, rate = float(self.total) / self.count, self.images / (time.perf_counter() - self.started)
        self.__init__()
        return losses, total, rate
