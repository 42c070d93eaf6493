"""A few real training steps on a copy of the student, with every part timed and looked at."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from kdvit.checkup.findings import LossReading, StepCost
from kdvit.checkup.plan import PRECISIONS, Plan
from kdvit.distiller import Distiller, DistillerOutput
from kdvit.signals import Progress
from kdvit.training.gradient_share import gradient_share

#: Steps are this much smaller than in training: large enough to move what starts at zero, too small to do harm.
LR_SHARE = 0.01
#: Weights that start at zero hide others behind them: the last norm of a residual branch, and behind it the classifier.
MIN_STEPS = 3
PHASES = ("data", "teacher", "student", "losses", "backward", "optimizer")


@dataclass
class Rehearsed:
    """What was seen.

    Args:
        losses: on the first batch.
        cost: None where memory ran out before a step was finished.
        first_bad: what was NaN or infinite first, in words; "" where all was finite.
        unmoved: trainable parameters whose gradient was exactly zero in all steps.
        missing: trainable parameters that got no gradient in any step.
        stray: parameters that got one although the Distiller said that no loss reaches them.
        num_steps: steps that were done.
        peak_bytes: of the process (CPU) or of this device's tensors (CUDA).
        weight_bytes, gradient_bytes, optimizer_bytes: of what is trained.
        out_of_memory: a step did not fit.
    """

    losses: list[LossReading] = field(default_factory=list)
    cost: StepCost | None = None
    first_bad: str = ""
    unmoved: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    num_steps: int = 0
    peak_bytes: int = 0
    weight_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    out_of_memory: bool = False


def rehearse(distiller: Distiller, batches: Sequence[Mapping[str, Any]], data_seconds: float, plan: Plan) -> Rehearsed:
    """Train for one step per batch, and for three at least.

    Args:
        distiller: a copy, whose weights are changed.
        batches: of "image", "label" and what else the losses need, on any device. The first is the warm-up.
        data_seconds: what loading a batch takes.
        plan: of the training.
    """
    return _Rehearsal(distiller, plan).run(batches, data_seconds)


class _Rehearsal:
    def __init__(self, distiller: Distiller, plan: Plan) -> None:
        self.distiller, self.plan = distiller.train(), plan
        self.parameters = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = plan.optimizer(distiller)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * LR_SHARE
        half = plan.mixed_precision == "fp16"  # a small scale: a first step that overflows would say nothing
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0, enabled=half)
        self.found = Rehearsed()
        self.seconds: dict[str, float] = {}
        self.taught: list[tuple[nn.Module, Mapping]] = []

    def run(self, batches: Sequence[Mapping[str, Any]], data_seconds: float) -> Rehearsed:
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        timed: list[dict[str, float]] = []
        moved: set[str] = set()
        reached: set[str] = set()
        try:
            for index in range(max(len(batches), MIN_STEPS)):
                self.seconds = dict.fromkeys(PHASES, 0.0)
                self.step(index, batches[index % len(batches)], moved, reached)
                timed.append(self.seconds)
                self.found.num_steps += 1
        except torch.OutOfMemoryError:
            self.found.out_of_memory = True
        self.account(on_cuda)
        if not timed:
            return self.found
        unreached = set(self.distiller.parameters_without_gradient)
        self.found.missing = [name for name in self.parameters if name not in reached | unreached]
        self.found.stray = [name for name in self.parameters if name in reached & unreached]
        self.found.unmoved = [name for name in self.parameters if name in reached - moved]
        self.found.cost = self.cost(timed[1:] or timed, data_seconds, len(batches[0]["image"]))
        return self.found

    def step(self, index: int, batch: Mapping[str, Any], moved: set[str], reached: set[str]) -> None:
        progress = Progress(index, 0.0, self.plan.num_steps or MIN_STEPS, self.plan.num_epochs)
        with self.phase("data"):
            batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.optimizer.zero_grad()
        with self.phase("losses"), self.watched():
            output = self.forward(batch, progress)
        for inner in ("teacher", "student"):  # they ran inside
            self.seconds["losses"] -= self.seconds[inner]
        if index == 0:
            self.found.losses = self.read_losses(output, progress)
        self.look_at_teachers()
        self.look_at_losses(output, batch)
        with self.phase("backward"):
            self.scaler.scale(output.loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.look_at_gradients(moved, reached)
        if not self.found.first_bad:
            with self.phase("optimizer"):
                self.scaler.step(self.optimizer)
            self.scaler.update()

    def forward(self, batch: Mapping[str, Any], progress: Progress) -> DistillerOutput:
        dtype = PRECISIONS[self.plan.mixed_precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.distiller(
                batch["image"],
                batch.get("label"),
                second_images=batch.get("second_image"),
                sample_ids=batch.get("sample_id"),
                progress=progress,
                stored=batch.get("rows"),
            )

    # What a step takes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[name] += self.now() - started

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Time the models inside the Distiller's forward pass, and catch what the teachers say."""
        started: list[float] = []
        handles = []

        def start(*_: object) -> None:
            started.append(self.now())

        def stop(phase: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple, result: Any) -> None:
                self.seconds[phase] += self.now() - started.pop()
                if phase == "teacher":
                    self.taught.append((module, result))

            return hook

        try:
            for phase, models in (("teacher", self.distiller.teachers), ("student", [self.distiller.student])):
                for model in models:
                    handles.append(model.register_forward_pre_hook(start))
                    handles.append(model.register_forward_hook(stop(phase)))
            yield
        finally:  # the teachers are the user's own
            for handle in handles:
                handle.remove()

    def cost(self, timed: Sequence[Mapping[str, float]], data_seconds: float, batch_size: int) -> StepCost:
        batches = self.plan.accumulation_steps
        middle = {phase: median(seconds[phase] for seconds in timed) for phase in PHASES}
        compute = sum(seconds for phase, seconds in middle.items() if phase != "data")
        waits = max(0.0, data_seconds - compute) if self.plan.num_workers else data_seconds
        middle["data"] += waits
        if not self.distiller.teachers:
            del middle["teacher"]
        once = ("optimizer",)
        return StepCost(
            {phase: seconds * (1 if phase in once else batches) for phase, seconds in middle.items()},
            batches * batch_size,
        )

    def account(self, on_cuda: bool) -> None:
        """What is in memory at the end of a step, where the gradients still are."""
        parameters = self.parameters.values()
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        self.found.weight_bytes = _num_bytes(parameters)
        self.found.gradient_bytes = _num_bytes(p.grad for p in parameters if p.grad is not None)
        self.found.optimizer_bytes = _num_bytes(value for value in states if isinstance(value, Tensor))
        if on_cuda:
            # Training has one student and one set of losses, where this has the original and the copy.
            copied = _num_bytes([*self.distiller.parameters(), *self.distiller.buffers()])
            self.found.peak_bytes = torch.cuda.max_memory_allocated(self.device) - copied
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            self.found.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    # What is in a step

    def read_losses(self, output: DistillerOutput, progress: Progress) -> list[LossReading]:
        """Value, weight and gradient of each loss; one backward pass for each."""
        values, weighted = dict.fromkeys(self.distiller.weights, 0.0), {}
        for part, value in output.losses.items():
            values[part.partition(".")[0]] += value.item()
        for part, term in output.weighted.items():
            name = part.partition(".")[0]  # a weight is a whole loss's
            weighted[name] = weighted[name] + term if name in weighted else term
        found = gradient_share(weighted, self.distiller.student.parameters(), scale=self.scaler.get_scale())
        return [
            LossReading(name, values[name], self.weight(name, progress), found and found.share[name])
            for name in weighted
        ]

    def weight(self, name: str, progress: Progress) -> float:
        weight = self.distiller.weights[name]
        return float(weight(progress)) if callable(weight) else weight

    def note(self, words: str) -> None:
        self.found.first_bad = self.found.first_bad or words

    def look_at_teachers(self) -> None:
        for teacher, signals in self.taught:
            for request, value in signals.items():
                if isinstance(value, Tensor) and not value.isfinite().all():
                    self.note(f"signal '{request.signal}' of teacher '{teacher.name}'")
        self.taught.clear()

    def look_at_losses(self, output: DistillerOutput, batch: Mapping[str, Any]) -> None:
        of = f" (samples {batch['sample_id'].tolist()[:8]} ...)" if "sample_id" in batch else ""
        for name, value in output.losses.items():
            if not value.isfinite():
                self.note(f"loss '{name}'{of}")
        if not output.loss.isfinite():
            self.note(f"the weighted sum of the losses{of}")

    def look_at_gradients(self, moved: set[str], reached: set[str]) -> None:
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            reached.add(name)
            largest = p.grad.abs().max().item() if p.grad.numel() else 1.0  # NaN goes through max
            if largest != largest or largest == float("inf"):
                self.note(f"the gradient of '{name}'")
            if largest != 0:
                moved.add(name)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
