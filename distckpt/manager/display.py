"""What a person at a terminal sees of long work: progress bars and the resume table, on rank 0, on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from distckpt.manager.report import LoadReport


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, *, enabled: bool, unit: Literal["bytes", "rows"] = "bytes"
) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of bytes (or rows) just done; a bar only where standard error is a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield lambda number: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    speed = (
        (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TimeRemainingColumn())
    )
    columns = (TextColumn("{task.description}"), BarColumn(), *speed)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda number: progress.advance(task, number)


def resume_rows(report: LoadReport) -> list[tuple[str, str, str]]:
    """Return the resume checklist as (item, state, detail) rows."""
    loaded = report.loaded

    def count(prefix: str) -> int:
        return sum(name.startswith(prefix) for name in loaded)

    def row(item: str, prefix: str, what: str) -> tuple[str, str, str]:
        number = count(prefix)
        return (item, "loaded" if number else "not loaded", f"{number} {what}" if number else "")

    rows = [
        row("model", "model.", "tensors"),
        row("optimizer", "optim.", "entries"),
        row("scheduler", "scheduler", "entries"),
        row("grad scaler", "scaler", "entries"),
        row("RNG states", "rng", "entry per rank"),
        row("batch order", "sampler", "entries"),
        ("epoch, step", "loaded", f"epoch {report.epoch}, step {report.step}, generation {report.generation}"),
        (
            "metrics",
            "loaded" if report.metrics else "none",
            ", ".join(f"{k}={v}" for k, v in list(report.metrics.items())[:4]),
        ),
        (
            "world size",
            "same" if report.saved_world_size == report.world_size else "changed",
            f"saved on {report.saved_world_size}, now {report.world_size}",
        ),
    ]
    if report.proved is not None:
        rows.append(("proof", "equal", f"{report.proved} tensors compared with storage bit for bit"))
    rows += [("re-derived", "note", text) for text in report.rederived]
    rows += [("fallback", "warning", text) for text in report.fallbacks]
    for title, names in (("missing", report.missing), ("unexpected", report.unexpected), ("skipped", report.skipped)):
        if names:
            rows.append((title, str(len(names)), ", ".join(names[:4]) + (" …" if len(names) > 4 else "")))
    return rows


def show_resume(report: LoadReport, enabled: bool) -> None:
    """Show the resume checklist as a table on standard error, and log the outcome."""
    import logging

    logging.getLogger("distckpt").info("resumed %s: %d names loaded", report.path, len(report.loaded))
    if not enabled:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"resumed from {report.path}", title_justify="left")
    for heading in ("item", "state", "detail"):
        table.add_column(heading, overflow="fold")
    for row in resume_rows(report):
        table.add_row(*row)
    Console(stderr=True).print(table)
