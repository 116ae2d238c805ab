"""``distckpt report``: one HTML page about a run."""

from __future__ import annotations

from typing import Annotated

import typer

from distckpt.cli import options
from distckpt.cli.output import byte_progress, one_line, print_json


def report(
    root: options.Root,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="FILE", show_default=False, help="The page (default: <run>-report.html here)."
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="PATH",
            show_default=False,
            help="Another root or results folder to compare (again for more).",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by", metavar="RULE", show_default=False, help="Mark what this rule chooses; see distckpt select."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="NAME", show_default=False, help="Choose on these evaluations (else the run's metrics)."
        ),
    ] = None,
    norms: Annotated[
        bool | None,
        typer.Option(
            "--norms/--no-norms", show_default=False, help="Read all weights for norms (default: if 256 MiB at most)."
        ),
    ] = None,
    png: Annotated[
        str | None, typer.Option("--png", metavar="FILE", show_default=False, help="The charts as a picture, too.")
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a page about a run that needs nothing else. Exit status 1 if something of the run is damaged or lost."""
    from distckpt.analysis.report import write_report

    with byte_progress("reading weights", enabled=not json) as progress:
        made = write_report(
            root, out, compare=compare or (), by=by, data=data, compute_norms=norms, png=png, progress=progress
        )
    if json:
        print_json(made)
    else:
        for trouble in made.troubles:
            if trouble.kind == "bad":
                print(f"damaged: {one_line(trouble.text)}")
        print(made.page)
        if made.png is not None:
            print(made.png)
    raise typer.Exit(0 if made.ok else 1)
