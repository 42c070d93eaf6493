"""``kdvit distill``: a teacher, a student, images, losses; a run folder comes out."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from kdvit.cli.job import Job, add_job_arguments
from kdvit.cli.parser import Parser
from kdvit.cost import human, num_parameters
from kdvit.description import describe
from kdvit.training import Trainer
from kdvit.wrappers import Student

_EXAMPLE = """example:
  kdvit distill --data ./images --teacher vit_base_patch16_224 --student deit_tiny_patch16_224 \\
      --loss vitkd --loss 0.5*dkd:beta=2 --epochs 100 --output runs/first
"""


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    job = Job(arguments)
    distiller = job.distiller()
    student = distiller.student
    trainer = Trainer(distiller, job.data, job.settings, arguments.output, resume=arguments.resume, title=student.name)
    if trainer.shows:
        print(describe(distiller, width=min(120, Console().width)))
    if arguments.check:
        return
    result = trainer.fit()
    if trainer.shows:
        _report(result, student, deployed=distiller.deployable is not student.model)


def _parser() -> Parser:
    parser = Parser("kdvit distill", description="Distil a teacher into a student.", epilog=_EXAMPLE)
    add_job_arguments(parser)
    add = parser.add_argument_group("run").add_argument
    add("--output", default="runs/distill", help="run folder [%(default)s]")
    add("--resume", action="store_true", help="go on with the run in the run folder")
    add("--check", action="store_true", help="check everything, show what would be read, train nothing")
    return parser


def _report(result: object, student: Student, deployed: bool) -> None:
    size = human(num_parameters(student.model))
    accuracy = f"{result.top1:.2f} % top-1" if result.top1 is not None else "no classifier to evaluate"
    print(f"{student.name} ({size} parameters): {accuracy}, {result.seconds:.0f} s, saved in {result.folder}/student")
    if deployed:  # with a projector and the teacher's classifier, which timm does not know
        print(f'load it:  kdvit.create_model("{result.folder}/student")')
    else:
        print(f'load it:  timm.create_model("local-dir:{result.folder}/student", pretrained=True)')
