"""Progress in the terminal: a bar with time left and each loss by name; plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class Display:
    """Shown by the main process only.

    Args:
        total_steps: optimizer steps of the run.
        first_step: steps that an earlier part of the run did.
        title: in front of the bar.
        show: False for the other processes, and for quiet runs.
        console: where to write.
    """

    def __init__(
        self, total_steps: int, *, first_step: int = 0, title: str = "train", show: bool = True,
        console: Console | None = None,
    ) -> None:  # fmt: skip
        self.console = console or Console()
        self.show = show
        self.progress = _Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (show and self.console.is_terminal),
        )
        self.task = self.progress.add_task(title, total=total_steps, completed=first_step)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def step(self, losses: Mapping[str, float] | None = None) -> None:
        """One optimizer step is done; ``losses`` where there are new values to show."""
        if losses:
            # A no-break space keeps a name and its value on one line.
            self.progress.losses = "  ".join(f"{name}\N{NO-BREAK SPACE}{value:.3g}" for name, value in losses.items())
        self.progress.update(self.task, advance=1)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.show:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Progress(Progress):
    """The bar, and below it the losses: beside it they would leave no room for the bar on a narrow terminal."""

    losses = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.losses:
            yield Text(f"  {self.losses}", style="dim")
