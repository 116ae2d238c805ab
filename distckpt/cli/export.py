"""``distckpt export``: the weights of a checkpoint for inference, in a format that others run, proved before it counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from distckpt.cli import options
from distckpt.cli.output import Column, byte_progress, clean, one_line, print_json, print_table, size_text
from distckpt.errors import ConfigError, ExportRefused

if TYPE_CHECKING:
    from distckpt.export.outcome import Check, ExportReport

_WORDS = {"pass": "ok", "fail": "problem", "warn": "warning", "skip": "skipped"}


def export(
    src: Annotated[
        str, typer.Argument(metavar="SRC", show_default=False, help="A root, a step, an average, or foreign.")
    ],
    dst: Annotated[
        str, typer.Argument(metavar="DST", show_default=False, help="A new folder, or a file by its ending.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            show_default=False,
            help="huggingface, safetensors, torch, pt2, onnx, torchscript (legacy).",
        ),
    ] = None,
    step: options.Step = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="Export the average that EMAModel saved, not the weights.")
    ] = False,
    ema_name: Annotated[
        str | None,
        typer.Option("--ema-name", metavar="NAME", show_default=False, help="Which one, where there are several."),
    ] = None,
    prefix: str = typer.Option("model.", "--prefix", help="Which weights of a checkpoint."),
    kind: str = typer.Option("auto", "--from", metavar="KIND", help="What SRC is, where it cannot be told."),
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", show_default=False, help="float32, bfloat16, float16, float64."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="pkg.mod:fn", show_default=False, help="Makes the module (from the config)."),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="DIR", show_default=False, help="Folder with config.json.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="DIR", show_default=False, help="Hugging Face tokenizer.")
    ] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="The model has none.")] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE|pkg.mod:fn", show_default=False, help="Real rows to prove it with."),
    ] = None,
    data_name: Annotated[
        str | None, typer.Option("--data-name", metavar="NAME", show_default=False, help="Such as test.")
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option("--inputs", metavar="pkg.mod:fn", show_default=False, help="fn(rows) -> tensors by name."),
    ] = None,
    evaluator: Annotated[
        str | None,
        typer.Option("--evaluator", metavar="pkg.mod:fn", show_default=False, help="fn(model, rows), for the metric."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, show_default=False, help="Tokens of a row.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", min=0, show_default=False, help="Of outputs (default: by dtype).")
    ] = None,
    agreement: Annotated[
        float | None, typer.Option("--agreement", min=0, max=1, show_default=False, help="Share of equal predictions.")
    ] = None,
    metric_tolerance: Annotated[
        float | None, typer.Option("--metric-tolerance", min=0, show_default=False, help="Of the metrics.")
    ] = None,
    benchmark: int = typer.Option(20, "--benchmark", min=0, help="Calls that are timed; 0 for none."),
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", metavar="5GB", show_default=False, help="Of a Hugging Face folder's files."),
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", metavar="TEXT", show_default=False, help="The model's version.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="TEXT", show_default=False, help="The model's name.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace an earlier export, once the new one has passed.")
    ] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write weights alone, read them back, run both models on real rows, and publish only what passed.

    Beside the model: export.json with every answer, and README.md, the model card.
    """
    from distckpt.cli.convert import parse_size
    from distckpt.export.huggingface import MAX_SHARD
    from distckpt.export.inference import export_inference_checkpoint

    if tokenizer is not None and no_tokenizer:
        raise ConfigError("--tokenizer and --no-tokenizer contradict each other")
    done = 0
    with byte_progress("exporting", enabled=not json) as show:

        def progress(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if show is not None:
                show(done, 0)

        try:
            report = export_inference_checkpoint(
                src,
                dst,
                to=to,
                step=step,
                kind=kind,
                prefix=prefix,
                ema=ema_name if ema_name is not None else ema,
                dtype=dtype,
                model=model,
                config=config,
                tokenizer=False if no_tokenizer else tokenizer,
                data=data,
                data_name=data_name,
                inputs=inputs,
                evaluator=_evaluator(evaluator),
                max_length=max_length,
                tolerance=tolerance,
                agreement=agreement,
                metric_tolerance=metric_tolerance,
                benchmark=benchmark,
                max_shard_size=MAX_SHARD if max_shard_size is None else parse_size(max_shard_size),
                version=version,
                name=name,
                replace_existing=replace,
                progress=progress,
            )
        except ExportRefused as refusal:
            if json:
                print_json({"ok": False, "error": str(refusal), "checks": list(refusal.checks)})
            else:
                _print_checks(refusal.checks)
            raise
    if json:
        print_json({"ok": True, **report.to_json()})
    else:
        _print_report(report)


def _evaluator(name: str | None) -> object:
    from distckpt.selection.huggingface import BUILT_IN

    return BUILT_IN[name]() if name in BUILT_IN else name


def _print_report(report: ExportReport) -> None:
    print(f"{clean(report.path)}: {report.format}, version {clean(report.version)}")
    print(f"{report.tensors} tensors, {report.parameters:,} parameters, {report.dtype}")
    sizes = report.sizes
    columns = [Column("size"), Column("bytes", right=True), Column("")]
    rows = [
        ["whole checkpoint", size_text(sizes.original), ""],
        ["for inference", size_text(sizes.exported), f"{sizes.reduction:.1%} smaller"],
        ["left out", size_text(sizes.left_out), "optimizer, averages, other state"],
    ]
    print()
    print_table(columns, rows)
    print()
    _print_checks(report.checks)
    print()
    _print_checks(report.checklist, "before deployment")
    if report.latency:
        print()
        titles = ("model", "batch", "calls", "p50 ms", "p95 ms", "rows/s", "peak")
        print_table([Column(title, right=index > 1) for index, title in enumerate(titles)], [
            [one.model, one.shape, str(one.runs), f"{one.p50_ms:.2f}", f"{one.p95_ms:.2f}", f"{one.rows_per_s:.0f}",
             "" if one.peak_bytes is None else size_text(one.peak_bytes)]
            for one in report.latency
        ])  # fmt: skip
    for note in report.notes:
        print(f"note: {one_line(note)}")


def _print_checks(found: Sequence[Check], title: str = "check") -> None:
    rows = [[_WORDS[one.status], clean(one.name), one_line(one.evidence)] for one in found]
    print_table([Column("", marks=True), Column(title), Column("evidence", fold=True)], rows)
