"""Numbers, spans and moments as a reader wants them."""

from __future__ import annotations

import math


def number(value: float, step: float = 0.0) -> str:
    """Return a number for a reader: as many decimals as ``step`` tells apart, k and M for large ones, powers for extremes."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    step = abs(step) or abs(value) / 1000
    largest = max(abs(value), step)
    if largest >= 1e15 or largest < 1e-4:
        return f"{value:.{_digits(value, step)}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * scale or (letter != "k" and largest >= scale):
            return f"{value / scale:.{_decimals(step / scale)}f}{letter}"
    return f"{value:.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    return min(9, max(0, -math.floor(math.log10(step) + 1e-9)))


def _digits(value: float, step: float) -> int:
    return min(3, max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(step) + 1e-9)))


def duration(seconds: float | None) -> str:
    """Return seconds for a reader: ``0.35 s``, ``4 min 10 s``, ``3 h 12 min``, ``2 d 4 h``; empty for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{whole} s"


def moment(utc: str) -> str:
    """Return a stored time without the letters that only machines need."""
    return utc.replace("T", " ").removesuffix("Z")
