"""How the benchmarks measure: steps timed in turn in one process, and the most memory that is held."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kdvit.cost import device_name

#: One training step, or one loss: forward and backward.
Step = Callable[[], Any]


def synchronize() -> None:
    """Wait for the GPU, where there is one: a kernel that was only launched has not been timed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step: Step, count: int = 1) -> float:
    """Mean seconds of a step."""
    synchronize()
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return (time.perf_counter() - started) / count


def one_round(steps: Mapping[str, Step], number: int, count: int = 1) -> dict[str, float]:
    """Mean seconds of a step of each, one after the other; who is first changes with the number of the round."""
    names = list(steps)
    first = number % max(1, len(names))
    return {name: seconds_of(steps[name], count) for name in names[first:] + names[:first]}


def interleaved(steps: Mapping[str, Step], rounds: int, count: int = 1) -> dict[str, list[float]]:
    """Mean seconds of a step of each, by round: what slows the machine down for a while slows all of them."""
    found = [one_round(steps, number, count) for number in range(rounds)]
    return {name: [times[name] for times in found] for name in steps}


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Round by round, so that both were measured side by side."""
    return [a / b for a, b in zip(times, reference, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest: '1.003 (0.973..1.102)'."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}..{max(values):.3f})"


class PeakMemory:
    """What torch's allocator holds at most from `start` to `stop`, beyond what it held at the start.

    As a context manager it does both. On a CPU only one may record at a time, and the release of what was held before
    does not count.

    Args:
        device: whose memory.

    After `stop`, ``num_bytes`` is the peak, and ``changes`` every allocation (> 0) and release (< 0) in bytes, in
    order; the latter on a CPU alone.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.is_cuda = torch.device(device).type == "cuda"
        self.num_bytes = 0
        self.changes: list[int] = []

    def start(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()

    def stop(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()
            self.num_bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._profile.stop()
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        self.changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.num_bytes = max(accumulate(self.changes, initial=0))

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def facts(device: torch.device | str, packages: Sequence[str], beside: str, **counts: int) -> dict[str, Any]:
    """What figures depend on, for a page: the command, the device, the versions of packages that are here, the date.

    Args:
        device: that was measured.
        packages: whose versions matter.
        beside: what else the machine did meanwhile.
        counts: of rounds, steps, ...
    """
    return {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
        "device": device_name(torch.device(device)),
        "versions": {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)},
        "date": time.strftime("%Y-%m-%d"),
        "beside": beside,
        **counts,
    }


def made_by(facts: Mapping[str, Any]) -> str:
    """The same as a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"`{facts['command']}` on {facts['device']}, {facts['date']}, {facts['beside']} beside it; {versions}."
