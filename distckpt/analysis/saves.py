"""Saves in a report: what they took, in charts and a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from distckpt.analysis import page, svg
from distckpt.analysis.charts import Bars, Chart, series_of
from distckpt.analysis.history import ENOUGH, SaveTiming
from distckpt.analysis.page import Head, Html, Section
from distckpt.analysis.record import GROUPS, Run, Save
from distckpt.analysis.texts import duration, moment, number
from distckpt.format.doctor import size_text

_MOST_BARS: Final = 200
_UNITS: Final = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def save_charts(timings: Sequence[SaveTiming], run: Run) -> list[Chart | Bars]:
    """Return the charts of saves that the records allow: sizes, seconds to the commit, what training lost."""
    kept = [save for save in run.saves if save.digest][-_MOST_BARS:]
    charts: list[Chart | Bars] = []
    if kept:
        size, unit = next((s, u) for s, u in _UNITS if max(sum(save.groups) for save in kept) >= s or s == 1)
        bars = tuple((str(save.step), tuple(nbytes / size for nbytes in save.groups)) for save in kept)
        shown = [i for i in range(len(GROUPS)) if any(values[i] for _, values in bars)] or [0]
        cut = tuple((name, tuple(values[i] for i in shown)) for name, values in bars)
        charts.append(Bars("Size of saves", "step", tuple(GROUPS[i] for i in shown), cut, unit=unit))
    taken = [(float(t.step), t.seconds) for t in timings if t.seconds is not None]
    if taken:
        note = "from the call to the commit" + (
            "; whole seconds, the folder was copied" if any(t.coarse for t in timings) else ""
        )
        charts.append(
            Chart("Time to commit", "step", (series_of("save", taken, dots=True),), note=note, unit="s", from_zero=True)
        )
    held = [(float(t.step), t.held_up_s) for t in timings if t.held_up_s is not None]
    if held:
        note = "by how much longer the step after a save took than the median step"
        stall = series_of("held up", held, colour=2, dots=True)
        charts.append(Chart("Training held up", "step", (stall,), note=note, unit="s", from_zero=True))
    return charts


def saves_section(
    run: Run, timings: Sequence[SaveTiming], chosen: Save | None, charts: Sequence[Chart | Bars]
) -> Section | None:
    """Return the saves: charts, what is not known and why, and every one in a table."""
    if not run.saves:
        return None
    notes = []
    if not any(t.seconds is not None for t in timings):
        notes.append("How long saves took was not recorded: that needs metrics at the step of a save.")
    if not any(t.held_up_s is not None for t in timings):
        notes.append(
            f"How long training was held up cannot be told: that needs metrics of at least {ENOUGH} steps between saves."
        )
    drawn = [svg.line_chart(chart) if isinstance(chart, Chart) else svg.bar_chart(chart) for chart in charts]
    body = [page.grid(drawn), page.paragraph(" ".join(notes), kind="note") if notes else None]
    whole = _saves_table(run, timings, chosen)
    body.append(page.details(f"All {len(run.saves)} saves", whole) if len(run.saves) > 12 else whole)
    return Section("saves", "Saves", page.join(body))


def _saves_table(run: Run, timings: Sequence[SaveTiming], chosen: Save | None) -> Html:
    by_commit = {(t.step, t.generation): t for t in timings}
    name = run.metric[0]
    heads = [
        Head("step", number=True), Head("start", number=True, hint="the job start that wrote it"), Head("epoch", number=True),
        Head("committed (UTC)"), Head("size", number=True), Head("ranks", number=True), Head("engine"), Head(name, number=True),
        Head("to commit", number=True), Head("held up", number=True), Head(""),
    ]  # fmt: skip
    rows = []
    for save in reversed(run.saves):
        timing = by_commit.get((save.step, save.generation))
        value = save.metrics.get(name)
        read = bool(save.digest)
        rows.append([
            save.step, save.generation, "" if save.epoch is None else f"{save.epoch:g}",
            moment(save.time), size_text(save.nbytes) if read else "", save.world_size if read else "", save.engine,
            "" if value is None else number(value) if isinstance(value, float) else value,
            duration(timing.seconds) if timing else "", duration(timing.held_up_s) if timing else "",
            _badges(run, save, chosen, timing),
        ])  # fmt: skip
    return page.table(heads, rows)


def _badges(run: Run, save: Save, chosen: Save | None, timing: SaveTiming | None) -> Html:
    best, newest = run.best, run.newest
    found = [
        ("newest", "", newest is not None and save.committed == newest.committed),
        ("best", "good", best is not None and save.committed == best.committed),
        ("chosen", "good", chosen is not None and save.committed == chosen.committed),
        ("pinned", "", save.pinned),
        ("stray", "warning", save.stray),
        ("damaged", "bad", save.problem is not None),
        (f"{timing.retries if timing else 0} retries", "warning", timing is not None and timing.retries > 0),
        ("average", "", bool(save.provenance.get("averaged_from"))),
    ]
    return page.join(page.badge(word, kind) for word, kind, holds in found if holds)
