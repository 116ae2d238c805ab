"""``distckpt ls``: the checkpoints of a root (see listing.py)."""

from __future__ import annotations

import typer

from distckpt.cli import options
from distckpt.cli.listing import list_root


def ls(
    path: options.Where,
    metric: options.Metric = None,
    mode: options.MetricMode = None,
    all: bool = typer.Option(False, "--all", "-a", help="Also strays, and attempts that were never committed."),
    check: bool = typer.Option(
        False, "--check", help="Look for the files of every checkpoint, not of newest and best."
    ),
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List checkpoints, newest first, with what marks them: newest, best, pinned, stray, damaged.

    'newest' is the one that a job would resume from. Exit status 1 if one that is listed is damaged.
    """
    raise typer.Exit(list_root(path, metric=metric, mode=mode, all=all, check=check, json=json))
