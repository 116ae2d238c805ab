"""``distckpt watch``: a run in the terminal, again every few seconds."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distckpt import clock
from distckpt.cli import options
from distckpt.cli.output import clean, one_line, print_json, size_text
from distckpt.errors import StoreError

if TYPE_CHECKING:
    from distckpt.analysis.live import Glance

_WIDE = 110
_TROUBLES = 6
_STYLES = {"bad": "bold red", "warning": "yellow", "note": "dim"}


def watch(
    root: options.Root,
    every: float = typer.Option(5.0, "--every", min=0.2, metavar="S", help="Seconds from one look to the next."),
    once: bool = typer.Option(False, "--once", help="Show one frame and end; so it is where output is no terminal."),
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", show_default=False, help="Only this metric (again for more)."),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Watch a run: what runs, the last save and its age, metrics, storage, what went wrong. Ctrl-C ends it.

    Metrics are those stored: a job stores them with each save. With --once, exit status 1 if something is damaged or lost.
    """
    from rich.console import Console
    from rich.live import Live

    from distckpt.analysis.live import glance
    from distckpt.analysis.reading import RunReader

    reader = RunReader(root)
    seen = glance(reader.read(), clock.now())
    if once or json or not sys.stdout.isatty():
        if json:
            print_json(seen)
        else:
            columns = shutil.get_terminal_size((_WIDE, 24)).columns
            Console(file=sys.stdout, width=columns, highlight=False, emoji=False).print(frame(seen, metric, columns))
        raise typer.Exit(int(any(trouble.kind == "bad" for trouble in seen.troubles)))
    logging.getLogger("distckpt").setLevel(logging.CRITICAL)  # what it warns of is in the frame; lines would tear that
    console = Console(highlight=False, emoji=False)
    try:
        with Live(frame(seen, metric, console.width), console=console, auto_refresh=False) as live:
            while True:
                clock.sleep(every)
                try:
                    seen = glance(reader.read(), clock.now())
                    live.update(frame(seen, metric, console.width, console.height), refresh=True)
                except StoreError as error:
                    live.update(frame(seen, metric, console.width, console.height, note=str(error)), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def frame(seen: Glance, only: list[str] | None, width: int, height: int | None = None, note: str = "") -> Any:
    """Return one picture of a run, for rich; ``height`` bounds the metrics, ``note`` is an error of the last look."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [_title(seen), _facts(seen)]
    told = [trouble for trouble in seen.troubles if trouble.kind != "note"]
    shown = [curve for curve in seen.curves if not only or curve.name in only]
    most = len(shown) if height is None else max(1, height - 13 - min(_TROUBLES, len(told)))
    if shown:
        parts.append(_metrics(seen, shown[:most], width))
    elif only:
        parts.append(
            Text(
                f"no metric of that name; there are: {clean(', '.join(c.name for c in seen.curves)) or 'none'}",
                "yellow",
            )
        )
    else:
        parts.append(Text("no metrics are stored yet", "dim"))
    if shown[most:]:
        parts.append(Text(f"{len(shown) - most} more metrics: a higher window shows them, or --metric NAME", "dim"))
    for trouble in told[:_TROUBLES]:
        line = Text(f"{trouble.kind}: {one_line(trouble.text)}", _STYLES[trouble.kind])
        line.no_wrap, line.overflow = height is not None, "ellipsis"
        parts.append(line)
    if told[_TROUBLES:]:
        parts.append(Text(f"{len(told) - _TROUBLES} more: distckpt report", "dim"))
    if note:
        parts.append(Text(f"not seen: {one_line(note)}", "bold red"))
    return Group(*parts)


def _title(seen: Glance) -> Any:
    from rich.text import Text

    from distckpt.analysis.texts import duration

    name = clean(os.path.basename(seen.root.rstrip("/")) or seen.root)
    if not seen.running:
        last = "" if seen.last is None else f": job start {seen.last.generation} was the last"
        return Text.assemble((name, "bold"), "  ", ("not running", "yellow"), last)
    who = ", ".join(
        f"start {start.generation}" + (f" on {clean(start.host)}" if start.host else "") for start in seen.running
    )
    beat = "" if seen.beat_age_s is None else f", heartbeat {duration(max(0.0, seen.beat_age_s))} ago"
    return Text.assemble((name, "bold"), "  ", ("running", "green"), f": {who}{beat}")


def _facts(seen: Glance) -> Any:
    from rich.table import Table

    from distckpt.analysis.texts import duration, number

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    if seen.newest_step is None:
        table.add_row("last save", "none yet")
    else:
        epoch = "" if seen.newest_epoch is None else f", epoch {seen.newest_epoch:g}"
        took = "" if seen.to_commit_s is None else f", {duration(seen.to_commit_s)} to commit"
        table.add_row(
            "last save",
            f"step {seen.newest_step}{epoch}, {duration(seen.newest_age_s)} ago, {size_text(seen.newest_bytes)}{took}",
        )
    usual = "" if seen.every_s is None else f", usually {duration(seen.every_s)} apart"
    table.add_row("saves", f"{seen.saves} whole{usual}")
    for attempt in seen.in_flight[:3]:
        age = "" if attempt.modified is None else f", written to {duration(max(0.0, seen.now - attempt.modified))} ago"
        table.add_row("under way", f"step {attempt.step}: {size_text(attempt.nbytes)} in {attempt.files} files{age}")
    if seen.best is not None:
        lowest = "lowest" if seen.metric[1] == "min" else "highest"
        table.add_row("best", f"{lowest} {clean(seen.metric[0])} {number(seen.best[1])} at step {seen.best[0]}")
    if seen.logged_step is not None:
        table.add_row(
            "metrics up to", f"step {seen.logged_step}, {duration(seen.logged_age_s)} ago (stored with each save)"
        )
    free = f", {size_text(shutil.disk_usage(seen.root).free)} free" if os.path.isdir(seen.root) else ""
    largest = ", ".join(f"{what} {size_text(nbytes)}" for what, nbytes, _ in seen.storage[:3])
    table.add_row("storage", f"{size_text(seen.nbytes)}{free} ({largest})")
    return table


def _metrics(seen: Glance, shown: Any, width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    from distckpt.analysis.live import ASCII, BLOCKS, sparkline
    from distckpt.analysis.texts import number

    signs = BLOCKS if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII
    names = [clean(curve.name) for curve in shown]
    longest = min(max(map(len, names)), max(12, width // 3))
    room = max(8, min(60, width - longest - 40))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("metric", no_wrap=True, max_width=longest, overflow="ellipsis")
    for title in ("last", "low", "high"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for name, curve in zip(names, shown, strict=True):
        own = "bold" if curve.name == seen.metric[0] else ""
        values = (number(value) for value in (curve.last, curve.low, curve.high))
        table.add_row(Text(name, own), *values, Text(sparkline(curve.values, room, signs), "cyan"))
    return table
