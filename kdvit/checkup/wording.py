"""Lists, sizes and times in the words of a finding."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[str], limit: int = 3) -> str:
    """``a, b, c and 4 more``."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def counted(number: int, word: str) -> str:
    """``1 error``, ``2 errors``."""
    return f"{number:,} {word}{'s' if number != 1 else ''}"


def mib(num_bytes: float) -> str:
    """1572864 -> ``1.5 MiB``."""
    size = num_bytes / 2**20
    return f"{size:,.0f} MiB" if size >= 10 else f"{size:.1f} MiB"


def duration(seconds: float) -> str:
    """90 -> ``1.5 min``; two figures: it is an estimate.

    Example:
        >>> [duration(seconds) for seconds in (0.123, 42, 90, 7200, 200_000)]
        ['120 ms', '42 s', '1.5 min', '2 h', '2.3 days']
    """
    units = (("ms", 0.001, 1), ("s", 1, 90), ("min", 60, 5400), ("h", 3600, 172800), ("days", 86400, float("inf")))
    for unit, size, limit in units:
        if seconds < limit:
            value = float(f"{seconds / size:.2g}")
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:g} {unit}"
    raise ValueError(f"duration: seconds must be finite, got {seconds}; measure again.")
