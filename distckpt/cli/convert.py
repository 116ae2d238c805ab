"""``distckpt convert``: what people already have into distckpt, and out again for others."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from distckpt.cli import options
from distckpt.cli.output import byte_progress, clean, one_line, print_json, size_text
from distckpt.errors import ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", show_default=False, help="What is to be converted.")],
    dst: Annotated[str, typer.Argument(metavar="DST", show_default=False, help="A new folder, file or root.")],
    to: str = typer.Option("distckpt", "--to", metavar="KIND", help="distckpt, dcp, torch or huggingface."),
    kind: str = typer.Option(
        "auto", "--from", metavar="KIND", help="auto, distckpt, dcp, deepspeed, universal, huggingface or torch."
    ),
    step: Annotated[
        int | None,
        typer.Option(
            "--step", min=0, show_default=False, help="The source's step; else the step that the result gets."
        ),
    ] = None,
    prefix: str = typer.Option("model.", "--prefix", help="What model names get, or lose on the way out."),
    optimizer: Annotated[
        bool | None,
        typer.Option(
            "--optimizer/--no-optimizer",
            show_default=False,
            help="Keep optimizer state (default: to distckpt and dcp).",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", show_default=False, help="Such as 5GB or 500MB.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", metavar="CLASS", show_default=False, help="Read such pickled objects as plain attributes."
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Convert a checkpoint of another kind, or into one, and read back every byte.

    Reads DeepSpeed (native, universal), DCP folders, torch.save files, Hugging Face folders and distckpt. Pickled files
    are described by a child process that can run nothing of them. An existing target is never overwritten.
    """
    from distckpt.importers.convert import convert as run

    size = None if max_shard_size is None else parse_size(max_shard_size)
    done = 0
    with byte_progress("converting", enabled=not json) as show:

        def progress(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if show is not None:
                show(done, 0)

        report = run(
            src,
            dst,
            to=to,
            kind=kind,
            step=step,
            prefix=prefix,
            optimizer=optimizer,
            max_shard_size=size,
            allow=tuple(allow or ()),
            progress=progress,
        )
    if json:
        print_json(report)
        return
    print(f"{report.source} -> {report.target}: {clean(report.path)}")
    at = "" if report.step is None else f"step {report.step}, "
    print(f"{at}{report.tensors} tensors, {size_text(report.nbytes)}, every byte read back and compared")
    for note in report.notes:
        print(f"note: {one_line(note)}")


def parse_size(text: str) -> int:
    """Return bytes from text such as ``5GB``; ``ConfigError`` for what is none."""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or int(match[1]) == 0:
        raise ConfigError(f"--max-shard-size {text!r}: give a number and a unit such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2].upper()]
