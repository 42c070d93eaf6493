"""What a stored teacher saves, takes on the disk, and costs in accuracy.

Command   python benchmarks/stored_teacher.py time [--teachers small base] [--losses kd vitkd] [--rounds 9] [--steps 2]
          python benchmarks/stored_teacher.py bytes [--teachers small base] [--images 64]
          python benchmarks/stored_teacher.py accuracy [--seeds 0 1 2] [--only vitkd "vitkd, int8"]
          python benchmarks/stored_teacher.py page [--seeds 0 1 2]

`time` and `bytes`: deit_tiny taught by deit_small and deit_base with random weights (drawn from a seed) and 1000
classes, on the embedded images as 224x224 RGB, augmented. Times are of whole steps: loading (decoding, augmentation,
and of the stored teacher its rows), forward, backward, AdamW. Five take their steps in turn, in one process:

  live           the teacher runs in the step
  stored         its signals come from a cache (fp16), as rows beside the images
  constant       its signals are tensors that are always the same: what the loss itself costs, with its projectors
  labels alone   the student and the cross-entropy
  loading alone  of images

stored / labels alone is what is left of the teacher; stored / constant, what reading and decoding its signals cost. The
cache is as large as the images of the measurement are, so the operating system has it in memory; where yours is not, a
disk must give the bytes of a batch within a step. The first losses of live and stored are compared first.

`accuracy` is the job of `small_job.py` (the quickstart's student on the embedded images, the shipped teachers): each
row with the live teacher, and with the same teacher stored in several forms, at the same seeds. Caches are removed when
their run is done. `page` writes docs/benchmarks/stored_teacher.md and stored_teacher.json from what there is.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Step, facts, interleaved, made_by, ratios, spread
from small_job import DOCS, TRAINING, folder
from stored_accuracy import ROWS, accuracy_table, bytes_per_image, train
from torch import Tensor, nn

from kdvit import Distiller, Student, Teacher, Training, create_model
from kdvit.cache import StoredTeacher, build
from kdvit.data import ImageData, TransformSettings, make_loader, open_data
from kdvit.losses import make

LIVE, STORED, CONSTANT, ALONE, LOADING = "live", "stored", "constant", "labels alone", "loading alone"
TEACHERS = {"small": "deit_small_patch16_224", "base": "deit_base_patch16_224"}
STUDENT = "deit_tiny_patch16_224"
TRANSFORM = TransformSettings()
#: Weight of the labels, and the losses with theirs.
LOSSES: dict[str, tuple[float, Callable[[], list]]] = {
    "kd": (0.1, lambda: [(0.9, make("kd", temperature=4.0))]),
    "vitkd": (1.0, lambda: [(1.0, make("vitkd"))]),
}
FORMS = {"kd": ("fp32", "fp16", "top10", "top100"), "vitkd": ("fp32", "fp16", "int8", "project64")}
#: The same loss from fp16: logits and features are rounded to 2^-11 of themselves.
TOLERANCE = 2e-3
#: Images of ImageNet-1k, for a figure that people can place.
IMAGENET = 1_281_167


# Models and data


def models(teacher: str) -> tuple[nn.Module, nn.Module]:
    """(student, teacher); always the same weights."""
    torch.manual_seed(0)
    return create_model(STUDENT), create_model(TEACHERS[teacher])


def make_distiller(teacher: Teacher | StoredTeacher | None, learner: nn.Module, loss: str) -> Distiller:
    """Projectors with the same weights each time; without a teacher, the labels alone."""
    task_weight, losses = LOSSES[loss]
    torch.manual_seed(1)
    chosen = losses() if teacher is not None else []
    return Distiller(teacher, Student(copy.deepcopy(learner)), chosen, task_weight=task_weight).train()


def settings_for(batch_size: int) -> Training:
    return Training(epochs=1, batch_size=batch_size)


def store(
    path: Path, model: nn.Module, learner: nn.Module, loss: str, data: ImageData, batch_size: int, form: str
) -> StoredTeacher:
    """The teacher's signals for one epoch."""
    live = make_distiller(Teacher(copy.deepcopy(model)), learner, loss)
    build(path, live, data, settings_for(batch_size), transform=TRANSFORM, form=form, quiet=True)
    return StoredTeacher(path)


def batches(data: ImageData, batch_size: int, subject: Distiller | None = None) -> Iterator[dict[str, Any]]:
    """The first epoch of the training job; with the rows of a stored teacher where the Distiller has one."""
    rows = {"rows": subject.stored_rows} if subject is not None and subject.stored_rows is not None else {}
    return iter(make_loader(data.train, TRANSFORM, batch_size=batch_size, train=True, **rows))


class Loop:
    """Training steps of one contender, on batches of its own."""

    def __init__(self, subject: Distiller, data: ImageData, batch_size: int) -> None:
        self.subject = subject
        self.batches = batches(data, batch_size, subject)
        self.optimizer = torch.optim.AdamW(subject.parameters(), lr=1e-4)
        self.losses: list[float] = []

    def step(self) -> None:
        batch = next(self.batches)
        torch.manual_seed(len(self.losses))  # what a loss draws (masks) is the same for all
        loss = self.subject(batch["image"], batch["label"], stored=batch.get("rows")).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


def with_constant_signals(subject: Distiller, images: Tensor) -> Distiller:
    """Its teacher gives the signals of these images, whatever it is shown."""
    signals = subject.teacher(images)
    subject.teacher.forward = lambda images: signals
    return subject


# time


def time_steps(teacher: str, loss: str, rounds: int, count: int, batch_size: int) -> dict[str, Any]:
    """Seconds of a step, by contender and round."""
    data = open_data("fashion-mnist-sample").subset((1 + (1 + rounds) * count) * batch_size, 10)
    learner, model = models(teacher)
    with tempfile.TemporaryDirectory() as temporary:
        stored = store(Path(temporary) / "cache", model, learner, loss, data, batch_size, "fp16")
        images = next(batches(data, batch_size))["image"]
        subjects = {
            LIVE: make_distiller(Teacher(model), learner, loss),
            STORED: make_distiller(stored, learner, loss),
            CONSTANT: with_constant_signals(make_distiller(Teacher(copy.deepcopy(model)), learner, loss), images),
            ALONE: make_distiller(None, learner, loss),
        }
        loops = {name: Loop(subject, data, batch_size) for name, subject in subjects.items()}
        loading = batches(data, batch_size)
        steps: dict[str, Step] = {**{name: loop.step for name, loop in loops.items()}, LOADING: lambda: next(loading)}
        interleaved(steps, 1)
        difference = abs(loops[STORED].losses[0] / loops[LIVE].losses[0] - 1)
        if not difference < TOLERANCE:
            raise SystemExit(f"stored_teacher: the first {loss} of stored is {difference:.1e} from that of live")
        interleaved(steps, 1, count)  # warms up
        seconds = interleaved(steps, rounds, count)
        return {
            "batch_size": batch_size,
            "bytes": bytes_per_image(Path(temporary) / "cache", len(data.train)),
            "first_loss_difference": difference,
            "seconds": seconds,
        }


def time_table(record: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One row a pair; times are those of a step."""
    names = (LIVE, STORED, CONSTANT, ALONE, LOADING)
    head = ["teacher", "loss", *(f"{name}, ms" for name in names), "live / labels", "stored / labels",
            "stored / constant", "rows of a batch, MiB"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for pair, found in record.items():
        seconds = found["seconds"]
        cells = [*pair.split(", "), *(f"{1e3 * statistics.median(seconds[name]):.1f}" for name in names)]
        for above, below in ((LIVE, ALONE), (STORED, ALONE), (STORED, CONSTANT)):
            cells.append(spread(ratios(seconds[above], seconds[below])))
        cells.append(f"{found['bytes'] * found['batch_size'] / 2**20:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# bytes


def measure_bytes(teacher: str, num_images: int) -> dict[str, dict[str, float]]:
    """Bytes of an image in one epoch, by loss and form."""
    data = open_data("fashion-mnist-sample").subset(num_images, 10)
    learner, model = models(teacher)
    found: dict[str, dict[str, float]] = {}
    for loss, forms in FORMS.items():
        for form in forms:
            with tempfile.TemporaryDirectory() as temporary:
                store(Path(temporary) / "cache", model, learner, loss, data, min(8, num_images), form)
                found.setdefault(loss, {})[form] = bytes_per_image(Path(temporary) / "cache", num_images)
    return found


def bytes_table(record: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    lines = [
        "| teacher | loss | form | bytes an image | to fp32 | ImageNet-1k, GiB an epoch |",
        "|---|---|---|---|---|---|",
    ]
    for teacher, losses in record.items():
        for loss, forms in losses.items():
            for form, size in forms.items():
                cells = [TEACHERS[teacher], loss, form, f"{size:,.0f}", f"{size / forms['fp32']:.3f}"]
                lines.append(f"| {' | '.join(cells)} | {size * IMAGENET / 2**30:,.2f} |")
    return lines


# The page


def page(found: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """docs/benchmarks/stored_teacher.md, from what was measured."""
    lines = ["# What a stored teacher saves, takes and costs"]
    if "time" in found:
        given = found["time"]["facts"]
        text = __doc__.split("Five take their steps")[1].split("`accuracy` is")[0].split("\n\n")
        lines += ["", "## Time of a step", "", f"Made by {made_by(given)}", ""]
        lines += [f"Medians of {given['rounds']} rounds of {given['steps']} steps, batch {given['batch_size']}; ratios "
                  "round by round, median (lowest..highest)."]  # fmt: skip
        lines += ["", *time_table(found["time"]["pairs"]), "", "```", *text[1].strip("\n").splitlines(), "```", ""]
        lines += [" ".join(text[2].split())]
    if "bytes" in found:
        lines += ["", "## Bytes", "", f"Made by {made_by(found['bytes']['facts'])} The files of the rows of "
                  f"{found['bytes']['facts']['images']} images, over their number; 224x224, 1000 classes."]  # fmt: skip
        lines += ["", *bytes_table(found["bytes"]["teachers"])]
    if results:
        lines += ["", "## Accuracy", "", f"Made by {made_by(found['accuracy']['facts'])}", ""]
        lines += [
            "The job of [response methods](response_methods.md): the quickstart's student, "
            f"{TRAINING.epochs} epochs of 8,000 images; top-1 on the 2,000 test images after the last epoch, mean and "
            f"standard deviation over {len({run['seed'] for run in results})} seeds. The standard error of one "
            "accuracy on 2,000 images is 0.9 points. Ten classes: top10 stores all of them, top3 drops seven."
        ]
        lines += ["", *accuracy_table(results)]
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "bytes", "accuracy", "page"))
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="of each in a round")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--images", type=int, default=64, help="that are stored to measure bytes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--beside", default="nothing", help="what else the machine does meanwhile, for the page")
    parser.add_argument("--output", type=Path, default=Path("runs") / "stored_teacher")
    arguments = parser.parse_args(argv)
    runs = arguments.output
    runs.mkdir(parents=True, exist_ok=True)
    if arguments.what == "page":
        files = {what: runs / f"{what}.json" for what in ("time", "bytes", "accuracy")}
        found = {what: json.loads(file.read_text()) for what, file in files.items() if file.is_file()}
        paths = [folder(runs, name, seed) / "result.json" for seed in arguments.seeds for name in ROWS]
        results = [json.loads(path.read_text()) for path in paths if path.is_file()]
        text = page(found, results)
        (DOCS / "stored_teacher.md").write_text(text)
        (DOCS / "stored_teacher.json").write_text(json.dumps({**found, "runs": results}, indent=1) + "\n")
        print(text)
        return
    record: dict[str, Any] = {}
    if arguments.what == "time":
        counts = {"rounds": arguments.rounds, "steps": arguments.steps, "batch_size": arguments.batch_size}
        record["pairs"] = {}
        for teacher in arguments.teachers:
            for loss in arguments.losses:
                times = time_steps(teacher, loss, arguments.rounds, arguments.steps, arguments.batch_size)
                record["pairs"][f"{TEACHERS[teacher]}, {loss}"] = times
                print("\n".join(time_table({f"{TEACHERS[teacher]}, {loss}": times})), flush=True)
    elif arguments.what == "bytes":
        counts = {"images": arguments.images}
        record["teachers"] = {teacher: measure_bytes(teacher, arguments.images) for teacher in arguments.teachers}
        print("\n".join(bytes_table(record["teachers"])))
    else:
        counts, data = {}, open_data("fashion-mnist-sample")
        for seed in arguments.seeds:
            for name in arguments.only:
                print(train(name, seed, runs, data), flush=True)
    record["facts"] = facts("cpu", ("torch", "timm"), arguments.beside, **counts)
    (runs / f"{arguments.what}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
