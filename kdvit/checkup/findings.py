"""What a checkup came to: findings, the losses' part in the gradient, the cost of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        level: ``"ok"``; ``"warning"``: training will run, and probably not as it is meant; ``"error"``: it is of no
            use to start.
        title: one word.
        sentence: what was found.
        cure: what to do, "" where nothing is to be done.
    """

    level: Level
    title: str
    sentence: str
    cure: str = ""


@dataclass(frozen=True)
class LossReading:
    """One loss on the first batch.

    Args:
        name: as in `DistillerOutput.losses`, ``task`` for the task loss.
        value: unweighted; of several parts, their sum.
        weight: at the start of training.
        gradient_share: norm of its weighted gradient by the student's weights, in [0, 1], of the sum over all
            losses; None where a gradient is not finite or all are zero.
    """

    name: str
    value: float
    weight: float
    gradient_share: float | None


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step takes: the median of the steps after the first.

    Args:
        seconds: by phase: ``data`` (what the step waits for it), ``teacher``, ``student``, ``losses``, ``backward``,
            ``optimizer``.
        num_images: in one step.
    """

    seconds: Mapping[str, float]
    num_images: int

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        return self.num_images / self.total_seconds


@dataclass(frozen=True)
class Checkup:
    """One screen: ``print(checkup)``, or in colours ``rich.print(checkup)``.

    Args:
        heading: what was looked at.
        findings: in the order in which data flow.
        losses: of the first batch.
        cost: of a step; None where not one could be finished.
    """

    heading: str
    findings: Sequence[Finding]
    losses: Sequence[LossReading] = field(default=())
    cost: StepCost | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings are allowed."""
        return not self.errors

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "warning"]

    def __str__(self) -> str:
        from kdvit.checkup.screen import as_text

        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from kdvit.checkup.screen import on_screen

        yield on_screen(self, options.max_width)
