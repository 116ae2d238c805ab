"""``distckpt doctor``: is the storage fit for checkpoints, and is the root in order?"""

from __future__ import annotations

import logging

import typer

from distckpt.cli import options
from distckpt.cli.output import Column, one_line, plain, print_json, print_table
from distckpt.cli.places import root_of
from distckpt.errors import ConfigError
from distckpt.format.catalog import parse_location
from distckpt.format.doctor import diagnose


def doctor(path: options.Root, json: options.Json = False, debug: options.Debug = False) -> None:
    """Check file system, space and clocks under a root, and jobs, damage, strays and orphans on it.

    Works before the first save too. Exit status 1 if something needs action; warnings and notes leave it 0.
    """
    at = parse_location(path)
    if at.step is not None:
        raise ConfigError(f"{path}: doctor takes a root, not a step of it")
    # Everything that would be warned about is in the report.
    logging.getLogger("distckpt").setLevel(logging.ERROR)
    report = diagnose(at.store)
    if json:
        found = [plain(finding) for finding in report.findings]
        print_json({"root": root_of(at.store), "ok": report.ok, "findings": found, "facts": report.facts})
    else:
        rows = [[f.level, f.check, one_line(f.text)] for f in report.findings]
        print_table([Column("", marks=True), Column("check"), Column("found", fold=True)], rows)
        levels = [f.level for f in report.findings]
        print(f"\n{levels.count('problem')} problems, {levels.count('warning')} warnings")
    if not report.ok:
        raise typer.Exit(1)
