"""Entry point of the console script ``distckpt``: subcommands, exit codes, and how errors are shown.

Exit codes: 0 fine; 1 a finding (damage, a difference, something not found) or a failed operation; 2 wrong use.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from distckpt import __version__
from distckpt.cli import doctor, gc, ls, options, pin, show, verify
from distckpt.cli.output import one_line
from distckpt.errors import ConfigError, DistckptError

app = typer.Typer(
    name="distckpt",
    help="Look at, check and tidy distckpt checkpoints. Exit status: 0 fine, 1 a finding, 2 wrong use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("ls")(ls.ls)
app.command("show")(show.show)
app.command("verify")(verify.verify)
app.command("gc")(gc.gc)
app.command("doctor")(doctor.doctor)
app.command("pin")(pin.pin)
app.command("unpin")(pin.unpin)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distckpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


class _Stderr(logging.Handler):
    """Shows the library's warnings as single lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"distckpt: {record.levelname.lower()}: {one_line(record.getMessage())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default). Returns the exit code, or exits with it (``SystemExit``)."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is shown escaped, never an error.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    logger = logging.getLogger("distckpt")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr(logging.WARNING))
    logger.setLevel(logging.NOTSET)
    options.debug_wanted = False
    try:
        app(args=None if argv is None else list(argv), prog_name="distckpt")
    except DistckptError as error:
        if options.debug_wanted:
            raise
        print(f"distckpt: error: {one_line(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
