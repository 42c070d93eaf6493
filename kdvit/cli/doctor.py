"""``kdvit doctor``: what ``kdvit distill`` would do with the same options, tried on a few batches."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from kdvit.checkup import check_training
from kdvit.cli.job import Job, add_job_arguments
from kdvit.cli.parser import Parser

_EXAMPLE = """example:
  kdvit doctor --data ./images --teacher vit_base_patch16_224 --student deit_tiny_patch16_224 --loss vitkd --epochs 100

exit code: 0 ready to train (warnings allowed), 1 something is wrong, 2 an option is wrong
"""


def main(argv: Sequence[str]) -> int:
    parser = Parser("kdvit doctor", description="Look a training over before it starts.", epilog=_EXAMPLE)
    add_job_arguments(parser)
    add = parser.add_argument_group("checkup").add_argument
    add("--batches", type=int, default=5, help="training batches to try, the first for warming up [%(default)s]")
    arguments = parser.parse_args(argv)
    if arguments.batches < 1:
        raise ValueError(f"--batches: it must be >= 1, got {arguments.batches}; 5 are usual.")
    job = Job(arguments)
    checkup = check_training(job.distiller(), job.data, job.settings, num_batches=arguments.batches)
    Console(highlight=False).print(checkup)
    return 0 if checkup.ok else 1
