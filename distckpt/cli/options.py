"""Arguments and options that several subcommands share."""

from __future__ import annotations

from typing import Annotated

import typer

Where = Annotated[
    str,
    typer.Argument(metavar="PATH", show_default=False, help="Folder or URL: a root, a step's folder, or a manifest."),
]
Root = Annotated[str, typer.Argument(metavar="ROOT", show_default=False, help="Folder or URL of a root.")]
Step = Annotated[int | None, typer.Option("--step", min=0, show_default=False, help="This step of the root.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")]
Metric = Annotated[
    str | None,
    typer.Option("--metric", metavar="NAME", show_default=False, help="What 'best' is about (default: the run's own)."),
]
MetricMode = Annotated[
    str | None,
    typer.Option(
        "--mode", metavar="min|max", show_default=False, help="Which way it is better (default: the run's own)."
    ),
]
