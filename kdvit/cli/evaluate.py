"""``kdvit evaluate``: how good a saved student is, and how closely it follows its teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kdvit.cli.job import Job
from kdvit.cli.parser import Parser
from kdvit.data import ImageData, TransformSettings, make_loader
from kdvit.deployment import DeployedStudent
from kdvit.distiller import Distiller
from kdvit.files import why, write_whole
from kdvit.models import create_model
from kdvit.similarity import LayerSimilarity, layer_similarity
from kdvit.taps.family import logits_of
from kdvit.training import transform_for
from kdvit.training.fidelity import FIGURES, Fidelity, fidelity
from kdvit.wrappers import Student, Teacher

_EXAMPLE = """example:
  kdvit evaluate runs/first --data ./images --teacher vit_base_patch16_224 --baseline runs/alone --json first.json
"""
#: Images that the layers are compared on, the first of every class in turn.
_LAYER_IMAGES = 512
#: Background of a cell, from nothing in common to equal: light on dark, and dark on light, stay readable.
_SHADES = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c")


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated, with the images that it takes."""

    name: str
    student: Student
    transform: TransformSettings

    def title(self) -> str:
        """Its name, and the images that it is given: a model that takes any size may state another than it learned."""
        channels, height, width = self.student.input_size
        return f"{self.name} ({channels}x{height}x{width} images)"


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.layers < 0:
        raise ValueError(f"--layers: it must be >= 0, got {arguments.layers}; 0 compares none.")
    if arguments.json is not None and not Path(arguments.json).parent.is_dir():
        raise ValueError(f"--json: '{arguments.json}' must be in a folder that exists, got none; make it first.")
    if arguments.json is not None and Path(arguments.json).is_dir():
        raise ValueError(f"--json: '{arguments.json}' must be a file, got a folder; name a file in it.")
    job = Job(arguments)
    accelerator = Accelerator()
    teacher = job.teachers[0] if job.teachers else None
    subjects = {"student": _subject(arguments.model, arguments.image_size)}
    if arguments.baseline is not None:
        subjects["baseline"] = _subject(arguments.baseline, arguments.image_size)
    # All are paired with the teacher before the first is run: what does not fit is said at once.
    pairs = {role: _pair(subject, teacher, job.data) for role, subject in subjects.items()}
    found = {role: _evaluate(subjects[role], pairs[role], job.data, arguments, accelerator) for role in subjects}
    layers, refused = None, None
    if teacher is not None and arguments.layers:
        try:
            layers = _layers(subjects["student"], pairs["student"], job.data, arguments, accelerator)
        except ValueError as error:  # the figures stand without it
            refused = f"The layers are not compared: {error}"
    if not accelerator.is_main_process:
        return
    names = {role: subject.title() for role, subject in subjects.items()}
    names |= {} if teacher is None else {"teacher": teacher.name}
    show(found, layers, job.data.classes, names)
    if refused is not None:
        print(f"\n{refused}")
    if arguments.json is not None:
        _write(arguments.json, found, layers or refused, names, job.data)
        print(f"written to {arguments.json}")


def _parser() -> Parser:
    parser = Parser("kdvit evaluate", description="Evaluate a saved student.", epilog=_EXAMPLE)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run folder, a folder that was saved, or a name of `kdvit list models`")
    add("--data", required=True, help="`kdvit list data`: its test images are used")
    add("--teacher", nargs=1, metavar="MODEL", help="what the student is compared with")
    add("--teacher-checkpoint", help="weights of the teacher (safetensors or torch), instead of the published ones")
    add("--teacher-options", default="", help="NAME=VALUE,... for timm.create_model")
    add("--class-map", help="JSON file: a list with the teacher's class for each class of the data")
    add("--baseline", metavar="MODEL", help="another student beside it, such as the one that was trained alone")
    add(
        "--image-size", type=int, metavar="INT", help="pixels along a side [those of the run, or what the model states]"
    )
    add("--layers", type=int, default=6, metavar="INT", help="layers to compare with the teacher's, 0 for none [6]")
    add("--batch-size", type=int, default=128, metavar="INT", help="images in one forward pass [128]")
    add("--num-workers", type=int, default=0, metavar="INT", help="loader processes [0]")
    add("--json", metavar="FILE", help="write all of it there")
    # A `Job` asks for both: a stored teacher knows nothing of test images, and the teacher is evaluated as it is.
    parser.set_defaults(stored_teacher=None, teacher_dtype=None)
    return parser


def _subject(name: str, image_size: int | None = None) -> Subject:
    """A model by name, with the transform of the run that made it."""
    folder, model, run = Path(name), name, None
    if (folder / "run.json").is_file():
        run, model = folder, str(folder / "student")
    elif (folder / "config.json").is_file() and (folder.resolve().parent / "run.json").is_file():
        run = folder.resolve().parent  # RUN/student or RUN/best
    module = create_model(model, pretrained=True).eval()
    if run is None:
        size = Student(module, name=name).input_size
        size = size if image_size is None else (size[0], image_size, image_size)
        transform = transform_for(Student(module, name=name, input_size=size))
    else:
        transform = _transform(run / "run.json")
        transform = transform if image_size is None else replace(transform, image_size=image_size)
    size = (transform.num_channels, transform.image_size, transform.image_size)
    student = Student(module, name=name, input_size=size, mean=transform.mean, std=transform.std)
    return Subject(name, student, transform)


def _transform(path: Path) -> TransformSettings:
    try:
        facts = json.loads(path.read_text())["transform"]
        return TransformSettings(**{name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()})
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"evaluate: '{path}' must be the run.json of a run with its transform, and is not ({error}); evaluate the "
            "model from a copy of its folder elsewhere to use the transform of its config."
        ) from error


def _pair(subject: Subject, teacher: Teacher | None, data: ImageData) -> Distiller:
    """The student with the teacher, which is fed what it was trained on."""
    distiller = Distiller(teacher, subject.student, ["kd"] if teacher is not None else [])
    if distiller.num_classes != len(data.classes):
        raise ValueError(
            f"evaluate: '{subject.name}' must have the {len(data.classes)} classes of data '{data.name}', got "
            f"{distiller.num_classes}; evaluate it on data of its classes."
        )
    return distiller.eval()


def _evaluate(
    subject: Subject, distiller: Distiller, data: ImageData, arguments: Any, accelerator: Accelerator
) -> Fidelity:
    distiller.to(accelerator.device)
    model = distiller.student.model
    options = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    loader = accelerator.prepare(make_loader(data.test, subject.transform, train=False, **options))
    teacher = distiller.teacher.predict if distiller.teacher is not None else None
    return fidelity(
        lambda images: logits_of(model(images), subject.name), teacher, loader, len(data.classes), accelerator
    )


def _layers(
    subject: Subject, distiller: Distiller, data: ImageData, arguments: Any, accelerator: Accelerator
) -> LayerSimilarity:
    """The layers of the student beside the teacher's."""
    student, teacher = distiller.student, distiller.teacher
    if isinstance(student.model, DeployedStudent):
        student = Student(student.model.student.model, name=subject.name, input_size=student.input_size)
    images = data.test.subset(min(_LAYER_IMAGES, len(data.test)))
    loader = make_loader(images, subject.transform, train=False, batch_size=arguments.batch_size)
    return layer_similarity(
        student, teacher, (batch["image"].to(accelerator.device) for batch in loader), arguments.layers
    )


def show(
    found: dict[str, Fidelity],
    layers: LayerSimilarity | None,
    classes: Sequence[str],
    names: dict[str, str],
    console: Console | None = None,
) -> None:
    """Print the table of figures and the heat table of the layers.

    Args:
        found: of the student, and of the baseline where there is one.
        layers: of student and teacher; None for no such table.
        classes: names of the classes.
        names: what each column's model is called, the teacher's among them.
        console: where to print.
    """
    console = console or Console()
    teacher = found["student"].teacher
    columns = {**found, **({"teacher": teacher} if teacher is not None else {})}
    for role, name in names.items():
        console.print(f"{role:<9}{name}", highlight=False, markup=False)
    table = Table("", *columns, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (title, digits) in FIGURES.items():
        values = [column.figures()[name] for column in columns.values()]
        if any(value is not None for value in values):
            cells = [_cell(value, digits) for value in values]
            table.add_row(title, *cells, end_section=name == "calibration_error")
    for index in found["student"].worst_classes():
        cells = [_cell(column.class_accuracy[index], 2) for column in columns.values()]
        table.add_row(Text(f"class {classes[index]}, %"), *cells)
    console.print(table)
    against = "furthest below the teacher" if teacher is not None else "of the lowest accuracy"
    num_images = found["student"].accuracy.num_images
    console.print(
        f"{num_images:,} test images. Cross-entropy and KL in nats. Classes: the student's {against}.", highlight=False
    )
    if layers is not None:
        console.print("\nCKA of the layers, student (rows) and teacher: 1 where both find the same images alike.")
        console.print(heat_table(layers))


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def heat_table(layers: LayerSimilarity) -> Table:
    """CKA of every layer of the student (rows) with every layer of the teacher (columns)."""
    table = Table("", box=None, pad_edge=False)
    for layer in layers.teacher_layers:
        table.add_column(Text(layer), justify="right", overflow="fold")
    for layer, row in zip(layers.student_layers, layers.cka.tolist(), strict=True):
        table.add_row(Text(layer), *map(_shaded, row))
    return table


def _shaded(value: float) -> Text:
    if math.isnan(value):
        return Text("-")
    level = min(int(max(value, 0.0) * len(_SHADES)), len(_SHADES) - 1)
    ink = "black" if level < 4 else "white"
    return Text(f" {value:.2f} ", style=f"{ink} on {_SHADES[level]}")


def _write(
    path: str,
    found: dict[str, Fidelity],
    layers: LayerSimilarity | str | None,
    names: dict[str, str],
    data: ImageData,
) -> None:
    """All of it as JSON; ``layers`` may be the reason why there are none."""
    record: dict[str, Any] = {"data": data.name, "classes": data.classes, "names": names}
    record["models"] = {role: asdict(fidelity) for role, fidelity in found.items()}
    record["layers"] = layers
    if isinstance(layers, LayerSimilarity):
        record["layers"] = {
            "student": layers.student_layers,
            "teacher": layers.teacher_layers,
            "cka": _numbers(layers.cka),
            "relation_distance": _numbers(layers.relation_distance),
        }
    try:
        write_whole(Path(path), json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"--json: '{path}' cannot be written ({why(error)}); choose another file.") from error


def _numbers(matrix: Tensor) -> list[list[float | None]]:
    """JSON knows no NaN."""
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]
