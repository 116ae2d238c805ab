"""``distckpt average``: several checkpoints as one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from distckpt.cli import options
from distckpt.cli.output import Column, byte_progress, clean, one_line, print_json, print_table, size_text
from distckpt.errors import ConfigError

if TYPE_CHECKING:
    from distckpt.averaging.average import AverageReport

_N = TypeVar("_N", int, float)


def average(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", show_default=False, help="Roots, steps, Hugging Face or DCP folders, files."),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="ROOT", show_default=False, help="A root of its own.")],
    method: str = typer.Option(
        "uniform", "--method", metavar="NAME", help="uniform, weighted, last, best, every, window or greedy."
    ),
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W,...", show_default=False, help="One for each PATH.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", min=1, show_default=False, help="How many: last (5), best (5).")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", show_default=False, help="What method best is about.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option("--mode", metavar="min|max", show_default=False, help="Which way metric or score is better."),
    ] = None,
    every: Annotated[
        int | None, typer.Option("--every", min=1, show_default=False, help="Every n-th, counted from the newest.")
    ] = None,
    window: Annotated[
        str | None, typer.Option("--window", metavar="FIRST:LAST", show_default=False, help="Steps from ... to.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="N,N,...", show_default=False, help="These steps alone.")
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option("--evaluate", metavar="PKG.MOD:FN", show_default=False, help="Scores a blend, for method greedy."),
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", metavar="FILE", show_default=False, help="Keeps the scores of --evaluate.")
    ] = None,
    prefix: str = typer.Option("model.", "--prefix", help="Which tensors: ema.0. for an EMA's."),
    include_optimizer: bool = typer.Option(False, "--include-optimizer", help="The whole state, to resume from."),
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", show_default=False, help="Of the result (default: common).")
    ] = None,
    integers: str = typer.Option("newest", "--integers", metavar="newest|equal", help="What becomes of integers."),
    copy: Annotated[
        list[str] | None,
        typer.Option("--copy", metavar="PATTERN", show_default=False, help="Take such tensors from the newest."),
    ] = None,
    batchnorm: str = typer.Option(
        "refuse", "--batchnorm", metavar="refuse|copy_newest", help="Running statistics that differ."
    ),
    posthoc: bool = typer.Option(False, "--posthoc", help="An EMA of any length, from a PostHocEMA's checkpoints."),
    sigma_rel: Annotated[
        float | None,
        typer.Option("--sigma-rel", metavar="W", show_default=False, help="Its relative width: 0.05, say."),
    ] = None,
    at: Annotated[
        int | None, typer.Option("--at", min=0, show_default=False, help="Step where it ends (default: the newest).")
    ] = None,
    name: str = typer.Option("ema", "--name", help="What the averages are called among a job's statefuls."),
    step: Annotated[int | None, typer.Option("--step", min=0, show_default=False, help="The result's step.")] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Average checkpoints of any kind, layout and dtype into a new checkpoint; streamed, in bounded memory.

    Under torchrun (python -m distckpt.cli.main average ...) each rank writes its part; the result has the same bits.
    """
    from distckpt.averaging.average import Options, average_checkpoints
    from distckpt.averaging.posthoc import average_posthoc
    from distckpt.averaging.structure import Rules
    from distckpt.selection.sharing import torchrun_ranks

    if evaluate is not None:
        sys.path.insert(0, os.getcwd())  # as python -m does; a console script does not
    with torchrun_ranks() as leads, byte_progress("averaging", enabled=leads and not json) as progress:
        if posthoc or sigma_rel is not None or at is not None:
            chosen = {"--weights": weights, "-k": k, "--metric": metric, "--mode": mode, "--every": every, "--window": window,
                      "--steps": steps, "--evaluate": evaluate, "--cache": cache}  # fmt: skip
            given = [option for option, value in chosen.items() if value is not None]
            given += ["--method"] * (method != "uniform") + ["--prefix"] * (prefix != "model.")
            if not posthoc or sigma_rel is None or len(paths) != 1 or given:
                raise ConfigError(
                    f"--posthoc goes with one root and --sigma-rel, and with none of {', '.join(given) or 'the methods'}"
                )
            report = average_posthoc(
                paths[0],
                out,
                sigma_rel,
                at=at,
                name=name,
                options=Options(
                    include_optimizer=include_optimizer,
                    rules=Rules(integers, tuple(copy or ()), dtype, batchnorm),
                    step=step,
                    progress=progress,
                ),
            )
        else:
            report = average_checkpoints(
                paths,
                out,
                method,
                weights=None if weights is None else _numbers("--weights", weights, float),
                k=k,
                metric=metric,
                mode=mode,
                every=every,
                window=None if window is None else _window(window),
                steps=[] if steps is None else [int(n) for n in _numbers("--steps", steps, int)],
                evaluate=evaluate,
                cache=cache,
                prefix=prefix,
                include_optimizer=include_optimizer,
                dtype=dtype,
                integers=integers,
                copy=copy or (),
                batchnorm=batchnorm,
                step=step,
                progress=progress,
            )
    if leads:
        _show(report, json=json)


def _show(report: AverageReport, *, json: bool) -> None:
    if json:
        print_json(report)
        return
    print(f"average of {len(report.members)}: {clean(report.path)}")
    copied = f", {report.copied} copied from the newest" if report.copied else ""
    print(f"step {report.step}, {report.averaged} tensors averaged{copied}, {size_text(report.nbytes)}")
    columns = [Column("step", right=True), Column("weight", right=True), Column("kind"), Column("from", fold=True)]
    print_table(
        columns,
        [
            ["" if row["step"] is None else str(row["step"]), f"{row['weight']:.6g}", row["kind"], clean(row["name"])]
            for row in report.members
        ],
    )
    if report.fit is not None:
        fit = report.fit
        print(
            f"EMA of relative width {fit['sigma_rel']:g} over {fit['count']} steps, fit error {100 * fit['fit_error']:.2g} %"
        )
    if report.soup is not None:
        soup = report.soup
        print(
            f"held-out score {soup.score:.6g}, best single {soup.best_single:.6g}, after {soup.looks} looks at that data"
        )
        if len(report.members) == 1:
            print("no average was better than the best single checkpoint, which this is")
    for note in report.notes:
        print(f"note: {one_line(note)}")


def _numbers(option: str, text: str, kind: Callable[[str], _N]) -> list[_N]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as cause:
        raise ConfigError(f"{option} {text!r}: give numbers with commas between them") from cause


def _window(text: str) -> tuple[int | None, int | None]:
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return int(first) if first else None, int(last) if last else None
    except ValueError as cause:
        raise ConfigError(f"--window {text!r}: give FIRST:LAST, either may be left out") from cause
