"""A run at a glance, for a terminal: what is running, the last save, metrics as sparklines, storage. Pure but for the clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from distckpt.analysis import history
from distckpt.analysis.record import Run
from distckpt.analysis.troubles import Trouble, is_alive, troubles
from distckpt.format.uncommitted import Uncommitted

BLOCKS: Final = "▁▂▃▄▅▆▇█"
ASCII: Final = "_.-~=+*#"


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric: its newest value and step, the range of the finite ones, and all of them in order."""

    name: str
    last: float
    step: int
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Glance:
    """A moment of a run. Ages are seconds up to ``now``; None where there is nothing to be as old as that."""

    root: str
    now: float
    running: tuple[history.Start, ...]
    beat_age_s: float | None
    last: history.Start | None
    saves: int
    newest_step: int | None
    newest_epoch: float | None
    newest_age_s: float | None
    newest_bytes: int
    to_commit_s: float | None
    best: tuple[int, float] | None
    metric: tuple[str, str]
    every_s: float | None
    """Median seconds between the last saves."""
    in_flight: tuple[Uncommitted, ...]
    logged_step: int | None
    logged_age_s: float | None
    curves: tuple[Curve, ...]
    nbytes: int
    storage: tuple[tuple[str, int, int], ...]
    troubles: tuple[Trouble, ...]


def glance(run: Run, now: float) -> Glance:
    """Return what a run looks like now."""
    timings, starts = history.timings(run), history.starts(run)
    running = tuple(start for start in starts if is_alive(start, now))
    newest, best = run.newest, run.best
    timing = (
        None
        if newest is None
        else next((t for t in timings if (t.step, t.generation) == (newest.step, newest.generation)), None)
    )
    times = [save.committed_at for save in run.kept][-9:]
    gaps = [b - a for a, b in pairwise(times)]
    alive = {start.generation for start in running}
    value = None if best is None else best.metrics.get(run.metric[0])
    beats = [start.beat for start in running if start.beat is not None]
    logged = max(run.line, key=lambda row: row.time, default=None)
    return Glance(
        root=run.root,
        now=now,
        running=running,
        beat_age_s=now - max(beats) if beats else None,
        last=starts[-1] if starts else None,
        saves=len(run.kept),
        newest_step=None if newest is None else newest.step,
        newest_epoch=None if newest is None else newest.epoch,
        newest_age_s=None if newest is None else max(0.0, now - newest.committed_at),
        newest_bytes=0 if newest is None else newest.nbytes,
        to_commit_s=None if timing is None else timing.seconds,
        best=None if best is None or not isinstance(value, (int, float)) else (best.step, float(value)),
        metric=run.metric,
        every_s=statistics.median(gaps) if gaps else None,
        in_flight=tuple(attempt for attempt in run.attempts if attempt.generation in alive),
        logged_step=None if logged is None else logged.step,
        logged_age_s=None if logged is None else max(0.0, now - logged.time),
        curves=_curves(run),
        nbytes=sum(nbytes for _, nbytes, _ in run.storage),
        storage=run.storage,
        troubles=tuple(troubles(run, timings, starts, now)),
    )


def _curves(run: Run) -> tuple[Curve, ...]:
    found = []
    for name, points in sorted(history.curves(run).items(), key=lambda item: (item[0] != run.metric[0], item[0])):
        values = tuple(value for _, value in points)
        finite = [value for value in values if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else (math.nan, math.nan)
        found.append(Curve(name, values[-1], int(points[-1][0]), low, high, values))
    return tuple(found)


def sparkline(values: Sequence[float], width: int, signs: str = BLOCKS) -> str:
    """Return values as at most ``width`` signs: each the mean of its stretch between the lowest and the highest of all.

    A stretch without a finite value is ``x``.
    """
    width = min(width, len(values))
    stretches = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [_mean(stretch) for stretch in stretches]
    finite = [mean for mean in means if mean is not None]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join("x" if mean is None else signs[_level(mean, low, high, len(signs))] for mean in means)


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(value / len(finite) for value in finite) if finite else None


def _level(value: float, low: float, high: float, levels: int) -> int:
    if not low < high or not math.isfinite(high - low):
        return levels // 2
    return min(levels - 1, int((value - low) / (high - low) * levels))
