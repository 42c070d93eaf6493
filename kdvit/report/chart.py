"""Charts as inline SVG: lines, stacked shares, a matrix. Colours come from the page's style, so they follow its theme.

Every chart is drawn 540 units wide, for a place of about as many pixels: text keeps its size.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from kdvit.report.scale import Format, log_ticks, nice_ticks, short, tick_format

WIDTH, HEIGHT = 540, 250
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 10, 28
#: Points of a curve at most; of a longer one the means of equal stretches are drawn.
MAX_POINTS = 240
#: Places along a chart that answer to the mouse, at most.
MAX_HITS = 80
#: Curves of up to so many points show each of them.
MAX_MARKERS = 30

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        name: for the legend and the titles.
        points: (x, y), x ascending, all finite.
        style: class of the style sheet: ``c0`` ... ``c7``, ``baseline`` or ``reference``.
    """

    name: str
    points: Points
    style: str = "c0"


def line_chart(series: Sequence[Series], label: str, *, format: Format = short, log: bool | None = None) -> Markup:
    """Curves over steps.

    Args:
        series: at least one point among them; a ``reference`` is drawn across, at the y of its first point.
        label: what it shows, for those who cannot see it.
        format: of y in the titles.
        log: a logarithmic y axis; None: where the values span a factor of 50 or more.
    """
    series = [Series(one.name, thinned(one.points), one.style) for one in series if one.points]
    values = [y for one in series for _, y in one.points]
    if log is None:
        log = min(values) > 0 and max(values) / min(values) >= 50
    ticks = log_ticks(min(values), max(values)) if log else nice_ticks(min(values), max(values))
    to_y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, math.log if log else float)
    curves = [one for one in series if one.style != "reference"] or series
    to_x, axis = _x_axis([x for one in curves for x, _ in one.points])
    parts = [_y_axis(ticks, to_y), axis]
    for one in series:
        if one.style == "reference":
            across = to_y(one.points[0][1])
            parts.append(_tag("line", cls="reference", x1=LEFT, x2=WIDTH - RIGHT, y1=across, y2=across))
            continue
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in one.points)
        parts.append(_tag("polyline", cls=f"line {one.style}", points=path))
        if len(one.points) <= MAX_MARKERS:
            parts += [_tag("circle", cls=f"dot {one.style}", cx=to_x(x), cy=to_y(y), r=2.6) for x, y in one.points]
    parts.append(_hits(series, to_x, format))
    return _svg(parts, label)


def area_chart(series: Sequence[Series], label: str, *, format: Format = short) -> Markup:
    """Shares that sum to 1, stacked in their order from the bottom; a series without a point somewhere is 0 there."""
    steps = sorted({x for one in series for x, _ in one.points})
    tables = [dict(one.points) for one in series]
    filled = [
        Series(one.name, thinned([(x, table.get(x, 0.0)) for x in steps]), one.style)
        for one, table in zip(series, tables, strict=True)
    ]
    to_x, axis = _x_axis(steps)
    to_y = _scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    below = [0.0] * len(filled[0].points)
    areas = []
    for one in filled:
        above = [min(1.0, base + y) for base, (_, y) in zip(below, one.points, strict=True)]
        xs = [to_x(x) for x, _ in one.points]
        if len(xs) == 1:  # a single measurement: a block across
            xs, below, above = [LEFT, WIDTH - RIGHT], below * 2, above * 2
        edge = [*zip(xs, above, strict=True), *reversed([*zip(xs, below, strict=True)])]
        areas.append(
            _tag("polygon", cls=f"area {one.style}", points=" ".join(f"{x:.1f},{to_y(y):.1f}" for x, y in edge))
        )
        below = above[: len(one.points)]
    ticks = _y_axis([0.0, 0.25, 0.5, 0.75, 1.0], to_y, lambda share: f"{100 * share:.0f} %")
    return _svg([ticks, *areas, axis, _hits(filled, to_x, format)], label)


def matrix_chart(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str, *, style: str, full: float = 1.0
) -> Markup:
    """A heat map with its numbers: colour is strongest at ``full``; NaN is an empty field."""
    cell, row, side, top = min(76.0, (WIDTH - 92) / len(columns)), 36.0, 84, 28
    room = round(cell / 7), round(side / 7)  # letters that fit
    parts = [
        _tag("text", _fitting(name, room[0]), cls="head", x=side + cell * (index + 0.5), y=18)
        for index, name in enumerate(columns)
    ]
    for r, name in enumerate(rows):
        y = top + row * r
        parts.append(_tag("text", _fitting(name, room[1]), cls="side", x=side - 10, y=y + 22))
        for c, column in enumerate(columns):
            value = float(values[r, c])
            share = max(0.0, min(1.0, value / full)) if math.isfinite(value) and full else 0.0
            number = f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "–"
            box = dict(x=side + cell * c + 1, y=y + 1, width=cell - 2, height=row - 2, rx=4)
            parts.append(
                Markup("<g><title>{}</title>{}{}{}</g>").format(
                    f"student {name} · teacher {column}: {number}",
                    _tag("rect", cls="bed", **box),
                    _tag("rect", cls=style, fill_opacity=f"{0.06 + 0.94 * share:.3f}", **box),
                    _tag(
                        "text",
                        number,
                        cls="cell strong" if share > 0.78 else "cell",
                        x=side + cell * (c + 0.5),
                        y=y + 22,
                    ),
                )
            )
    return _svg(parts, label, height=top + row * len(rows) + 4)


def _fitting(name: str, room: int) -> str:
    """The end of a module path says more than its beginning."""
    return name if len(name) <= room else f"…{name[1 - room :]}"


def thinned(points: Points) -> Points:
    """At most `MAX_POINTS` points: means over stretches of equally many."""
    if len(points) <= MAX_POINTS:
        return points
    cuts = [round(index * len(points) / MAX_POINTS) for index in range(MAX_POINTS + 1)]
    stretches = [points[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    return [tuple(sum(values) / len(part) for values in zip(*part, strict=True)) for part in stretches]


def _scale(low: float, high: float, start: float, end: float, warp: Format = float) -> Callable[[float], float]:
    first, span = warp(low), warp(high) - warp(low)
    return lambda value: start + (warp(value) - first) / span * (end - start) if span else (start + end) / 2


def _y_axis(ticks: Sequence[float], to_y: Callable[[float], float], format: Format | None = None) -> Markup:
    format = format or tick_format(ticks)
    lines = [_tag("line", cls="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=to_y(tick), y2=to_y(tick)) for tick in ticks]
    texts = [_tag("text", format(tick), cls="y", x=LEFT - 8, y=to_y(tick) + 4) for tick in ticks]
    return Markup("").join([*lines, *texts])


def _x_axis(steps: Sequence[float]) -> tuple[Callable[[float], float], Markup]:
    low, high = min(steps), max(steps)
    to_x = _scale(low, high, LEFT, WIDTH - RIGHT)
    ticks = [low] if low == high else [tick for tick in nice_ticks(low, high, 6) if low <= tick <= high]
    # There is no half a step, and the axis's name stands at its end.
    room = [tick for tick in ticks if tick == round(tick) and to_x(tick) < WIDTH - RIGHT - 48]
    texts = [_tag("text", short(tick), cls="x", x=to_x(tick), y=HEIGHT - BOTTOM + 18) for tick in room]
    name = _tag("text", "step", cls="axis", x=WIDTH - RIGHT, y=HEIGHT - BOTTOM + 18)
    return to_x, Markup("").join([*texts, name])


def _hits(series: Sequence[Series], to_x: Callable[[float], float], format: Format) -> Markup:
    """Strips that show a line and the values at their step where the mouse is."""
    curves = [one for one in series if one.style != "reference"]
    steps = sorted({x for one in curves for x, _ in one.points})
    steps = steps[:: math.ceil(len(steps) / MAX_HITS)]
    columns = [[x for x, _ in one.points] for one in curves]
    edges = [LEFT, *((to_x(a) + to_x(b)) / 2 for a, b in zip(steps, steps[1:], strict=False)), WIDTH - RIGHT]
    strips = []
    for step, left, right in zip(steps, edges, edges[1:], strict=False):
        rows = [f"step {step:,.0f}"]
        for one, column in zip(curves, columns, strict=True):
            place = min(bisect_left(column, step), len(column) - 1)
            rows.append(f"{one.name}: {format(one.points[place][1])}")
        rows += [f"{one.name}: {format(one.points[0][1])}" for one in series if one.style == "reference"]
        strips.append(
            Markup('<g class="hit">{}{}<title>{}</title></g>').format(
                _tag("rect", x=left, y=TOP, width=max(0.0, right - left), height=HEIGHT - BOTTOM - TOP),
                _tag("line", x1=to_x(step), x2=to_x(step), y1=TOP, y2=HEIGHT - BOTTOM),
                "\n".join(rows),
            )
        )
    return Markup("").join(strips)


def _tag(name: str, text: str | None = None, cls: str = "", **attributes: object) -> Markup:
    values = {"class": cls or None, **{key.replace("_", "-"): value for key, value in attributes.items()}}
    written = Markup("").join(
        Markup(' {}="{}"').format(key, f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value)
        for key, value in values.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, text or "")


def _svg(parts: Sequence[Markup], label: str, height: float = HEIGHT) -> Markup:
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, label, Markup("").join(parts)
    )
