"""What went wrong in a run, in sentences: damage, saves that failed or were repeated, restarts, fallbacks, lost records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distckpt.analysis.history import SaveTiming, Start, curves
from distckpt.analysis.record import Run
from distckpt.format.doctor import LIVE_S, size_text

Kind = Literal["bad", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing. ``bad``: something is damaged or lost; ``warning``: something failed and was dealt with; ``note``: odd."""

    kind: Kind
    text: str


def troubles(run: Run, timings: Sequence[SaveTiming], starts: Sequence[Start], now: float) -> list[Trouble]:
    """Return what went wrong, the worst first."""
    found = [Trouble("bad", problem) for problem in run.problems]
    found += [
        Trouble(
            "bad",
            f"step {save.step} of job start {save.generation} is damaged: {save.problem}".replace(
                f"{run.store.url}/", ""
            ),
        )
        for save in run.saves
        if save.problem is not None
    ]
    found += _attempts(run, starts, now)
    found += [
        Trouble(
            "warning",
            f"step {one.step} was committed by attempt {one.retries + 1}: {_tries(one.retries)} before it failed",
        )
        for one in timings
        if one.retries
    ]
    found += _restarts(starts, now)
    strays = [save.step for save in run.saves if save.stray and save.problem is None]
    if strays:
        text = f"committed outside the lineage, never resumed from (strays): {_steps(strays)}"
        found.append(Trouble("note", text))
    for name, values in curves(run).items():
        lost = [step for step, value in values if not math.isfinite(value)]
        if lost:
            found.append(
                Trouble("warning", f"{name} is not finite (NaN or infinite) at {_steps(sorted(map(int, lost)))}")
            )
    order: list[Kind] = ["bad", "warning", "note"]
    return sorted(found, key=lambda trouble: order.index(trouble.kind))


def _tries(number: int) -> str:
    return "one try" if number == 1 else f"{number} tries"


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:8]))
    more = f" and {len(steps) - 8} more" if len(steps) > 8 else ""
    return f"step{'s' * (len(steps) > 1)} {shown}{more}"


def is_alive(start: Start, now: float) -> bool:
    """Whether a job's last heartbeat is fresh."""
    return start.beat is not None and now - start.beat <= LIVE_S


def _attempts(run: Run, starts: Sequence[Start], now: float) -> list[Trouble]:
    alive = {start.generation for start in starts if is_alive(start, now)}
    found = []
    for attempt in run.attempts:
        what = f"a save of step {attempt.step} by job start {attempt.generation}"
        left = f"{attempt.files} file{'s' * (attempt.files != 1)}, {size_text(attempt.nbytes)} ({attempt.folder})"
        if attempt.in_doubt:
            found.append(Trouble("warning", f"{what} may be committed: a manifest of its step cannot be read; {left}"))
        elif attempt.generation in alive:
            found.append(Trouble("note", f"{what} is under way, or failed: {left}"))
        else:
            found.append(Trouble("warning", f"{what} was never committed: {left}"))
    return found


def _restarts(starts: Sequence[Start], now: float) -> list[Trouble]:
    found = []
    for start in starts:
        who = f"job start {start.generation}" + (f" on {start.host}" if start.host else "")
        if not start.recorded:
            found.append(Trouble("bad", f"{who} has no record that can be read: where it resumed from is inferred"))
        if start.passed_over and start.resumed_from is not None:
            damaged = [save.step for save in start.passed_over if save.problem is not None]
            why = f", of which now damaged: {_steps(damaged)}" if damaged else ""
            there = _steps([save.step for save in start.passed_over])
            text = f"{who} went on from step {start.resumed_from[1]} although newer saves were there, {there}{why}"
            found.append(Trouble("warning", f"{text} (a fallback, or asked for)"))
        if start.redone:
            found.append(
                Trouble(
                    "note",
                    f"{who} reached step {start.last_step}; at least {start.redone} of its steps were done again",
                )
            )
        if start.beat is not None and not is_alive(start, now):
            found.append(Trouble("warning", f"{who} never said that it ended: killed, or its host is gone"))
    return found
