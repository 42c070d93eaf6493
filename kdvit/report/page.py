"""The report of a run, or of several: what stands on the page, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdvit import __version__
from kdvit.files import whole_file
from kdvit.report.chart import Points, Series, area_chart, line_chart, matrix_chart
from kdvit.report.run import Run, read_runs
from kdvit.report.samples import samples_of
from kdvit.report.scale import Format, percent, short

NUM_COLOURS = 8


@dataclass(frozen=True)
class Card:
    """A chart with its title, its legend of (name, value, style) and a line of explanation."""

    title: str
    chart: Markup | None
    legend: Sequence[tuple[str, str, str]] = ()
    note: str = ""
    empty: str = ""


@dataclass(frozen=True)
class Tile:
    """A big number."""

    name: str
    value: str
    note: str = ""
    tone: str = ""


def write_report(runs: Sequence[str | Path], output: str | Path, *, baseline: str | Path | None = None) -> Path:
    """Write one HTML file about run folders, that loads nothing else: it opens offline and can be sent by mail.

    Args:
        runs: run folders. The first is the subject; the others are drawn beside it.
        output: the file; its folder is made if missing.
        baseline: the run folder that the subject is measured against, such as the same student trained alone. It may
            be one of ``runs``.

    Returns:
        ``output`` as a path.

    Raises:
        ValueError: a folder holds no run, a run is named twice, or ``output`` cannot be written.
    """
    if not runs:
        raise ValueError("report: runs must name a run folder, got none; give the --output of a training run.")
    paths, measure = [Path(path) for path in runs], None
    if baseline is not None:
        measure = Path(baseline)
        same = [index for index, path in enumerate(paths) if path.resolve() == measure.resolve()]
        if same == [0]:
            raise ValueError(
                f"report: baseline must be another run than the first, got '{baseline}' for both; name the run that it "
                "is measured against."
            )
        paths = [path for index, path in enumerate(paths) if index not in same] + [measure]
    found = read_runs(paths)
    text = render(found[: len(found) - (measure is not None)], found[-1] if measure is not None else None)
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = f"report: '{output}' cannot be written ({error.strerror}); choose another --output."
        raise ValueError(reason) from error
    return output


def render(runs: Sequence[Run], baseline: Run | None = None) -> str:
    """The page as text."""
    subject = runs[0]
    styled = [(run, f"c{index % NUM_COLOURS}") for index, run in enumerate(runs)]
    styled += [(baseline, "baseline")] if baseline else []
    environment = Environment(
        loader=PackageLoader("kdvit.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "short": short, "plain": plain, "place": place}
    style = Markup(environment.get_template("page.css").render())
    return environment.get_template("page.html").render(
        style=style,
        subject=subject,
        baseline=baseline,
        styled=styled,
        lead=_lead(subject),
        tiles=_tiles(subject, baseline),
        warnings=_warnings(subject, baseline, styled),
        course=[_accuracy(styled, subject), _total(styled), _gradient_share(subject), _gradient_cosine(subject)],
        losses=_losses(styled),
        pace=[_learning_rate(styled), _throughput(styled)],
        insight=subject.insight,
        samples=samples_of(subject.insight) if subject.insight else [],
        matrices=_matrices(subject),
        terms=_terms(subject),
        settings=_settings([run for run, _ in styled]),
        machine=_machine(subject),
        version=__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def plain(value: Any) -> str:
    """A setting as people write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    return str(value)


def place(layer: str) -> str:
    """A layer's place in its model, short enough for the head of a column.

    Example:
        >>> [place(layer) for layer in ("blocks.3.attn", "layer1", "dinov2_with_registers.encoder.layer.1.attention")]
        ['blocks.3', 'layer1', 'layer.1']
    """
    return ".".join(layer.removesuffix(".attn").removesuffix(".attention").split(".")[-2:])


# The head


def _lead(run: Run) -> str:
    """Who taught whom, on what, for how long, in a sentence."""
    facts, settings = run.facts, run.settings
    if not facts:
        return "What was trained is not known: run.json is missing or damaged."
    student, teacher = facts.get("student", "the student"), facts.get("teacher")
    name, _, count = str(facts.get("data", "unknown data")).removesuffix(" images").rpartition(", ")
    data = f"{name} ({int(count):,} training images)" if count.isdecimal() else facts.get("data", "unknown data")
    doing = f"{student} learned from {teacher}" if teacher else f"{student} was trained without a teacher"
    unit = next((unit for unit in ("epochs", "steps") if settings.get(unit)), None)
    length = f"for {settings[unit]} {unit if settings[unit] != 1 else unit[:-1]}" if unit else "for an unknown time"
    return f"{doing} on {data} {length}."


def _tiles(run: Run, baseline: Run | None) -> list[Tile]:
    mine, teacher, other = run.top1, run.teacher_top1, baseline.top1 if baseline else None
    result = run.result
    note = "top-1 on the test images"
    best, epoch = result.get("best_top1"), result.get("best_epoch")
    if None not in (best, epoch, mine) and best > mine:
        note = f"top-1; best {best:.2f} % at epoch {epoch:.0f}"
    tiles = [Tile("Student", percent(mine) if mine is not None else "–", note if mine is not None else "no accuracy")]
    if teacher is not None:
        tiles.append(Tile("Teacher", percent(teacher), _difference(mine, teacher, "the student is"), "muted"))
    if other is not None:
        tiles.append(Tile("Baseline", percent(other), _difference(mine, other, "the student is"), "muted"))
    if None not in (mine, teacher, other) and teacher > other:
        closed = 100 * (mine - other) / (teacher - other)
        tiles.append(Tile("Gap closed", f"{closed:.0f} %".replace("-", "−"), "of the way from baseline to teacher"))
    if result.get("seconds") is not None:
        speed = [value for _, value in run.speeds]
        note = f"{short(float(np.median(speed)))} images a second" if speed else ""
        tiles.append(Tile("Time", duration(result["seconds"]), note))
    return tiles


def _difference(mine: float | None, other: float, subject: str) -> str:
    if mine is None:
        return ""
    points = mine - other
    return f"{subject} {abs(points):.2f} points {'above' if points >= 0 else 'below'}"


def duration(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> [duration(seconds) for seconds in (7.4, 75, 3725, 190000)]
        ['7 s', '1 min 15 s', '1 h 2 min', '2 d 4 h']
    """
    whole = round(seconds)
    for unit, size, part, parts in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // parts} {part}"
    return f"{whole} s"


def _warnings(run: Run, baseline: Run | None, styled: Sequence[tuple[Run, str]]) -> list[str]:
    several = len(styled) > 1
    found = [f"{each.name}: {note}" if several else note for each, _ in styled for note in each.notes]
    mine, teacher = run.top1, run.teacher_top1
    if mine is not None and teacher is not None and teacher < mine:
        found.append(
            f"The teacher ({percent(teacher)}) is worse than the student ({percent(mine)}): check its normalisation, "
            "image size and classes, or take a better one."
        )
    if baseline is not None:
        if mine is not None and baseline.top1 is not None and mine < baseline.top1:
            found.append(
                f"The student is {baseline.top1 - mine:.2f} points below the baseline '{baseline.name}': "
                "distillation did not help here. One seed says little; `kdvit compare` trains several."
            )
        differing = [
            f"{name} {plain(run.settings.get(name))} against {plain(baseline.settings.get(name))}"
            for name in ("epochs", "steps", "batch_size", "accumulation_steps", "optimizer", "lr")
            if run.settings and baseline.settings and run.settings.get(name) != baseline.settings.get(name)
        ]
        differing += [
            f"{name} '{run.facts[name]}' against '{baseline.facts[name]}'"
            for name in ("student", "data")
            if name in run.facts and name in baseline.facts and run.facts[name] != baseline.facts[name]
        ]
        if differing:
            found.append(f"The baseline is not trained alike: {'; '.join(differing)}.")
    if run.insight is None and not any("insight/" in note for note in run.notes):
        found.append("No insight/ folder: the maps of both models and the distance of their layers are not shown.")
    return found


# The charts


def _legend(series: Sequence[Series], format: Any) -> list[tuple[str, str, str]]:
    return [(one.name, format(one.points[-1][1]), one.style) for one in series]


def _card(
    title: str,
    styled: Sequence[tuple[Run, str]],
    points: Callable[[Run], Points],
    *,
    across: Sequence[Series] = (),
    format: Format = short,
    empty: str = "Nothing was recorded.",
    **options: Any,
) -> Card:
    """A curve for each run that has one; the subject is drawn last, on top."""
    series = [Series(run.name, points(run), style) for run, style in styled]
    series = [one for one in series if one.points]
    if not series:
        return Card(title, None, empty=empty)
    series += across
    legend = _legend(series, format)
    if len(styled) == len(legend) == 1:  # one run: its name is the page's
        legend = [("last", *legend[0][1:])]
    return Card(title, line_chart([*reversed(series)], title, format=format, **options), legend)


def _accuracy(styled: Sequence[tuple[Run, str]], subject: Run) -> Card:
    teacher, empty = subject.teacher_top1, "No accuracy: nothing was evaluated, or no classifier was trained."
    across = [Series("teacher", [(0.0, teacher)], "reference")] if teacher is not None else []
    return _card(
        "Accuracy on the test images",
        styled,
        lambda run: run.series("top1", run.evaluations),
        across=across,
        format=percent,
        empty=empty,
        log=False,
    )


def _gradient_share(run: Run) -> Card | None:
    """Where there is more than one term; the strongest have a colour each, and the others one together."""
    title, strongest, series = "Gradient share of each loss", _strongest(run), []
    others: dict[float, float] = {}
    for name in run.names("gradient_share"):
        points = run.series(name, inside="gradient_share")
        if name in strongest:
            series.append(Series(name, points, strongest[name]))
        else:
            others |= {step: others.get(step, 0.0) + share for step, share in points}
    num_others = len(run.names("gradient_share")) - len(strongest)
    series = [
        one
        for one in [*series, Series(f"{num_others} other{'s'[: num_others > 1]}", [*others.items()], "others")]
        if one.points
    ]
    if not series:
        return Card(title, None, empty="Not recorded: train with gradient_share_steps.")
    if len(series) == 1:
        return None
    note = "How hard each weighted loss pulls at the student: the norm of its gradient, as a share of their sum."
    return Card(title, area_chart(series, title, format=_share), _legend(series, _share), note)


def _strongest(run: Run) -> dict[str, str]:
    """Term -> its colour: all, or the task loss and those of the largest shares, as many as there are colours."""
    names = run.names("gradient_share")
    sums = {name: sum(share for _, share in run.series(name, inside="gradient_share")) for name in names}
    kept = sorted(names, key=lambda name: (name != "task", -sums[name]))[:NUM_COLOURS]
    return {name: f"c{index}" for index, name in enumerate(name for name in names if name in kept)}


def _share(value: float) -> str:
    return "< 0.1 %" if 0 < value < 0.001 else f"{100 * value:.1f} %"


def _gradient_cosine(run: Run) -> Card | None:
    """Where there is a task loss and another one: of the strongest."""
    strongest = _strongest(run).items()
    series = [Series(name, run.series(name, inside="gradient_cosine"), style) for name, style in strongest]
    series = [one for one in series if one.points]
    if not series:
        return None
    note = "Cosine to the gradient of the task loss: 1 pulls the same way, 0 across, below 0 against the labels."
    title = "Direction of each loss"
    return Card(title, line_chart(series, title, log=False), _legend(series, short), note)


def _total(styled: Sequence[tuple[Run, str]]) -> Card | None:
    card = _card("Weighted sum of the losses", styled, lambda run: run.series("loss"))
    return card if card.chart else None


def _losses(styled: Sequence[tuple[Run, str]]) -> list[Card]:
    return [
        _card(name, styled, lambda run, name=name: run.series(name, inside="losses"))
        for name in dict.fromkeys(name for run, _ in styled for name in run.names("losses"))
    ]


def _learning_rate(styled: Sequence[tuple[Run, str]]) -> Card:
    return _card("Learning rate", styled, lambda run: run.series("lr"), log=False)


def _throughput(styled: Sequence[tuple[Run, str]]) -> Card:
    return _card("Images a second", styled, lambda run: run.speeds, log=False)


def _matrices(run: Run) -> list[Card]:
    similarity = run.insight.facts["similarity"] if run.insight else None
    if not similarity or similarity["note"]:
        return []
    rows, columns = similarity["student_layers"], similarity["teacher_layers"]
    cka, distance = (run.insight.tensors[name] for name in ("cka", "relation_distance"))
    known = distance[np.isfinite(distance)]
    full = float(known.max()) if known.size else 1.0
    return [
        Card(
            "Similarity of the layers (CKA)",
            matrix_chart(cka, rows, columns, "CKA of student and teacher layers", style="alike"),
            note=f"1: both layers tell the same images apart. Over {similarity['num_images']} test images.",
        ),
        Card(
            "Relation distance of the layers",
            matrix_chart(
                distance, rows, columns, "relation distance of student and teacher layers", style="apart", full=full
            ),
            note="0: both layers relate the places of an image in the same way.",
        ),
    ]


# The tables


def _terms(run: Run) -> list[tuple[str, str, str]]:
    """(name, weight, loss) of everything that was minimised."""
    weights, losses = run.facts.get("weights") or {}, run.facts.get("losses") or {}
    measured = run.names("losses")
    return [
        (name, plain(weight), str(losses.get(name, "cross-entropy with the labels")))
        for name, weight in weights.items()
        if name in losses or not measured or name in measured
    ]


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(name, the value in each run, whether they differ)."""
    tables = []
    for run in runs:
        facts = {
            name: run.facts.get(name)
            for name in ("student", "teacher", "data", "trained_images", "num_processes", "device", "commit")
            if name in run.facts
        }
        transform = {f"transform.{name}": value for name, value in (run.facts.get("transform") or {}).items()}
        tables.append({**facts, **run.settings, **transform})
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = [(name, [plain(table.get(name)) for table in tables]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def _machine(run: Run) -> list[tuple[str, str]]:
    facts = run.facts
    versions = facts.get("versions") or {}
    command = facts.get("command")
    rows = [
        ("device", facts.get("device")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("python", facts.get("python")),
        ("commit", facts.get("commit")),
        ("command", " ".join(map(str, command)) if isinstance(command, list) else command),
        ("run.json written", facts.get("written")),
    ]
    return [(name, str(value)) for name, value in rows if value]
