"""The typer app: subcommands by name, each in its own module."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Annotated

import typer

from distckpt import __version__

_NAMES = "ls show verify diff average evaluate select compare export convert gc report watch bench doctor pin"

COMMANDS = {name: f"distckpt.cli.{name}" for name in _NAMES.split()}
COMMANDS["unpin"] = "distckpt.cli.pin"


def build_app(names: Iterable[str] = tuple(COMMANDS)) -> typer.Typer:
    """Return the app with these subcommands; each one costs the import of its module."""
    app = typer.Typer(
        name="distckpt",
        help="Look at, check and tidy distckpt checkpoints. Exit status: 0 fine, 1 a finding, 2 wrong use.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in names:
        app.command(name)(getattr(importlib.import_module(COMMANDS[name]), name))
    return app


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distckpt {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
