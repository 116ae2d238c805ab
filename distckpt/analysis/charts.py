"""Charts as values: series, marks, ticks and thinning. Pure; ``svg.py`` and ``png.py`` draw them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from distckpt.analysis.texts import number

Point = tuple[float, float]
MarkKind = Literal["saved", "averaged", "best", "chosen"]
MARKS: Final[tuple[MarkKind, ...]] = ("saved", "averaged", "best", "chosen")
"""In the order in which they are drawn, the last on top."""
MARK_WORDS: Final[dict[MarkKind, str]] = {
    "saved": "saved",
    "averaged": "member of an average",
    "best": "best",
    "chosen": "chosen",
}
MOST_POINTS: Final = 400
"""More than a line of a chart has pixels for."""
LOG_RATIO: Final = 1000.0
"""Positive values that span more than this go on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line: finite (x, y) with rising x. ``band`` has (x, low, high); ``lost``: where a value was not finite.

    The line is broken there, never drawn across.
    """

    label: str
    points: tuple[Point, ...]
    colour: int = 1
    dashed: bool = False
    dots: bool = False
    band: tuple[tuple[float, float, float], ...] = ()
    lost: tuple[float, ...] = ()

    @property
    def stretches(self) -> list[list[Point]]:
        """The points between one lost value and the next."""
        found = [[point] for point in self.points[:1]]
        for before, after in pairwise(self.points):
            here = bisect.bisect(self.lost, before[0])
            if here < len(self.lost) and self.lost[here] < after[0]:
                found.append([])
            found[-1].append(after)
        return found

    def height_at(self, x: float) -> float | None:
        """Return the line's height, between points on the straight line; None where it is not drawn."""
        for points in self.stretches:
            if points[0][0] <= x <= points[-1][0]:
                return value_at(points, x)
        return None


@dataclass(frozen=True, slots=True)
class Mark:
    """A checkpoint on a curve: where, what it is, and what to say when the pointer rests on it."""

    x: float
    kind: MarkKind
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One pair of axes. ``rules``: vertical lines with their titles. ``note`` stands below the title."""

    title: str
    x_label: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    rules: tuple[tuple[float, str], ...] = ()
    note: str = ""
    unit: str = ""
    from_zero: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """Stacked bars: (what each stands for, one value a part). ``parts`` name the parts, in the order of the colours."""

    title: str
    x_label: str
    parts: tuple[str, ...]
    bars: tuple[tuple[str, tuple[float, ...]], ...]
    note: str = ""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows: its ends, whether it is logarithmic, and (value, label) of each tick."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high end."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


# ---------------------------------------------------------------- points


def series_of(label: str, values: Iterable[tuple[float, float]], *, colour: int = 1, dots: bool = False) -> Series:
    """Return a line from (x, y) in any order; what is not finite is counted and left out, long ones are thinned."""
    ordered = sorted(values, key=lambda value: value[0])
    finite = [(x, y) for x, y in ordered if math.isfinite(x) and math.isfinite(y)]
    lost = [x for x, y in ordered if math.isfinite(x) and not math.isfinite(y)]
    return Series(label, tuple(thin(finite)), colour, dots=dots, lost=tuple(lost))


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most ``most`` of the points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretches = (most - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for index in range(stretches):
        part = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def value_at(points: Sequence[Point], x: float) -> float | None:
    """Return the line's height at ``x``, between points on the straight line; None outside of it."""
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    before = max((p for p in points if p[0] <= x), key=lambda p: p[0])
    after = min((p for p in points if p[0] >= x), key=lambda p: p[0])
    if after[0] == before[0]:
        return after[1]
    return before[1] + (after[1] - before[1]) * (x - before[0]) / (after[0] - before[0])


# ---------------------------------------------------------------- axes


def axis(values: Iterable[float], *, most: int = 5, whole: bool = False, from_zero: bool = False) -> Axis:
    """Return an axis around finite values, with at most about ``most`` ticks at round numbers.

    ``whole``: ticks at whole numbers only, and no room at the ends (steps). Positive values of several orders of magnitude
    get a logarithmic axis, unless ``from_zero``.
    """
    found = list(values)
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if not whole and not from_zero and low > 0 and high / low > LOG_RATIO:
        return _log_axis(low, high, most)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(abs(high), abs(low)) * 1e-9:
        room = 1.0 if whole else (abs(high) * 0.1 or 1.0)
        low, high = low - (0.0 if from_zero and low == 0 else room), high + room
    elif not whole:
        room = (high - low) * 0.06
        low, high = low - (0.0 if from_zero and low == 0 else room), high + room
    size = _round_step((high - low) / most, whole)
    first = math.ceil(low / size - 1e-9)
    marks = [index * size for index in range(first, first + most + 2) if index * size <= high + size * 1e-9]
    return Axis(low, high, False, tuple((mark, number(mark, size)) for mark in marks))


def _log_axis(low: float, high: float, most: int) -> Axis:
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = -(-(top - bottom) // most)
    marks = [10.0**power for power in range(bottom, top + 1, every)]
    return Axis(10.0**bottom, 10.0**top, True, tuple((mark, number(mark, mark)) for mark in marks))


def _round_step(rough: float, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return max(1.0, size) if whole else size


def fit_ticks(found: Axis, width: float, letter: float = 6.4) -> Axis:
    """Return the axis with so few ticks that their labels, centred below them, do not touch in ``width`` pixels."""
    ticks = found.ticks
    while len(ticks) > 1:
        places = [(found.at(value) * width, len(label) * letter / 2) for value, label in ticks]
        if all(b[0] - a[0] >= a[1] + b[1] + 6 for a, b in pairwise(places)):
            break
        ticks = ticks[::2]
    return Axis(found.low, found.high, found.log, ticks)
