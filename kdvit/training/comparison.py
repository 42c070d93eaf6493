"""A student alone and distilled at the equal budget, over several seeds: what distillation really changes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdvit.cache.teacher import StoredTeacher
from kdvit.data import ImageData, TransformSettings
from kdvit.distiller import Distiller
from kdvit.files import write_whole
from kdvit.taps.family import logits_of
from kdvit.training.fidelity import FIGURES, Fidelity, Predict, fidelity, teacher_prediction
from kdvit.training.settings import Training
from kdvit.training.trainer import Result, Trainer

#: Classes that the table shows: those that the distilled student is worst at, beside its teacher.
_NUM_CLASSES = 3
#: What a run.json says of the machine and the versions.
_FACTS = ("written", "command", "python", "versions", "commit", "device")


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and the standard deviation (n - 1), None for a single seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 2, sign: str = "") -> str:
        """``81.85 +- 0.31``, or without a deviation ``81.85``; ``sign="+"`` shows the sign of a difference."""
        deviation = "" if self.deviation is None else f" +- {self.deviation:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{deviation}"


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        name: of the figure, one of `FIGURES` or ``class <name>``.
        title: the figure and its unit, in words.
        alone: of the student without a teacher.
        distilled: of the distilled student.
        difference: distilled minus alone of the same seed.
        teacher: of the teacher; None where it has no such figure.
        digits: to show.
    """

    name: str
    title: str
    alone: Spread
    distilled: Spread
    difference: Spread
    teacher: float | None
    digits: int

    def cells(self) -> tuple[str, str, str, str, str]:
        """As text, one for each column."""
        teacher = "" if self.teacher is None else f"{self.teacher:.{self.digits}f}"
        spreads = self.alone.text(self.digits), self.distilled.text(self.digits), self.difference.text(self.digits, "+")
        return (self.title, *spreads, teacher)


@dataclass(frozen=True)
class Run:
    """One training run, what its student is worth, and how many images it was trained on."""

    result: Result
    fidelity: Fidelity
    trained_images: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        seeds: one for each pair of runs.
        classes: names of the classes.
        alone: a run for each seed, without a teacher.
        distilled: a run for each seed, with it.
    """

    seeds: tuple[int, ...]
    classes: tuple[str, ...]
    alone: tuple[Run, ...]
    distilled: tuple[Run, ...]

    columns = ("", "alone", "distilled", "difference", "teacher")

    def lines(self) -> list[Line]:
        """Every figure, then the classes that the distilled student is worst at."""
        alone, distilled = ([run.fidelity for run in runs] for runs in (self.alone, self.distilled))
        teacher = distilled[0].teacher
        taught = {} if teacher is None else teacher.figures()
        lines = [
            _line(
                name, *figure, *([f.figures()[name] for f in group] for group in (alone, distilled)), taught.get(name)
            )
            for name, figure in FIGURES.items()
            if distilled[0].figures()[name] is not None
        ]
        for index in self._worst_classes():
            name = f"class {self.classes[index]}"
            values = ([f.class_accuracy[index] for f in group] for group in (alone, distilled))
            lines.append(_line(name, f"{name}, %", 2, *values, teacher and teacher.class_accuracy[index]))
        return lines

    def _worst_classes(self) -> list[int]:
        gaps: dict[int, float] = {}
        for run in self.distilled:
            ours = run.fidelity
            for index in ours.worst_classes(len(self.classes)):
                theirs = ours.teacher.class_accuracy[index] if ours.teacher is not None else 0.0
                gaps[index] = gaps.get(index, 0.0) + ours.class_accuracy[index] - theirs
        return sorted(gaps, key=gaps.get)[:_NUM_CLASSES]

    def verdict(self) -> str:
        """What may be said of the change in top-1, and what not."""
        difference = next(line.difference for line in self.lines() if line.name == "top1")
        changed = f"Distillation changed top-1 by {difference.text(sign='+')} points"
        if difference.deviation is None:
            return f"{changed} with one seed, which shows no spread: it may be chance. Compare with more seeds."
        changed = f"{changed} over {len(self.seeds)} seeds"
        if abs(difference.mean) <= difference.deviation:
            return f"{changed}: no more than this difference varies from seed to seed, so no effect is shown."
        return f"{changed}: more than this difference varies from seed to seed."

    def note(self) -> str:
        """How the numbers are to be read."""
        num_images = self.distilled[0].fidelity.accuracy.num_images
        several = "Mean +- standard deviation (n - 1) over the seeds, differences seed by seed. "
        alone, distilled = self.alone[0].trained_images, self.distilled[0].trained_images
        fewer = f" But a loss holds images out: {alone:,} train the student alone, {distilled:,} the distilled one."
        return (
            f"{several if len(self.seeds) > 1 else ''}The same {num_images:,} test images for all, after the last "
            "epoch. Equal for both: epochs or steps, data, transform, settings, first weights."
            f"{fewer if alone != distilled else ''} Cross-entropy and KL are in nats; agreement and KL are with the "
            "teacher; below the figures are the classes that the distilled student is worst at, beside the teacher."
        )


def compare(
    make_distiller: Callable[[int, bool], Distiller],
    data: ImageData,
    settings: Training,
    seeds: Sequence[int],
    folder: str | Path,
    *,
    transform: TransformSettings | None = None,
    quiet: bool = False,
) -> Comparison:
    """Train a student alone and distilled with each seed, at equal settings, and measure both.

    Leaves run folders FOLDER/alone/seed0, FOLDER/distilled/seed0, ... (see `RunFolder`), comparison.json and
    comparison.md. Called again after a stop, it goes on where it was; a finished run is not trained again.

    Agreement and KL are those with the first teacher, also of the student that was trained without it; they are left
    out where it predicts no classes or others, and where it is stored and cannot run. A loss that holds images out of
    training (`Training.held_out_ratio`) costs the distilled student these images.

    Args:
        make_distiller: (seed, distilled) -> a new `Distiller`, whose student has the same weights for a seed in both
            cases; with ``distilled=False`` without teacher and losses: ``Distiller(None, student, losses=[])``.
        data: from `kdvit.data.open_data`.
        settings: of every run; its seed is replaced by each of ``seeds``.
        seeds: different whole numbers.
        folder: where the runs are.
        transform: as for `Trainer`.
        quiet: show nothing.

    Raises:
        ValueError: seeds are missing or doubled, the students of a seed differ, the losses train no classifier, or a
            stored teacher was made with another seed.
    """
    seeds, folder = _checked(seeds), Path(folder)
    alone, distilled = [], []
    for seed in seeds:
        pair = {name: make_distiller(seed, name == "distilled") for name in ("alone", "distilled")}
        _check_pair(seed, **pair)
        if seed == seeds[0] and _stored(pair["distilled"]):
            _check_stored(seeds, make_distiller)
        # Both before either is trained: what does not fit fails now.
        trainers = {
            name: Trainer(
                distiller,
                data,
                replace(settings, seed=seed),
                folder / name / f"seed{seed}",
                transform=transform,
                resume=True,
                title=f"{name}, seed {seed}",
                quiet=quiet,
            )
            for name, distiller in pair.items()
        }
        results = {name: trainer.fit() for name, trainer in trainers.items()}
        teacher = teacher_prediction(pair["distilled"].teacher, trainers["distilled"].test_loader, len(data.classes))
        for name, runs in (("alone", alone), ("distilled", distilled)):
            trained = len(trainers[name].train_loader.dataset)
            runs.append(Run(results[name], _fidelity(trainers[name], teacher), trained))
    comparison = Comparison(seeds, tuple(data.classes), tuple(alone), tuple(distilled))
    accelerator = trainers["distilled"].accelerator
    if accelerator.is_main_process:
        _write(comparison, folder)
    accelerator.wait_for_everyone()
    return comparison


def _stored(distiller: Distiller) -> list[StoredTeacher]:
    return [teacher for teacher in distiller.teachers if isinstance(teacher, StoredTeacher)]


def _check_stored(seeds: Sequence[int], make_distiller: Callable[[int, bool], Distiller]) -> None:
    """What is stored was seen with the augmentation of one seed: said before the first of several is trained."""
    for seed in seeds:
        for teacher in _stored(make_distiller(seed, True)):
            made = teacher.manifest.fingerprint["job"]["seed"]
            if made != seed:
                raise ValueError(
                    f"compare: a stored teacher must be made with the seed of its run, got '{teacher.folder}' of seed "
                    f"{made} for seed {seed}; compare with that seed alone, or with a teacher that is not stored."
                )


def _checked(seeds: Sequence[int]) -> tuple[int, ...]:
    seeds = tuple(seeds)
    if any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f"compare: seeds must be whole numbers >= 0, got {seeds}; give some, such as 0 1 2.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"compare: seeds must be one or more different whole numbers, got {seeds}; list each once.")
    return seeds


def _check_pair(seed: int, alone: Distiller, distilled: Distiller) -> None:
    ours, theirs = (distiller.student.model.state_dict() for distiller in (alone, distilled))
    same = ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    if not same or alone.student.model is distilled.student.model:
        raise ValueError(
            f"compare: both students of seed {seed} must be new ones with the same weights, and they are not; call "
            "torch.manual_seed(seed) right before make_distiller makes the student."
        )
    if alone.teachers:
        raise ValueError(
            f"compare: the student alone must have no teacher, got '{alone.teacher.name}'; let make_distiller(seed, "
            "False) return Distiller(None, student, losses=[])."
        )
    if not distilled.trains_classifier:
        raise ValueError(
            "compare: the losses must train the student's classifier, or its accuracy means nothing; keep the task "
            "loss, or add a loss that reads the student's logits, such as kd."
        )


def _fidelity(trainer: Trainer, teacher: Predict | None) -> Fidelity:
    model, name = trainer.student, trainer.plain.student.name
    was_training = model.training
    model.eval()
    with trainer.accelerator.autocast():
        found = fidelity(
            lambda images: logits_of(model(images), name),
            teacher,
            trainer.test_loader,
            len(trainer.data.classes),
            trainer.accelerator,
        )
    model.train(was_training)
    return found


def _line(
    name: str, title: str, digits: int, alone: Sequence[float], distilled: Sequence[float], teacher: float | None
) -> Line:
    differences = [ours - base for ours, base in zip(distilled, alone, strict=True)]
    return Line(name, title, Spread.of(alone), Spread.of(distilled), Spread.of(differences), teacher, digits)


def _write(comparison: Comparison, folder: Path) -> None:
    last = json.loads((comparison.distilled[-1].result.folder / "run.json").read_text())
    facts = {name: last[name] for name in _FACTS}
    record = {
        **facts,
        "seeds": comparison.seeds,
        "data": last["data"],
        "teacher": last["teacher"],
        "student": last["student"],
        "losses": last["losses"],
        "settings": {**last["settings"], "seed": None},
        "classes": comparison.classes,
        "verdict": comparison.verdict(),
        "figures": [asdict(line) for line in comparison.lines()],
        "runs": {
            name: [_plain(*pair, folder) for pair in zip(comparison.seeds, runs, strict=True)]
            for name, runs in (("alone", comparison.alone), ("distilled", comparison.distilled))
        },
    }
    write_whole(folder / "comparison.json", json.dumps(record, indent=1) + "\n")
    write_whole(folder / "comparison.md", "\n".join(_page(comparison, facts, last)) + "\n")


def _plain(seed: int, run: Run, folder: Path) -> dict[str, Any]:
    result = {**asdict(run.result), "folder": run.result.folder.relative_to(folder).as_posix()}
    return {"seed": seed, **result, "trained_images": run.trained_images, "fidelity": asdict(run.fidelity)}


def _page(comparison: Comparison, facts: dict[str, Any], last: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield f"# {last['student']}: alone and distilled"
    yield ""
    yield comparison.verdict()
    yield ""
    yield from _rows(comparison.columns, [line.cells() for line in comparison.lines()])
    yield ""
    yield comparison.note()
    yield ""
    yield f"- command: `{shlex.join(facts['command'])}`"
    yield f"- seeds: {', '.join(map(str, comparison.seeds))}"
    yield f"- data: {last['data']}; teacher: {last['teacher'] or 'none'}"
    yield f"- device: {facts['device']}; Python {facts['python']}, {versions}; commit {facts['commit'] or 'unknown'}"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown, aligned for readers of the text."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            yield f"|{'|'.join(['-' * (widths[0] + 2), *('-' * (width + 1) + ':' for width in widths[1:])])}|"
