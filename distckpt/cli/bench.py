"""``distckpt bench``: how fast storage is for checkpoints, and which settings suit it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distckpt.cli import options
from distckpt.cli.output import Column, byte_progress, clean, one_line, print_json, print_table
from distckpt.errors import ConfigError

if TYPE_CHECKING:
    from distckpt.analysis.store_report import BenchReport, CurvePoint, Latency, TargetReport

_BAR = 32
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bench(
    urls: Annotated[
        list[str], typer.Argument(metavar="URL...", show_default=False, help="Folders that are there, or URLs.")
    ],
    mbytes: int = typer.Option(
        256, "--mbytes", min=1, help="MiB of each write, read, save, load; of all ranks together."
    ),
    rounds: int = typer.Option(3, "--rounds", min=1, help="How often each target has its turn; medians are shown."),
    operations: int = typer.Option(24, "--operations", min=1, help="Small operations of each kind, rank and round."),
    state_gb: Annotated[
        float | None,
        typer.Option(
            "--state-gb", min=0.001, show_default=False, help="The job's whole state, for advice on deadlines."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", show_default=False, help="Write a page with charts too.")
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time saves, loads, parts of loads and small operations on storage, side by side; recommend settings for it.

    Under torchrun (python -m distckpt.cli.main bench ...) all ranks take part. Nothing is left behind, also after
    ctrl-C. Exit status 1 if a target could not be measured to the end.
    """
    from distckpt.analysis.stops import Stopped
    from distckpt.analysis.store_bench import BenchOptions, bench_stores
    from distckpt.selection.sharing import torchrun_ranks

    if html is not None and not html.absolute().parent.is_dir():
        raise ConfigError(f"--html {html}: no such folder")
    chosen = BenchOptions(
        mbytes << 20, rounds, operations, state_nbytes=None if state_gb is None else int(state_gb * 1e9)
    )
    try:
        with torchrun_ranks() as leads, byte_progress("measuring", enabled=leads and not json) as progress:
            report = bench_stores(urls, chosen, progress=progress)
    except Stopped as stopped:
        print(
            f"distckpt: {stopped}: stopped; what was written is removed, unless a line above says otherwise",
            file=sys.stderr,
        )
        raise typer.Exit(128 + stopped.signum) from None
    if leads:
        if html is not None:
            from distckpt.analysis.store_page import page

            html.write_text(page(report), encoding="utf-8")
        if json:
            print_json(report)
        else:
            _show(report)
    if not report.ok:
        raise typer.Exit(1)


def _show(report: BenchReport) -> None:
    from distckpt.analysis.store_advice import size

    ranks = "1 rank" if report.world_size == 1 else f"{report.world_size} ranks on {report.hosts} hosts"
    turns = "one round" if report.rounds == 1 else f"medians of {report.rounds} rounds"
    print(f"{ranks}, {size(report.nbytes)} at a time, {turns}\n")
    names = [chr(ord("A") + number) if number < 26 else str(number) for number in range(len(report.targets))]
    for name, target in zip(names, report.targets, strict=True):
        print(f"{name}  {clean(target.url)}{_kind(target)}")
        if target.error:
            print(f"   failed: {one_line(target.error)}")
        for path in target.left:
            print(f"   left behind: {one_line(path)}")
    print()
    columns = [Column(""), *(Column(name, right=True) for name in names)]
    print_table(columns, _rates(report))
    print("\np50 / p95 / worst of small operations")
    print_table(columns, _latencies(report))
    for name, target in zip(names, report.targets, strict=True):
        if target.curve:
            print(f"\n{name}  {clean(target.url)}")
            for line in _charts(target):
                print(line)
    for name, target in zip(names, report.targets, strict=True):
        if target.advice or target.notes:
            print(f"\n{name}  {clean(target.url)}")
            _advise(target)


def _kind(target: TargetReport) -> str:
    facts = target.facts
    said = [facts.get("fs_type") or facts.get("service"), "far" if target.far else None]
    said.append("direct I/O refused" if facts.get("direct_io") is False else None)
    text = ", ".join(str(part) for part in said if part)
    return f"  ({text})" if text else ""


def _rates(report: BenchReport) -> list[list[str]]:
    """Rows of the table of speeds: raw limits, then each part with each setting; a cell for each target."""
    from distckpt.analysis.store_advice import size
    from distckpt.analysis.store_report import PARTS, READ, WRITE

    rows = []
    for kind in (WRITE, READ):
        cells = []
        for target in report.targets:
            best = target.best(kind)
            cells.append("" if best is None else f"{size(best.rate)}/s  {best.threads} × {best.request >> 20} MiB")
        rows.append([f"raw {kind}", *cells])
    for part in PARTS:
        for setting in ("default", "recommended"):
            cells = []
            for target in report.targets:
                found = next((f for f in target.figures if (f.part, f.setting) == (part, setting)), None)
                mark = "" if found is None or not found.only_void else "  void"
                cells.append("" if found is None else f"{size(found.rate)}/s  {found.fraction:.0%} of raw{mark}")
            if any(cells):
                rows.append([part if setting == "default" else f"{part}, as recommended", *cells])
    return rows


def _latencies(report: BenchReport) -> list[list[str]]:
    kinds = list(dict.fromkeys(found.operation for target in report.targets for found in target.latencies))
    rows = []
    for kind in kinds:
        found = [next((f for f in target.latencies if f.operation == kind), None) for target in report.targets]
        rows.append([kind, *("" if one is None else _latency(one) for one in found)])
    return rows


def _latency(found: Latency) -> str:
    unit, scale = ("ms", 1e3) if found.worst >= 0.001 else ("µs", 1e6)
    return " / ".join(f"{seconds * scale:.3g}" for seconds in (found.p50, found.p95, found.worst)) + f" {unit}"


def _charts(target: TargetReport) -> list[str]:
    """Bars by depth at the request size that distckpt makes, and by size at the best depth, for writes and reads."""
    from distckpt.analysis.store_advice import by_request, by_threads, knee, usual_request
    from distckpt.analysis.store_report import READ, WRITE

    lines = []
    for kind in (WRITE, READ):
        best = target.best(kind)
        if best is None:
            continue
        uncertain = " (void: the storage moved)" if _void(target.curve, kind) else ""
        usual = usual_request(target.curve, kind)
        depths = by_threads(target.curve, kind, usual)
        lines.append(f"  raw {kind}, requests of {usual >> 20} MiB, by threads{uncertain}")
        lines += _bars({str(n): rate for n, rate in depths.items()}, str(knee(depths)))
        sizes = by_request(target.curve, kind, best.threads)
        if len(sizes) > 1:
            lines.append(
                f"  raw {kind}, {best.threads} {'thread' if best.threads == 1 else 'threads'}, by request{uncertain}"
            )
            lines += _bars({f"{n >> 20} MiB": rate for n, rate in sizes.items()}, f"{knee(sizes) >> 20} MiB")
    return lines


def _void(curve: list[CurvePoint], kind: str) -> bool:
    return all(point.void == len(point.rates) for point in curve if point.kind == kind)


def _bars(rates: dict[str, float], knee: str) -> list[str]:
    from distckpt.analysis.store_advice import size

    plain = "utf" not in (sys.stdout.encoding or "").lower()
    most, width = max(rates.values()), max(map(len, rates))
    lines = []
    for label, rate in rates.items():
        eighths = round(rate / most * _BAR * 8)
        whole, rest = divmod(eighths, 8)
        bar = "#" * whole if plain else "█" * whole + _EIGHTHS[rest].strip()
        mark = ("  <- knee" if plain else "  ← knee") if label == knee else ""
        lines.append(f"    {label:>{width}}  {bar:<{_BAR}} {size(rate)}/s{mark}")
    return lines


def _advise(target: TargetReport) -> None:
    """Print what to set, ready to copy, then every setting with its reason."""
    changed = [advice for advice in target.advice if advice.changes]
    fields = [f"{a.setting}={a.value!r}" for a in changed if not a.setting.startswith("DISTCKPT_")]
    for advice in changed:
        if advice.setting.startswith("DISTCKPT_"):
            print(f"  export {advice.setting}={advice.value:g}")
    if fields:
        print(f"  CheckpointConfig({clean(target.url)!r}, {', '.join(fields)})")
    elif not changed and target.advice:
        print("  nothing to set: the defaults suit it, or nothing else is certain")
    rows = [
        [
            a.setting,
            _value(a.value),
            _value(a.default),
            a.why + (" (uncertain)" if a.uncertain else ""),
        ]
        for a in target.advice
    ]
    if rows:
        print_table([Column("setting"), Column("value", right=True), Column("now", right=True), Column("because", fold=True)],
                    rows, indent=2)  # fmt: skip
    for note in target.notes:
        print(f"  note: {one_line(note)}")


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
