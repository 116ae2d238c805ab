"""Pictures of a run: PNG files, and one HTML page that holds everything and needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measures import scorecard
from benchmarks.peers import OURS, is_dcp
from benchmarks.report import HEADINGS, Results, Summary, lines

COLOURS = {"ours": "#1b7f3b", "dcp": "#b3541e", "other": "#6b7a8f"}
SHARES = ("save", "cold load", "warm load")

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>distckpt benchmarks</title>
<style>
body{{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:110em;padding:0 1em;color:#1c2430}}
table{{border-collapse:collapse;font-size:13px;margin:1em 0}} td,th{{border:1px solid #ccd3dc;padding:.25em .55em}}
th{{background:#eef1f5;text-align:left}} td.n{{text-align:right;font-variant-numeric:tabular-nums}}
.met{{color:#1b7f3b;font-weight:600}} .not{{color:#b00020;font-weight:600}} .none{{color:#7a6000}}
img{{max-width:100%}} tr.ours{{background:#eaf6ee}}
</style>
<h1>distckpt benchmarks</h1><p>{about}</p>
<h2>What was promised</h2>{promises}
<h2>Pictures</h2>{pictures}
<h2>All medians</h2>{medians}
<p>Every figure is of this run, and every share is of a limit that was probed before and after its own turn. Peers took
turns, A B C … C B A; a turn whose probes differed by more than a tenth was void and taken again. Saves count when
durable; cold reads had no page of their files in memory; all that was loaded was compared byte by byte.</p>
{absent}</html>
"""


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'distckpt[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def colour(peer: str) -> str:
    """Return a peer's colour: ours, DCP's, everybody else's."""
    return COLOURS["ours" if peer.startswith(OURS) else "dcp" if is_dcp(peer) else "other"]


def plots(results: Results, folder: Path) -> list[Path]:
    """Write the PNG files that there are figures for; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = results.summaries()
    written = []
    for workload, world in dict.fromkeys((s.workload, s.world) for s in found if s.part in SHARES):
        here = [s for s in found if (s.workload, s.world) == (workload, world) and s.part in SHARES and s.fraction()]
        if here:
            path = folder / f"{workload}-{world}.png"
            _shares(here, f"{workload}, {world} rank{'s' if world > 1 else ''}: share of the raw limit", path)
            written.append(path)
    lost = [s for s in found if s.part == "train" and s.lost() is not None]
    if lost:
        _bars(lost, [s.lost() or 0.0 for s in lost], "training time lost by a save, seconds", folder / "train.png")
        written.append(folder / "train.png")
    return written


def _shares(summaries: Sequence[Summary], title: str, path: Path) -> None:
    pyplot = _pyplot()
    parts = [part for part in SHARES if any(s.part == part for s in summaries)]
    figure, axes = pyplot.subplots(1, len(parts), figsize=(4.6 * len(parts), 3.6), sharey=False, squeeze=False)
    for axis, part in zip(axes[0], parts, strict=True):
        here = [s for s in summaries if s.part == part]
        shares = [s.fraction() or 0.0 for s in here]
        bars = axis.barh([s.peer for s in here], shares, color=[colour(s.peer) for s in here])
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1.0, color="#1c2430", linewidth=0.8, linestyle="--")
        axis.set_xlim(0, max(1.1, *(share * 1.15 for share in shares)))
        axis.invert_yaxis()
        axis.set_title(
            {"warm load": "warm load ÷ memcpy", "save": "durable save ÷ raw write"}.get(part, f"{part} ÷ raw read")
        )
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(summaries: Sequence[Summary], values: Sequence[float], title: str, path: Path) -> None:
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 0.5 * len(values) + 1.2))
    bars = axis.barh([f"{s.workload}: {s.peer}" for s in summaries], values, color=[colour(s.peer) for s in summaries])
    axis.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
    axis.axvline(0.0, color="#1c2430", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def page(results: Results, pictures: Sequence[Path]) -> str:
    """Return the HTML page, pictures inside."""
    facts = results.machine
    about = (
        f"{facts.get('cores')} cores of {facts.get('cpu')}, {facts.get('memory_bytes', 0) / 1e9:.0f} GB, "
        f"{facts.get('file_system')}, Linux {facts.get('kernel')}, Python {facts.get('python')}. "
        f"Settings: {facts.get('settings')}. Versions: {facts.get('versions')}."
    )
    images = "".join(
        f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></p>'
        for path in pictures
    )
    absent = "".join(f"<li>{html.escape(p)}: absent: {html.escape(e)}</li>" for p, e in results.absent.items())
    return _PAGE.format(
        about=html.escape(about), promises=_promises(results), pictures=images or "<p>none</p>",
        medians=_table(HEADINGS, lines(results), peers=HEADINGS.index("peer")), absent=f"<ul>{absent}</ul>" if absent else "",
    )  # fmt: skip


def _promises(results: Results) -> str:
    return _table(("measure", "required", "aim", "measured", "required", "aim"), scorecard(results))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, peers: int | None = None) -> str:
    """Return a table; our rows stand out where column ``peers`` has names of peers."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headings)
    body = "".join(f"<tr{_row_class(row, peers)}>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _row_class(row: Sequence[str], peers: int | None) -> str:
    return ' class="ours"' if peers is not None and row[peers].startswith(OURS) else ""


def _cell(text: str) -> str:
    classes = {"met": "met", "not met": "not", "not measured": "none"}
    kind = classes.get(text) or ("n" if text[:1].isdigit() and len(text) < 16 else "")
    return f"<td class={kind}>{html.escape(text)}</td>" if kind else f"<td>{html.escape(text)}</td>"
