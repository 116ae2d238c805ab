"""Entry point of the console script ``distckpt``: subcommands, exit codes, and how errors are shown.

Exit codes: 0 fine; 1 a finding (damage, a difference, something not found) or a failed operation; 2 wrong use.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from distckpt.cli.output import one_line
from distckpt.errors import ConfigError, DistckptError

_LS_FLAGS = frozenset({"--all", "-a", "--check", "--json"})


class _Stderr(logging.Handler):
    """Shows the library's warnings as single lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"distckpt: {record.levelname.lower()}: {one_line(record.getMessage())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is shown escaped, never an error.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    logger = logging.getLogger("distckpt")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr(logging.WARNING))
    logger.setLevel(logging.NOTSET)
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever reads has seen enough (``| head``); nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except DistckptError as error:
        if "--debug" in arguments:
            raise
        print(f"distckpt: error: {one_line(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _run(arguments: list[str]) -> int:
    """Run one command. The plainest ``ls`` does without typer, whose import takes longer than listing a root."""
    rest = [argument for argument in arguments[1:] if argument not in _LS_FLAGS]
    if arguments[:1] == ["ls"] and len(rest) == 1 and not rest[0].startswith("-"):
        from distckpt.cli.listing import list_root

        every = "--all" in arguments or "-a" in arguments
        return list_root(rest[0], all=every, check="--check" in arguments, json="--json" in arguments)
    from distckpt.cli.app import COMMANDS, build_app

    named = arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else COMMANDS
    try:
        build_app(named)(args=arguments, prog_name="distckpt")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
