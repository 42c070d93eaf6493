"""Round numbers for axes, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Format = Callable[[float], str]


def short(value: float) -> str:
    """A number in about three digits: 0.123, 12.3, 1,230, 45.6k, 2e-4.

    Example:
        >>> [short(value) for value in (0, 0.12345, 84.3, 1234, 45678, 0.000625, -1.5, 2.5e6)]
        ['0', '0.123', '84.3', '1,234', '45.7k', '6.25e-4', '−1.5', '2.5M']
    """
    size, sign = abs(value), "−" if value < 0 else ""
    if size == 0:
        return "0"
    if size < 2e-3:  # so that the ticks of a learning rate are written alike
        digits, exponent = f"{size:.2e}".split("e")
        return f"{sign}{digits.rstrip('0').removesuffix('.')}e{int(exponent)}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{sign}{size / (1e3 if letter == 'k' else unit):.3g}{letter}"
    return f"{sign}{size:,.0f}" if size >= 100 else f"{sign}{size:.3g}"


def percent(value: float) -> str:
    return f"{value:.2f} %".replace("-", "−")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that enclose [low, high].

    Example:
        >>> nice_ticks(0.3, 9.2)
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    if low == high:
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose [low, high] on a logarithmic axis: powers of ten, with 2 and 5 where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first > 2:
        stride = math.ceil((last - first) / 6)
        return [10.0**power for power in range(first, last + stride, stride)]
    candidates = [digit * 10.0**power for power in range(first - 1, last + 1) for digit in (1, 2, 5)]
    below, above = max(c for c in candidates if c <= low * 1.001), min(c for c in candidates if c >= high * 0.999)
    return [round(c, 15) for c in candidates if below <= c <= above]


def tick_format(ticks: Sequence[float]) -> Format:
    """Evenly spaced ticks of a usual size with equally many decimals: 0.30, 0.32, not 0.3, 0.32."""
    gap, largest = ticks[1] - ticks[0], max(map(abs, ticks))
    even = all(math.isclose(b - a, gap, rel_tol=1e-6) for a, b in zip(ticks, ticks[1:], strict=False))
    decimals = next((n for n in range(4) if all(math.isclose(t, round(t, n), abs_tol=gap / 1e6) for t in ticks)), None)
    if not even or decimals is None or largest >= 1e4:
        return short
    return lambda tick: f"{tick:,.{decimals}f}".replace("-", "−")
