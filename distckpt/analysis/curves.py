"""The learning curves of a run: every metric over steps, with its checkpoints marked and job starts ruled."""

from __future__ import annotations

from distckpt.analysis import history, page, svg
from distckpt.analysis.candidates import Candidates
from distckpt.analysis.charts import Chart, Mark, Series, series_of
from distckpt.analysis.page import Html, Section
from distckpt.analysis.record import Run, Save
from distckpt.analysis.texts import number

MOST_OPEN = 24
"""Charts beyond these are folded away."""


def marks_of(run: Run, candidates: Candidates) -> list[Mark]:
    """Return the run's whole checkpoints as marks: saved, in an average, best by the run's metric, chosen by the rule."""
    best, chosen, members = run.best, candidates.chosen_save, candidates.members
    found = []
    for save in run.kept:
        at = f"step {save.step}{_epoch(save)}"
        found.append(Mark(save.step, "saved", f"saved: {at}"))
        if save.digest in members:
            found.append(Mark(save.step, "averaged", f"member of an average: {at}"))
        if best is not None and save.committed == best.committed:
            lowest = "lowest" if run.metric[1] == "min" else "highest"
            found.append(Mark(save.step, "best", f"best ({lowest} {run.metric[0]}): {at}"))
        if chosen is not None and save.committed == chosen.committed:
            found.append(Mark(save.step, "chosen", f"chosen by the rule: {at}"))
    return found


def _epoch(save: Save) -> str:
    return "" if save.epoch is None else f", epoch {save.epoch:g}"


def metric_charts(run: Run, candidates: Candidates) -> list[Chart]:
    """Return a chart of each metric, the run's own first, the others by name."""
    marks = tuple(marks_of(run, candidates))
    rules = tuple(
        (float(start.resumed_from[1]), f"job start {start.generation} goes on from step {start.resumed_from[1]}")
        for start in history.starts(run)
        if start.resumed_from is not None
    )
    curves = history.curves(run)
    own = run.metric[0]
    charts = []
    for name in sorted(curves, key=lambda name: (name != own, name)):
        series = series_of(name, curves[name])
        note = _note(series, run.metric[1] if name == own else None)
        charts.append(Chart(name, "step", (series,), marks, rules, note))
    return charts


def _note(series: Series, mode: str | None) -> str:
    """Return the curve in words; ``mode`` only where it is known which way is better."""
    lost = (
        f"{len(series.lost)} value{'s' * (len(series.lost) != 1)} not finite (NaN, infinite), not drawn"
        if series.lost
        else ""
    )
    if not series.points:
        return lost
    low, high = (pick(series.points, key=lambda p: p[1]) for pick in (min, max))
    parts = [f"last {number(series.points[-1][1])}"]
    if mode != "max":
        parts.append(f"lowest {number(low[1])} at {number(low[0], 1)}")
    if mode != "min":
        parts.append(f"highest {number(high[1])} at {number(high[0], 1)}")
    return " · ".join([*parts, lost] if lost else parts)


def section(run: Run, candidates: Candidates, charts: list[Chart]) -> Section | None:
    """Return the learning curves; None where no metric was ever given."""
    if not charts:
        return None
    legend = svg.marks_legend(charts[0].marks)
    notes = []
    if charts[0].rules:
        notes.append("Dotted vertical lines: a job start that went on from this step.")
    if len(run.rows) > len(run.line):
        notes.append(f"{len(run.rows) - len(run.line)} logged rows of steps that were done again later are left out.")
    drawn = [svg.line_chart(chart) for chart in charts]
    body: list[Html | None] = [
        legend,
        page.paragraph(" ".join(notes), kind="note") if notes else None,
        page.grid(drawn[:MOST_OPEN]),
    ]
    if drawn[MOST_OPEN:]:
        body.append(page.details(f"{len(drawn) - MOST_OPEN} more metrics", page.grid(drawn[MOST_OPEN:])))
    return Section("curves", "Learning curves", page.join(body))
