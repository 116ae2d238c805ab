"""What ``distckpt ls`` does: a root's checkpoints, what marks them, and their metrics. Quick to import: no typer."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distckpt.cli.output import (
    Column,
    clean,
    one_line,
    plain,
    print_json,
    print_table,
    size_text,
    table_width,
    time_text,
    value_text,
    width,
)
from distckpt.cli.places import path_of, place, root_of, run_metric
from distckpt.errors import CheckpointNotFound
from distckpt.format import names
from distckpt.format.catalog import CheckpointInfo, Location, list_checkpoints
from distckpt.format.lineage import Committed
from distckpt.format.uncommitted import Uncommitted, uncommitted
from distckpt.format.verify import quick_check
from distckpt.manager import ranking
from distckpt.storage.base import Store

_COLUMNS = [
    Column("step", right=True),
    Column("gen", right=True),
    Column("epoch", right=True),
    Column("time (UTC)"),
    Column("size", right=True),
    Column("ranks", right=True),
    Column("engine"),
]
_MARKS = Column("marks", fold=True, marks=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One checkpoint as listed; ``damage`` says what is wrong with it, as far as was looked."""

    info: CheckpointInfo
    marks: tuple[str, ...]
    damage: str | None


def list_root(
    path: str,
    *,
    metric: str | None = None,
    mode: str | None = None,
    all: bool = False,
    check: bool = False,
    json: bool = False,
) -> int:
    """Print what is at a path, as ``distckpt ls`` does; returns the exit code, 1 if one that is listed is damaged."""
    at = place(path)
    infos = list_checkpoints(path_of(Location(at.store)), all=True)
    line = [_committed(info) for info in infos if not info.stray]
    best = _best_by(at.store, line, metric, mode)
    rows = mark(at.store, [info for info in infos if all or not info.stray], *best, check=check)
    rows = [r for r in rows if at.step in (None, r.info.step) and at.generation in (None, r.info.generation)]
    attempts = [a for a in uncommitted(at.store) if at.step in (None, a.step)] if all else []
    if json:
        print_json(_document(at, rows, attempts, best))
    elif rows or attempts:
        _print(at.store, rows, attempts, best)
    if metric is not None and not any("best" in row.marks for row in rows):
        known = sorted({key for info in infos for key in info.metrics})
        print(f"no checkpoint here is best by {clean(metric)}; metrics: {clean(', '.join(known))}", file=sys.stderr)
    hidden = 0 if all else sum(info.stray for info in infos)
    if hidden:
        print(f"{hidden} stray{'s' * (hidden > 1)} not listed; --all shows them", file=sys.stderr)
    if not rows:
        raise CheckpointNotFound(f"{path_of(at)}: no checkpoint is there; check the path, or try --all")
    return int(any(row.damage is not None for row in rows))


def _best_by(store: Store, line: list[Committed], metric: str | None, mode: str | None) -> tuple[str, str]:
    """Return (metric, mode) as asked for, else as the run has it; another metric than the run's is a loss."""
    if metric is not None and mode is not None:
        return metric, mode
    own, direction = run_metric(store, line)
    return metric or own, mode or (direction if metric in (None, own) else "min")


def mark(store: Store, infos: Sequence[CheckpointInfo], metric: str, mode: str, *, check: bool = False) -> list[Row]:
    """Tell newest, best, pinned, stray and damaged ones among all of a root's checkpoints, given newest first.

    Files are looked for (not read) until the newest whole checkpoint is found, in the best one, and with
    ``check`` in all. Raises ``ConfigError`` for a wrong mode.
    """
    line = [info for info in infos if not info.stray]
    best = ranking.best([info for info in line if info.problem is None], metric, mode)
    damage = {info.path: info.problem for info in infos}
    newest = None
    for info in infos:
        seeking = newest is None and not info.stray
        if info.problem is None and (seeking or check or info is best):
            damage[info.path] = _missing(store, info)
        if seeking and damage[info.path] is None:
            newest = info
    return [_row(info, info is newest, info is best, damage[info.path]) for info in infos]


def _row(info: CheckpointInfo, newest: bool, best: bool, damage: str | None) -> Row:
    flags = {"newest": newest, "best": best, "pinned": info.pinned, "stray": info.stray, "damaged": damage is not None}
    return Row(info, tuple(word for word, holds in flags.items() if holds), damage)


def _missing(store: Store, info: CheckpointInfo) -> str | None:
    problems = quick_check(store, _committed(info))
    more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
    return f"{problems[0]}{more}" if problems else None


def _committed(info: CheckpointInfo) -> Committed:
    folder = names.step_folder(info.step)
    return Committed(info.step, info.generation, f"{folder}/{names.manifest_name(info.generation)}")


# ---------------------------------------------------------------- showing


def _document(
    at: Location, rows: Sequence[Row], attempts: Sequence[Uncommitted], best: tuple[str, str]
) -> dict[str, Any]:
    listed = [{**plain(row.info), "problem": row.damage, "marks": row.marks} for row in rows]
    return {
        "root": root_of(at.store),
        "metric": best[0],
        "mode": best[1],
        "checkpoints": listed,
        "uncommitted": list(attempts),
    }


def _print(store: Store, rows: Sequence[Row], attempts: Sequence[Uncommitted], best: tuple[str, str]) -> None:
    if rows:
        _print_rows(rows)
    if any("best" in row.marks for row in rows):
        print(f"\nbest: {'lowest' if best[1] == 'min' else 'highest'} {clean(best[0])}")
    damaged = [row for row in rows if row.damage is not None]
    if damaged:
        print("\ndamaged:")
    for row in damaged:
        print(f"  step {row.info.step}: {one_line(str(row.damage)).replace(f'{store.url}/', '')}")
    if attempts:
        print("\nnot committed (in flight, or left by a job that died; `distckpt gc` removes old ones):")
        columns = [Column("attempt"), Column("files", right=True), Column("size", right=True), Column("", fold=True)]
        cells = [
            [a.folder, str(a.files), size_text(a.nbytes), "in doubt: a manifest of its step is unreadable" * a.in_doubt]
            for a in attempts
        ]
        print_table(columns, cells, indent=2)


def _print_rows(rows: Sequence[Row]) -> None:
    """Metrics get columns of their own where they fit, with broken titles if need be; else a line below each row."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.info.metrics))
    heads = [_head(row) for row in rows]
    values = [[value_text(row.info.metrics[m]) if m in row.info.metrics else "" for m in metrics] for row in rows]
    marks = [[", ".join(row.marks)] for row in rows]
    cells = [[*head, *value, *mark] for head, value, mark in zip(heads, values, marks, strict=True)]
    for titles in ([clean(m) for m in metrics], [_broken(clean(m)) for m in metrics]):
        columns = [*_COLUMNS, *(Column(title, right=True) for title in titles), _MARKS]
        if table_width(columns, cells) <= width():
            print_table(columns, cells)
            return
    print_table([*_COLUMNS, _MARKS], [[*head, *mark] for head, mark in zip(heads, marks, strict=True)])
    pairs = [
        [head[0], "  ".join(f"{clean(m)}={v}" for m, v in zip(metrics, value, strict=True) if v)]
        for head, value in zip(heads, values, strict=True)
        if any(value)
    ]
    if pairs:
        print()
        print_table([Column("step", right=True), Column("metrics", fold=True)], pairs)


def _head(row: Row) -> list[str]:
    info = row.info
    if info.problem is not None:
        return [str(info.step), str(info.generation), "", "", "", "", ""]
    epoch = "" if info.epoch is None else value_text(info.epoch)
    rest = [epoch, time_text(clean(info.time)), size_text(info.nbytes), str(info.world_size), clean(info.engine)]
    return [str(info.step), str(info.generation), *rest]


def _broken(title: str) -> str:
    """Break a metric's name after separators, into lines of at most 14 characters where that is possible."""
    lines = [""]
    for part in re.findall(r"[^/._-]*[/._-]?", title):
        if lines[-1] and len(lines[-1]) + len(part) > 14:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
