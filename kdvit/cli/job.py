"""A training job on the command line: what is trained, on what, by whom; shared by the commands that need one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch

from kdvit.cache.teacher import StoredTeacher
from kdvit.cli.options import parse_loss, parse_options, parse_weight
from kdvit.cli.parser import Parser
from kdvit.data import ImageData, open_data
from kdvit.distiller import Distiller
from kdvit.models import create_model
from kdvit.training import Training
from kdvit.training.arguments import add_arguments
from kdvit.wrappers import Student, Teacher

#: What --teacher-dtype may say.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Job:
    """What the options of `add_job_arguments` name; nothing is loaded before it is asked for."""

    arguments: argparse.Namespace

    @cached_property
    def settings(self) -> Training:
        given = {item.name: getattr(self.arguments, item.name) for item in fields(Training)}
        if given["epochs"] is None and given["steps"] is None:
            given["epochs"] = Training.epochs
        return Training(**given)

    @cached_property
    def data(self) -> ImageData:
        return open_data(self.arguments.data)

    @cached_property
    def teachers(self) -> list[Teacher | StoredTeacher]:
        return _stored(self.arguments, _teachers(self.arguments))

    def student(self, seed: int | None = None) -> Student:
        """A new student, with weights of ``--seed`` unless another is given."""
        seed, num_classes = self.settings.seed if seed is None else seed, len(self.data.classes)
        return _student(self.arguments, num_classes, self.teachers, seed)

    def distiller(self, student: Student | None = None) -> Distiller:
        """The teachers, a student (a new one by default) and the losses."""
        losses = [parse_loss(text) for text in self.arguments.loss or ["kd"]]
        student = student or self.student()
        return Distiller(
            self.teachers or None,
            student,
            losses,
            task_loss=None if self.arguments.no_task_loss else "cross_entropy",
            task_weight=parse_weight(self.arguments.task_weight),
        )


def add_job_arguments(parser: Parser, skip: Sequence[str] = ()) -> None:
    """The options of `Job`: data, models, losses and every setting of `Training`, but those to ``skip``."""
    add = parser.add_argument_group("what").add_argument
    add("--data", required=True, help="`kdvit list data`: a built-in name, a folder, a parquet file, a hub name")
    add(
        "--teacher",
        action="append",
        metavar="MODEL",
        help="`kdvit list models`: a shipped or timm name, or a folder; none for losses without a teacher; repeatable",
    )
    add("--teacher-checkpoint", help="weights of the teacher (safetensors or torch), instead of the published ones")
    add("--teacher-options", default="", help="NAME=VALUE,... for timm.create_model")
    add("--teacher-dtype", choices=tuple(DTYPES), help="run the teachers in this precision [as their weights are]")
    add("--class-map", help="JSON file: a list with the teacher's class for each class of the data")
    add(
        "--stored-teacher",
        action="append",
        metavar="FOLDER",
        help="made by `kdvit cache build`: takes the place of the --teacher that it was made of, or stands alone; "
        "repeatable",
    )
    add("--student", required=True, help="a timm name, or a folder that was saved")
    add("--student-options", default="", help="NAME=VALUE,... for timm.create_model, such as img_size=32,patch_size=4")
    add("--student-pretrained", action="store_true", help="start from published weights, not from random ones")
    add("--loss", action="append", metavar="[WEIGHT*]NAME[:OPTIONS]",
        help="`kdvit list losses`; may be repeated; kd:temperature=2,standardize=True [kd]")  # fmt: skip
    add("--task-weight", default="1.0", help="weight of the cross-entropy with the labels, or a schedule [%(default)s]")
    add("--no-task-loss", action="store_true", help="learn from the teacher alone")
    add_arguments(parser.add_argument_group("training"), Training, skip)
    parser.set_defaults(**{name: getattr(Training, name) for name in skip})
    parser.set_defaults(epochs=None)  # so that --steps alone is not taken for both


def _teachers(arguments: argparse.Namespace) -> list[Teacher]:
    names = arguments.teacher or []
    if len(names) > 1:
        for option in ("teacher_checkpoint", "teacher_options", "class_map"):
            if getattr(arguments, option):
                raise ValueError(
                    f"--{option.replace('_', '-')}: there must be one --teacher for it, got {len(names)}; save such a "
                    "teacher as a folder (kdvit.models.save_model), or write a recipe."
                )
    for name in names:
        if "," in name and not Path(name).exists():
            raise ValueError(f"--teacher: it must name one model, got '{name}'; write --teacher once for each.")
        if names.count(name) > 1:
            raise ValueError(f"--teacher: each must be another model, got '{name}' twice; name it once.")
    class_map = _class_map(arguments.class_map) if arguments.class_map is not None else None
    options = parse_options(arguments.teacher_options, "--teacher-options")
    checkpoint = arguments.teacher_checkpoint
    return [
        Teacher(
            create_model(name, pretrained=checkpoint is None, checkpoint=checkpoint, **options),
            class_map=class_map,
            dtype=DTYPES[arguments.teacher_dtype] if arguments.teacher_dtype is not None else None,
            name=name,
        )
        for name in names
    ]


def _stored(arguments: argparse.Namespace, teachers: list[Teacher]) -> list[Teacher | StoredTeacher]:
    """The teachers, stored ones in the places of those that they were made of."""
    stored = [StoredTeacher(folder) for folder in arguments.stored_teacher or []]
    if not teachers:
        return list(stored)
    found: list[Teacher | StoredTeacher] = list(teachers)
    for one in stored:
        places = [place for place, each in enumerate(found) if isinstance(each, Teacher) and one.is_of(each)]
        if not places:
            if len(teachers) == 1:
                one.check_teacher(teachers[0])
            raise ValueError(
                f"--stored-teacher: '{one.folder}' must be made of one of the --teacher, each stored once, got one of "
                f"'{one.name}'; name that teacher too, or no --teacher at all."
            )
        found[places[0]] = one
    return found


def _class_map(path: str) -> list[int]:
    try:
        numbers = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"--class-map: '{path}' must be a readable JSON file, got '{reason}'; check it.") from error
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise ValueError(
            f"--class-map: '{path}' must hold a list of whole numbers, got {str(numbers)[:40]}; "
            "write the teacher's class for each class of the data, such as [3, 0, 7]."
        )
    return numbers


def _student(
    arguments: argparse.Namespace, num_classes: int, teachers: Sequence[Teacher | StoredTeacher], seed: int
) -> Student:
    torch.manual_seed(seed)
    options = {"num_classes": num_classes, **parse_options(arguments.student_options, "--student-options")}
    model = create_model(arguments.student, pretrained=arguments.student_pretrained, **options)
    if arguments.student_pretrained or not teachers or teachers[0].normalisation is None:
        return Student(model, name=arguments.student)
    # From scratch any normalisation does, so take the (first) teacher's: nothing to convert in the step.
    mean, std = teachers[0].normalisation
    return Student(model, name=arguments.student, mean=mean, std=std)
