"""A small job that every method is given alike: what a run is, what a step costs, and a page of both.

`response_methods.py` and `feature_methods.py` bring the methods and run this.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from measuring import PeakMemory, Step, interleaved, ratios, seconds_of

from kdvit import Bilevel, Distiller, Progress, Student, Teacher, Trainer, Training, calibrate, create_model
from kdvit.cli.quickstart import STUDENT
from kdvit.cost import device_name
from kdvit.data import FASHION_MNIST_TRANSFORM, ImageData, open_data
from kdvit.distiller import Weight
from kdvit.losses import Loss, Scheduled, Standardized, make
from kdvit.schedules import Schedule

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
CNN, VIT = "fashion_mnist_cnn", "fashion_mnist_vit"
TRAINING = Training(epochs=6, batch_size=128, lr=1e-3, weight_decay=0.05, warmup_epochs=1.0, evaluate_epochs=6)


@dataclass(frozen=True)
class Method:
    """One row: what is minimised, as `Distiller` takes it.

    Args:
        losses: makes the losses, with their weights; given the folder of the benchmark's runs and the seed.
        task_weight: of the cross-entropy on the labels.
        teacher: a shipped teacher, several, None where the method has none, or "self" for the student of "alone".
        distilled: whether the student has a distillation token and head.
        note: what is not published, and why.
    """

    losses: Callable[[Path, int], list]
    task_weight: Weight = 1.0
    teacher: str | tuple[str, ...] | None = CNN
    distilled: bool = False
    note: str = ""


def one(name: str, weight: Any = 1.0, **options: Any) -> Callable[[Path, int], list]:
    """A single loss with its weight."""
    return lambda runs, seed: [(weight, make(name, **options))]


ALONE = Method(lambda runs, seed: [], teacher=None)


@dataclass(frozen=True)
class Job:
    """A table of methods.

    Args:
        name: of the script, of its folder under runs/ and of the page in docs/benchmarks.
        title: of the page.
        text: under the title.
        reference: the row whose step the costs are relative to.
        methods: the rows by name; "alone" among them.
    """

    name: str
    title: str
    text: str
    reference: str
    methods: Mapping[str, Method] = field(default_factory=dict)


def student(distilled: bool, seed: int) -> Student:
    """The quickstart's student; its weights depend on the seed alone."""
    name = "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224"
    torch.manual_seed(seed)
    settings = FASHION_MNIST_TRANSFORM
    model = create_model(name, num_classes=10, **STUDENT)
    return Student(model, mean=settings.mean, std=settings.std, name="distilled ViT" if distilled else "ViT")


def distiller(method: Method, seed: int, runs: Path) -> Distiller:
    """What one row minimises."""
    names = method.teacher if isinstance(method.teacher, tuple) else (method.teacher,) if method.teacher else ()
    self_taught = str(folder(runs, "alone", seed) / "student")
    teachers = [Teacher(create_model(self_taught if name == "self" else name)) for name in names]
    learner = student(method.distilled, seed)  # last, because it draws its weights from the seed
    return Distiller(teachers or None, learner, method.losses(runs, seed), task_weight=method.task_weight)


def folder(runs: Path, name: str, seed: int) -> Path:
    return runs / name.replace(", ", "-").replace(" ", "_") / str(seed)


def train(job: Job, name: str, seed: int, runs: Path, data: ImageData) -> dict[str, Any]:
    """One run; its accuracy and seconds."""
    path = folder(runs, name, seed)
    if not (path / "result.json").is_file():
        subject, settings = distiller(job.methods[name], seed, runs), replace(TRAINING, seed=seed)
        options = {"transform": FASHION_MNIST_TRANSFORM, "resume": path.exists(), "title": f"{name} {seed}"}
        result = Trainer(subject, data, settings, path, **options).fit()
        record = {"method": name, "seed": seed, "top1": result.top1, "seconds": result.seconds}
        (path / "result.json").write_text(json.dumps(record) + "\n")
    return json.loads((path / "result.json").read_text())


# Cost


def make_step(method: Method, runs: Path, batch_size: int) -> tuple[Step, int]:
    """One training step on a fixed batch, bilevel step included where it is due; and after how many it is due again."""
    subject = distiller(method, 0, runs).train()
    subject.allocate(8000)
    generator_ = torch.Generator().manual_seed(0)
    images, second, held_out = torch.randn(3, batch_size, 1, 28, 28, generator=generator_)
    labels = torch.arange(batch_size) % 10
    calibrate(subject, [(held_out, labels)])
    optimizer = torch.optim.AdamW(subject.parameters(), lr=1e-4)
    bilevel, count = Bilevel(subject), 0

    def step() -> None:
        nonlocal count
        progress = Progress(step=count, epoch=count / 62, total_steps=372, total_epochs=6.0)
        context: dict[str, Any] = {"sample_ids": labels, "progress": progress}
        context |= {"second_images": second} if subject.reads_second_view else {}
        if bilevel.is_due(progress):
            bilevel.step(images, labels, held_out, labels, lr=1e-4, **context)
        optimizer.zero_grad()
        subject(images, labels, **context).loss.backward()
        optimizer.step()
        count += 1

    return step, max((subject.losses[key].meta_interval for key in bilevel.optimizers), default=1)


def peak_memory(step: Step) -> int:
    """Bytes that torch's allocator holds at most during a step, beyond what it held before."""
    with PeakMemory() as peak:
        step()
    return peak.num_bytes


def cost(job: Job, runs: Path, rounds: int, batch_size: int) -> dict[str, dict[str, float]]:
    """Medians of the ratios of one method's step to the reference's step that was timed beside it."""
    reference, _ = make_step(job.methods[job.reference], runs, batch_size)
    seconds_of(reference, 10)  # the first steps allocate the optimizer's state, and are slow
    base = peak_memory(reference)
    found = {}
    for name, method in job.methods.items():
        step, period = make_step(method, runs, batch_size)
        seconds_of(step, 10)
        # As many steps as a bilevel interval is long, so that each round holds one.
        times = interleaved({"step": step, "reference": reference}, rounds, 10)
        found[name] = {
            "time": statistics.median(ratios(times["step"], times["reference"])),
            "milliseconds": 1e3 * statistics.median(times["step"]),
            "memory": max(peak_memory(step) for _ in range(period)) / base,
        }
        print(f"{name}: {found[name]}", flush=True)
    return found


# The page


def page(job: Job, runs: Path, seeds: list[int]) -> str:
    """The table in docs/benchmarks."""
    costs = json.loads((runs / "cost.json").read_text())
    facts = json.loads((runs / "facts.json").read_text())
    rows = {name: [train_result(name, seed, runs) for seed in seeds] for name in job.methods}
    record = {"facts": facts, "costs": costs, "runs": [run for group in rows.values() for run in group]}
    (DOCS / f"{job.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    alone = {seed: record["top1"] for seed, record in zip(seeds, rows["alone"], strict=True)}
    lines = [
        f"# {job.title}",
        "",
        f"Made by `python benchmarks/{job.name}.py accuracy --seeds {' '.join(map(str, seeds))}` on the CPU, "
        f"`... cost` on {facts['device']}, {facts['rounds']} rounds, {facts['beside']} beside it, and `... page`; "
        f"torch {facts['torch']}.",
        "",
        job.text,
        "",
        "| method | top-1, % | minus alone | task weight and losses | teacher | time | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted(rows, key=lambda name: -statistics.mean(record["top1"] for record in rows[name]))
    for name in order:
        method, values = job.methods[name], [record["top1"] for record in rows[name]]
        gains = [value - alone[seed] for value, seed in zip(values, seeds, strict=True)]
        lines.append(
            f"| {name} | {_spread(values)} | {_spread(gains, sign='+')} | {_what(method, runs)} | "
            f"{_teacher(method)} | {costs[name]['time']:.2f} | {costs[name]['memory']:.2f} |"
        )
    return "\n".join([*lines, "", *_notes(job), ""])


def train_result(name: str, seed: int, runs: Path) -> dict[str, Any]:
    return json.loads((folder(runs, name, seed) / "result.json").read_text())


def _spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.2f} +- {deviation:.2f}"


def _what(method: Method, runs: Path) -> str:
    losses = [f"{weight!r}*{_typed(loss)}" for weight, loss in method.losses(runs, 0)]
    task = repr(method.task_weight) if isinstance(method.task_weight, Schedule) else f"{method.task_weight:g}"
    return ", ".join([f"`{task}*task`", *(f"`{text}`" for text in losses)]).replace(str(runs), "RUNS")


def _typed(loss: Loss) -> str:
    """As on the command line: the name, and the options that are not the defaults."""
    if isinstance(loss, Standardized):
        return f"{_typed(loss.loss)},standardize=True"
    schedules = loss.options if isinstance(loss, Scheduled) else {}
    loss = loss.loss if isinstance(loss, Scheduled) else loss
    defaults = {parameter.name: parameter.default for parameter in inspect.signature(type(loss)).parameters.values()}
    plain = loss if loss.name == "mekd" else type(loss)()  # tfkd fills its defaults in, by kind
    options = {name: getattr(loss, name) for name in defaults if getattr(loss, name) != getattr(plain, name)}
    options = {name: value for name, value in (options | schedules).items() if value is not None}
    if loss.name == "mekd":
        options = {"generator": loss.path}
    text = ",".join(f"{name}={value!r}" for name, value in options.items())
    return f"{loss.name}:{text}" if text else loss.name


def _teacher(method: Method) -> str:
    return " + ".join(method.teacher) if isinstance(method.teacher, tuple) else method.teacher or "none"


def _notes(job: Job) -> list[str]:
    return [f"- {name}: {method.note}." for name, method in job.methods.items() if method.note]


def main(job: Job, description: str) -> None:
    """The command line of a script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "cost", "page"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(job.methods), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--beside", default="nothing", help="what else the machine does meanwhile, for the page")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("runs") / job.name)
    arguments = parser.parse_args()
    runs = arguments.output
    runs.mkdir(parents=True, exist_ok=True)
    if arguments.what == "accuracy":
        data = open_data("fashion-mnist-sample")
        for seed in arguments.seeds:
            for name in arguments.only:
                print(train(job, name, seed, runs, data), flush=True)
    elif arguments.what == "cost":
        found = cost(job, runs, arguments.rounds, arguments.batch_size)
        (runs / "cost.json").write_text(json.dumps(found, indent=2) + "\n")
        facts = {"device": device_name(torch.device("cpu")), "torch": torch.__version__}
        facts |= {"rounds": arguments.rounds, "beside": arguments.beside}
        (runs / "facts.json").write_text(json.dumps(facts) + "\n")
    else:
        text = page(job, runs, arguments.seeds)
        (DOCS / f"{job.name}.md").write_text(text)
        print(text)
