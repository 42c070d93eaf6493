"""``kdvit compare``: the student alone and distilled at the equal budget, over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdvit.cli.job import Job, add_job_arguments
from kdvit.cli.parser import Parser
from kdvit.distiller import Distiller
from kdvit.training import Comparison, compare

_EXAMPLE = """example:
  kdvit compare --data ./images --teacher vit_base_patch16_224 --student deit_tiny_patch16_224 \\
      --loss vitkd --epochs 100 --seeds 0 1 2 --output runs/compare

Trains the student alone (cross-entropy with the labels, no teacher) and distilled, once for each seed, with equal
settings and first weights, and measures both. The same command goes on after a stop.
"""


def main(argv: Sequence[str]) -> None:
    parser = Parser("kdvit compare", description="What distillation changes, over several seeds.", epilog=_EXAMPLE)
    add_job_arguments(parser, skip=("seed",))
    add = parser.add_argument_group("comparison").add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="INT", help="one pair of runs for each [0 1 2]")
    add("--output", default="runs/compare", help="folder of the runs, comparison.json and comparison.md [%(default)s]")
    arguments = parser.parse_args(argv)
    job = Job(arguments)

    def make_distiller(seed: int, distilled: bool) -> Distiller:
        student = job.student(seed)
        return job.distiller(student) if distilled else Distiller(None, student, losses=[])

    comparison = compare(make_distiller, job.data, job.settings, arguments.seeds, arguments.output)
    if PartialState().is_main_process:
        show(comparison, arguments.output)


def show(comparison: Comparison, output: str | Path, console: Console | None = None) -> None:
    """Print the table and what it says."""
    console = console or Console()
    table = Table(*comparison.columns, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for line in comparison.lines():
        table.add_row(*map(Text, line.cells()), end_section=line.name == "calibration_error")
    console.print(table)
    for text in (comparison.verdict(), comparison.note(), f"Written to {Path(output) / 'comparison.md'} and .json."):
        console.print(text, highlight=False, markup=False)
