"""What a run's records imply: how long saves took and held training up, what failed, what was done twice. Pure.

A job stores no timings of its own. They follow from what it does store: every row of metrics has the second at which it was
logged, a manifest the moment at which it appeared.
"""

from __future__ import annotations

import bisect
import datetime
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from distckpt.analysis.record import Row, Run, Save, finite_or_not
from distckpt.format.lineage import Generation, lineage

ENOUGH: Final = 5
"""So many steps without a save it takes to say how long one usually lasts."""
_COARSE_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class SaveTiming:
    """One save: ``seconds`` from the call to the commit, ``held_up_s`` what training lost; None where nothing tells.

    ``coarse``: the files' times are not those of the run (it was copied), so seconds are whole ones of the manifest.
    """

    step: int
    generation: int
    nbytes: int
    seconds: float | None
    held_up_s: float | None
    usual_s: float | None
    coarse: bool
    retries: int


@dataclass(frozen=True, slots=True)
class Start:
    """One job start. ``last_step``: the last that it is known to have done; ``redone``: steps that its successor did again.

    ``passed_over``: commits that were there when it started, newer than what it resumed from. ``idle_s``: from the last
    sign of its predecessor to its start. ``beat``: the second of its last heartbeat if it never said that it ended.
    """

    generation: int
    host: str
    owner: str
    time: str
    resumed_from: tuple[int, int] | None
    first_step: int | None
    last_step: int | None
    saves: int
    redone: int
    passed_over: tuple[Save, ...]
    idle_s: float | None
    beat: float | None
    recorded: bool = True


def seconds_of(utc: str) -> float | None:
    """Return a stored time as seconds since the epoch; None where it is none."""
    try:
        found = datetime.datetime.fromisoformat(utc)
    except ValueError:
        return None
    return found.replace(tzinfo=found.tzinfo or datetime.UTC).timestamp()


def timings(run: Run) -> list[SaveTiming]:
    """Return the timing of every save whose manifest can be read, in the order of steps."""
    rows = _by_generation(run)
    saved = {(save.step, save.generation) for save in run.saves}
    usual = {generation: _usual(found, saved) for generation, found in rows.items()}
    return [
        _timing(save, rows.get(save.generation, []), usual.get(save.generation)) for save in run.saves if save.digest
    ]


def _by_generation(run: Run) -> dict[int, list[Row]]:
    """Return each job start's rows by step; of one step in the order in which they were logged."""
    found: dict[int, list[Row]] = {}
    for row in run.rows:
        found.setdefault(row.generation, []).append(row)
    return found


def _timing(save: Save, rows: Sequence[Row], usual: float | None) -> SaveTiming:
    said = seconds_of(save.time)
    coarse = said is None or abs(save.committed_at - said) > _COARSE_S
    done = said if coarse else save.committed_at
    first = bisect.bisect_left(rows, save.step, key=lambda row: row.step)
    end = bisect.bisect_right(rows, save.step, key=lambda row: row.step)
    here, after = rows[first:end], rows[end] if end < len(rows) else None
    seconds = None if not here or done is None else done - here[-1].time
    if seconds is not None and seconds < 0:  # clocks disagree, or the save was called for before its metrics
        seconds = 0.0 if seconds > -1 else None
    held_up = None
    if here and after is not None and usual is not None:
        held_up = max(0.0, after.time - here[0].time - usual * (after.step - save.step))
    return SaveTiming(save.step, save.generation, save.nbytes, seconds, held_up, usual, coarse, _retries(save.save_id))


def _retries(save_id: str) -> int:
    _, retried, number = save_id.rpartition(".retry")
    return int(number) if retried and number.isdigit() else 0


def _usual(rows: Sequence[Row], saved: set[tuple[int, int]]) -> float | None:
    """Return the median seconds of a step after which nothing was saved; None where there are too few."""
    plain = [
        (b.time - a.time) / (b.step - a.step)
        for a, b in pairwise(rows)
        if b.step > a.step and (a.step, a.generation) not in saved
    ]
    return statistics.median(plain) if len(plain) >= ENOUGH else None


# ---------------------------------------------------------------- job starts


def starts(run: Run) -> list[Start]:
    """Return the job starts, first to last; one whose record is lost is there if it left commits or metrics."""
    records, rows = {record.number: record for record in run.generations}, _by_generation(run)
    saves: dict[int, list[Save]] = {}
    for save in run.saves:
        saves.setdefault(save.generation, []).append(save)
    found = []
    for number in sorted({*records, *saves, *rows}):
        record, own, logged = records.get(number), saves.get(number, []), rows.get(number, [])
        steps = [item.step for item in own] + [row.step for row in logged]
        origins = [
            r.resumed_from[1] for r in run.generations if r.resumed_from is not None and r.resumed_from[0] == number
        ]
        redone = max(0, max(steps) - min(origins)) if steps and origins else 0
        found.append(
            Start(
                number, record.host if record else "", record.owner if record else "", record.time if record else "",
                record.resumed_from if record else None, min(steps, default=None), max(steps, default=None), len(own), redone,
                _passed_over(run, record), _idle(record, rows.get(number - 1, []), saves.get(number - 1, [])),
                run.beats.get(number), record is not None,
            )
        )  # fmt: skip
    return found


def _passed_over(run: Run, record: Generation | None) -> tuple[Save, ...]:
    """Return the commits of the lineage of that moment beyond what a job resumed from, as far as they are still there."""
    if record is None or record.resumed_from is None:
        return ()
    started = seconds_of(record.time)
    earlier = [g for g in run.generations if g.number < record.number]
    there = [
        save
        for save in run.saves
        if save.generation < record.number and (started is None or (seconds_of(save.time) or math.inf) <= started)
    ]
    line = set(lineage([save.committed for save in there], earlier))
    return tuple(save for save in there if save.committed in line and save.step > record.resumed_from[1])


def _idle(record: Generation | None, rows: Sequence[Row], saves: Sequence[Save]) -> float | None:
    """Return the seconds from the last sign of the job start before to this one."""
    began = None if record is None or record.resumed_from is None else seconds_of(record.time)
    signs = [row.time for row in rows] + [at for save in saves if (at := seconds_of(save.time)) is not None]
    return None if began is None or not signs else max(0.0, began - max(signs))


# ---------------------------------------------------------------- metrics


def curves(run: Run) -> dict[str, list[tuple[float, float]]]:
    """Return each metric's (step, value) along the lineage: the history, and what saves were given besides."""
    found: dict[str, dict[int, float]] = {}
    for step, metrics in [
        *((r.step, r.metrics) for r in run.line),
        *((s.step, s.metrics) for s in run.saves if not s.stray),
    ]:
        for name, value in metrics.items():
            number = finite_or_not(value)
            if number is not None:
                found.setdefault(str(name), {})[step] = number
    return {name: sorted((float(step), value) for step, value in values.items()) for name, values in found.items()}
