"""``distckpt verify``: is what is on storage what was saved? Reads only, repairs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import typer

from distckpt.cli import options
from distckpt.cli.output import Column, byte_progress, clean, one_line, plain, print_json, print_table, size_text
from distckpt.cli.places import commits, place, root_of
from distckpt.errors import ConfigError
from distckpt.format.lineage import Committed
from distckpt.format.verify import MODES, Mode, VerifyReport
from distckpt.format.verify import verify as verify_checkpoint
from distckpt.storage.base import Store

_HOW = {
    "quick": "manifest, sizes, headers; --mode full reads every byte",
    "sample": "and random blocks; --mode full reads every byte",
    "full": "every byte",
}


def verify(
    path: options.Where,
    step: options.Step = None,
    mode: str = typer.Option("quick", metavar="|".join(MODES), help="How much is read: headers, random blocks, all."),
    fraction: float = typer.Option(0.05, help="Share of the blocks that mode sample reads."),
    seed: int = typer.Option(0, help="Which blocks mode sample chooses."),
    all: bool = typer.Option(
        False, "--all", "-a", help="Every checkpoint of the root, strays too; not the newest only."
    ),
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check a checkpoint (of a root the newest, whole or not) and name file, tensor and rank of each problem.

    Exit status 1 if anything is damaged.
    """
    if mode not in MODES:
        raise ConfigError(f"--mode {mode}: choose one of {', '.join(MODES)}")
    at = place(path, step)
    found = commits(at)
    chosen = found if all else found[:1]
    reports = []
    for committed, _ in chosen:
        with byte_progress(f"step {committed.step}", enabled=mode != "quick") as progress:
            reports.append(
                verify_checkpoint(
                    at.store, committed, mode=cast(Mode, mode), fraction=fraction, seed=seed, progress=progress
                )
            )
    if json:
        print_json(
            {
                "root": root_of(at.store),
                "mode": mode,
                "ok": all_ok(reports),
                "checkpoints": [
                    {**plain(r), "ok": r.ok, "stray": stray, "manifest": c.manifest_path}
                    for (c, stray), r in zip(chosen, reports, strict=True)
                ],
            }
        )
    else:
        _print(at.store, chosen, reports, mode)
    if not all_ok(reports):
        raise typer.Exit(1)


def all_ok(reports: Sequence[VerifyReport]) -> bool:
    """Whether no report has a problem."""
    return all(report.ok for report in reports)


def _print(store: Store, chosen: Sequence[tuple[Committed, bool]], reports: Sequence[VerifyReport], mode: str) -> None:
    numbers = [Column(title, right=True) for title in ("step", "gen", "files", "tensors", "read", "of")]
    columns = [*numbers, Column("result", marks=True, fold=True)]
    print_table(columns, [_row(r, stray) for (_, stray), r in zip(chosen, reports, strict=True)])
    problems = [problem for report in reports for problem in report.problems]
    if problems:
        print("\nproblems:")
    for problem in problems:
        tensor = "" if problem.tensor is None else f", tensor {clean(problem.tensor)}"
        rank = "" if problem.rank is None else f", rank {problem.rank}"
        what = problem.what.removeprefix(f"{store.url}/{problem.file}: ")
        print(f"  {clean(problem.file)}{rank}{tensor}\n    {one_line(what)}")
    notes = [note for report in reports for note in report.notes]
    if notes:
        print("\nnotes:")
    for note in notes:
        print(f"  {one_line(note)}")
    print(f"\nmode {mode}: {_HOW[mode]}")


def _row(report: VerifyReport, stray: bool) -> list[Any]:
    count = len(report.problems)
    result = "ok" if report.ok else f"damaged ({count} problem{'s' * (count > 1)})"
    return [
        str(report.step), str(report.generation), str(report.files), str(report.tensors),
        size_text(report.checked_bytes), size_text(report.total_bytes), result + ", stray" * stray,
    ]  # fmt: skip
