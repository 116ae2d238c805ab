"""The report of a run: one self-contained HTML page of what its folder says. Public: ``write_report``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from distckpt import clock
from distckpt.analysis import curves, history, norms, page, saves, scores, starts, troubles, weights
from distckpt.analysis.candidates import gather
from distckpt.analysis.charts import Bars, Chart
from distckpt.analysis.page import Html, Section
from distckpt.analysis.reading import RunReader
from distckpt.analysis.record import Run
from distckpt.analysis.texts import moment, number
from distckpt.analysis.troubles import Trouble
from distckpt.format.doctor import size_text

CHEAP: Final = 256 << 20
"""Bytes of weights that a report reads for norms without being asked to."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was written: the page, its picture if one was asked for, the sections that it has, and what went wrong."""

    page: str
    png: str | None
    sections: tuple[str, ...]
    troubles: tuple[Trouble, ...]
    nbytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing of the run is damaged or lost, as far as was looked."""
        return not any(trouble.kind == "bad" for trouble in self.troubles)


def write_report(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    compare: Sequence[str | os.PathLike[str]] = (),
    by: str | None = None,
    data: str | None = None,
    compute_norms: bool | None = None,
    png: str | os.PathLike[str] | None = None,
    progress: norms.Progress | None = None,
) -> Report:
    """Write a report of the run at a root (folder or URL) as one HTML file that needs nothing else; returns what it says.

    ``out``: a local file, ``<run>-report.html`` in the current folder without one. ``compare``: other roots and results
    folders (averages, ensembles) whose evaluations join the table. ``by``: a rule as ``select`` takes it, on evaluations of
    ``data`` or on the run's own metrics; what it chooses is marked. ``compute_norms``: read the weights of every checkpoint
    (kept for the next report); by default where they are 256 MiB at most together. ``png``: the charts as a picture as
    well, by matplotlib (extra ``plots``).

    A folder that is damaged in part is reported so; checkpoints are checked by their manifests and sizes, bytes are not read
    (``distckpt verify`` does). Raises ``CheckpointNotFound`` where no run is, ``ConfigError``, ``MissingExtra``, ``StoreError``.

    Example::

        write_report("runs/reviews", "report.html", by="max f1_negative, then earliest", data="validation")
    """
    now = clock.now()
    found = RunReader(run).read()
    candidates = gather(found, compare, by=by, data=data)
    timings, begun = history.timings(found), history.starts(found)
    wrong = troubles.troubles(found, timings, begun, now)
    nbytes = norms.cost(found)
    wanted = nbytes <= CHEAP if compute_norms is None else compute_norms
    measured, unread = norms.weight_norms(found, compute=wanted, progress=progress)
    wrong = [*(Trouble("bad", f"weights cannot be read: {problem}") for problem in unread), *wrong]

    learning = curves.metric_charts(found, candidates)
    saving, sizes = saves.save_charts(timings, found), weights.norm_charts(measured)
    sections = [
        _troubles(wrong),
        curves.section(found, candidates, learning),
        scores.section(found, candidates),
        saves.saves_section(found, timings, candidates.chosen_save, saving),
        starts.lineage_section(found, begun, now),
        weights.norms_section(found, measured, unread, sizes, nbytes),
        weights.storage_section(found),
        _made_by(found),
    ]
    there = [section for section in sections if section is not None]
    name = os.path.basename(found.root.rstrip("/")) or found.root
    document = page.encoded(page.page(name, there, lead=_lead(found, begun, now)))
    target = Path(f"{name}-report.html" if out is None else out)
    target.write_bytes(document)
    picture = None if png is None else _picture(png, name, [*learning, *scores.all_charts(candidates), *saving, *sizes])
    return Report(str(target), picture, tuple(section.id for section in there), tuple(wrong), len(document))


def _picture(png: str | os.PathLike[str], name: str, charts: Sequence[Chart | Bars]) -> str:
    from distckpt.analysis.png import write_png

    write_png(png, name, charts)
    return os.fspath(png)


# ---------------------------------------------------------------- the top of the page


def _lead(run: Run, begun: Sequence[history.Start], now: float) -> Html:
    newest, best = run.newest, run.best
    kept, strays = len(run.kept), sum(save.stray for save in run.saves)
    damaged = sum(save.problem is not None for save in run.saves)
    count = ", ".join(
        [f"{kept} whole", *([f"{strays} stray"] if strays else []), *([f"{damaged} damaged"] if damaged else [])]
    )
    running = [start.generation for start in begun if troubles.is_alive(start, now)]
    facts: list[tuple[str, object]] = [("checkpoints", count)]
    if newest is not None:
        epoch = "" if newest.epoch is None else f", epoch {newest.epoch:g}"
        facts.append(("newest", f"step {newest.step}{epoch}"))
    if best is not None:
        value = best.metrics[run.metric[0]]
        shown = number(float(value)) if isinstance(value, (int, float)) else str(value)
        facts.append(
            (
                f"best {run.metric[0]} ({'lowest' if run.metric[1] == 'min' else 'highest'})",
                f"{shown} at step {best.step}",
            )
        )
    ranks = sorted({save.world_size for save in run.saves if save.digest})
    facts += [
        ("job starts", f"{len(begun)}{', running' if running else ''}"),
        ("ranks", ", ".join(map(str, ranks)) or "unknown"),
        ("storage", size_text(sum(nbytes for _, nbytes, _ in run.storage))),
    ]
    began = moment(run.created)
    told = f"{run.root}" + (f" · run {run.run_id}" if run.run_id else "") + (f" · since {began} UTC" if began else "")
    return page.join([page.paragraph(told, kind="note"), page.tiles(facts)])


def _troubles(found: Sequence[Trouble]) -> Section:
    if not found:
        said = "Nothing: every manifest is whole and every file has its size. Bytes were not read; distckpt verify does that."
        return Section("troubles", "What went wrong", page.paragraph(said, kind="note"))
    kinds = {"bad": "bad", "warning": "warning", "note": None}
    shown = [page.paragraph(trouble.text, kind=kinds[trouble.kind]) for trouble in found]
    more = [page.details(f"{len(shown) - 12} more", *shown[12:])] if shown[12:] else []
    return Section("troubles", "What went wrong", page.join([*shown[:12], *more]))


def _made_by(run: Run) -> Section | None:
    newest = run.newest
    if newest is None:
        return None
    rows: list[tuple[str, object]] = [
        (f"version of {name}", version) for name, version in sorted(newest.software.items())
    ]
    settings = newest.provenance.get("settings")
    if isinstance(settings, dict):
        rows += [(str(name), value) for name, value in sorted(settings.items(), key=lambda item: str(item[0]))]
    members = newest.provenance.get("averaged_from")
    if isinstance(members, (list, tuple)):
        rows += [("averaged from", member.get("name", member)) for member in members if isinstance(member, dict)]
    if not rows:
        return None
    whole = page.table([page.Head("what"), page.Head("value")], rows)
    return Section(
        "settings", "Settings", page.details(f"Software and settings of the job that saved step {newest.step}", whole)
    )
