"""A bench of storage as one HTML page that needs nothing else: tables, and curves drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Final

from distckpt.analysis.store_advice import by_threads, knee, size
from distckpt.analysis.store_report import PARTS, READ, WRITE, BenchReport, CurvePoint, Latency, TargetReport

_COLOURS: Final = ("#1f6feb", "#d1495b", "#2a9d8f", "#b5793a", "#7a5cc7")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 460, 240, 76, 40, 14, 16
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;background:#fff;max-width:1040px;margin:2em auto;padding:0 1.2em}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.15em;margin:2em 0 .4em;overflow-wrap:anywhere}
table{border-collapse:collapse;margin:.6em 0 1em}th,td{padding:.3em .9em;text-align:left;border-bottom:1px solid #e3e6ea;
vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th{font-weight:600}
code,pre{font:13px/1.5 ui-monospace,monospace}pre{background:#f4f6f8;padding:.8em 1em;overflow-x:auto;border-radius:6px}
.q{color:#5c6670}.void{color:#b3261e}.row{display:flex;flex-wrap:wrap;gap:1em}.wide{overflow-x:auto}
svg text{font:12px system-ui,sans-serif;fill:#3d4650}
@media (prefers-color-scheme:dark){body{background:#14171b;color:#e4e7ea}th,td{border-color:#343a41}pre{background:#20252b}
.q{color:#98a2ad}.void{color:#ff8a80}svg text{fill:#b8c0c8}}
"""


def page(report: BenchReport) -> str:
    """Return the page. Every text from outside (URLs, errors, facts) is escaped."""
    ranks = "one process" if report.world_size == 1 else f"{report.world_size} ranks on {report.hosts} hosts"
    turns = "one round" if report.rounds == 1 else f"medians of {report.rounds} rounds"
    about = f"{ranks}, {size(report.nbytes)} at a time, {turns}, {report.time}"
    names = [_name(number) for number in range(len(report.targets))]
    body = [
        "<h1>Storage for checkpoints</h1>",
        f'<p class="q">{escape(about)}</p>',
        _legend(names, report.targets),
        "<h2>Bytes a second, and as a share of the raw limit beside it</h2>",
        _table(["", *names], _speeds(report.targets)),
        "<h2>Small operations: p50 / p95 / p99 / worst</h2>",
        _table(["", *names], _operations(report.targets)),
    ]
    for name, target in zip(names, report.targets, strict=True):
        body += _target(name, target)
    style = f"<style>{_STYLE}</style>"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{style}'
    return f"<!doctype html>\n<html lang=en><head>{head}<title>Storage for checkpoints</title></head><body>\n" + (
        "\n".join(body) + "\n</body></html>\n"
    )


def _name(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else str(number)


def _legend(names: Sequence[str], targets: Sequence[TargetReport]) -> str:
    rows = []
    for name, target in zip(names, targets, strict=True):
        facts = target.facts
        said = [facts.get("fs_type") or facts.get("service") or "", "far" if target.far else ""]
        state = f'<span class="void">failed: {escape(target.error)}</span>' if target.error else ""
        state += "".join(f'<br><span class="void">left behind: {escape(path)}</span>' for path in target.left)
        rows.append(
            [name, f"<code>{escape(target.url)}</code>", escape(", ".join(filter(None, map(str, said)))), state]
        )
    return _table(["", "target", "what it is", ""], rows, numbers=False)


def _speeds(targets: Sequence[TargetReport]) -> list[list[str]]:
    rows = []
    for kind in (WRITE, READ):
        best = [target.best(kind) for target in targets]
        rows.append([f"raw {kind}", *("" if p is None else f"{size(p.rate)}/s<br>{_point(p)}" for p in best)])
    for part in PARTS:
        for setting in ("default", "recommended"):
            cells = []
            for target in targets:
                found = next((f for f in target.figures if (f.part, f.setting) == (part, setting)), None)
                if found is None:
                    cells.append("")
                    continue
                marks = '<br><span class="void">void: the storage moved</span>' if found.only_void else ""
                marks += '<br><span class="void">not cold</span>' if found.cold is False else ""
                cells.append(f'{size(found.rate)}/s <span class="q">{found.fraction:.0%}</span>{marks}')
            if any(cells):
                rows.append([part + (", as recommended" if setting == "recommended" else ""), *cells])
    return rows


def _point(point: CurvePoint) -> str:
    return f'<span class="q">{point.threads} × {point.request >> 20} MiB</span>'


def _operations(targets: Sequence[TargetReport]) -> list[list[str]]:
    kinds = dict.fromkeys(found.operation for target in targets for found in target.latencies)
    rows = []
    for kind in kinds:
        found = [next((f for f in target.latencies if f.operation == kind), None) for target in targets]
        rows.append([kind, *("" if one is None else _milliseconds(one) for one in found)])
    return rows


def _milliseconds(found: Latency) -> str:
    times = (found.p50, found.p95, found.p99, found.worst)
    return " / ".join(f"{seconds * 1e3:.3g}" for seconds in times) + f' ms <span class="q">of {found.count}</span>'


def _target(name: str, target: TargetReport) -> Iterable[str]:
    yield f"<h2>{name}  <code>{escape(target.url)}</code></h2>"
    if target.curve:
        yield '<div class="row">' + "".join(_chart(target.curve, kind) for kind in (WRITE, READ)) + "</div>"
    lines = [
        f"export {a.setting}={a.value:g}" for a in target.advice if a.changes and a.setting.startswith("DISTCKPT_")
    ]
    fields = [f"{a.setting}={a.value!r}" for a in target.advice if a.changes and not a.setting.startswith("DISTCKPT_")]
    if fields:
        lines.append(f"CheckpointConfig({target.url!r}, {', '.join(fields)})")
    if lines:
        yield f"<pre>{escape(chr(10).join(lines))}</pre>"
    if target.advice:
        rows = [
            [f"<code>{escape(a.setting)}</code>", _value(a.value), _value(a.default),
             escape(a.why) + (' <span class="void">uncertain</span>' if a.uncertain else "")]
            for a in target.advice
        ]  # fmt: skip
        yield _table(["setting", "value", "now", "because"], rows, numbers=False)
    for note in target.notes:
        yield f'<p class="q">{escape(note)}</p>'


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else escape(str(value))


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """Return a table of cells that are HTML already."""
    mark = ' class="n"' if numbers else ""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}{mark if i else ''}>{c}</{tag}>" for i, c in enumerate(cells)) + "</tr>"

    return f'<div class="wide"><table>{line("th", titles)}{"".join(line("td", row) for row in rows)}</table></div>'


def _chart(curve: Sequence[CurvePoint], kind: str) -> str:
    """Return a line for each request size: threads (log scale) across, bytes a second up; the knees are ringed."""
    points = [p for p in curve if p.kind == kind]
    if not points:
        return ""
    requests = sorted({p.request for p in points})
    depths = sorted({p.threads for p in points})
    top = max(p.rate for p in points) * 1.08
    spread = math.log2(depths[-1] / depths[0]) or 1.0

    def place(threads: int, rate: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log2(threads / depths[0]) / spread
        return x, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - rate / top)

    parts = [_axes(top, place(depths[0], 0)[1])]
    for depth in depths:
        parts.append(_text(place(depth, 0)[0], _HEIGHT - _BOTTOM + 16, str(depth), "middle"))
    for colour, request in zip(_COLOURS, requests, strict=False):
        parts.append(_line(by_threads(points, kind, request), colour, place))
    keys = "".join(
        f'<tspan fill="{colour}" dx="10">■ {request >> 20} MiB</tspan>'
        for colour, request in zip(_COLOURS, requests, strict=False)
    )
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">threads; requests of{keys}</text>')
    label = f"raw {kind} by threads and request size"
    return (
        f'<figure style="margin:0"><figcaption>raw {kind}</figcaption><svg role="img" aria-label="{label}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}">{"".join(parts)}</svg></figure>'
    )


def _axes(top: float, floor: float) -> str:
    parts = []
    for step in range(5):
        y = floor - (floor - _TOP) * step / 4
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{size(top * step / 4)}/s" if step else "0", "end"))
    return "".join(parts)


def _line(rates: Mapping[int, float], colour: str, place: Callable[[int, float], tuple[float, float]]) -> str:
    spots = [(*place(threads, rate), threads) for threads, rate in sorted(rates.items())]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
    marked = knee(rates)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        + (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="{colour}"/>' if threads == marked else "")
        for x, y, threads in spots
    )
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
