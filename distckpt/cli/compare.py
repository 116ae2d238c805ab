"""``distckpt compare``: single checkpoints, averages, EMA, soup and ensembles of a run in one table, and what to ship."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from distckpt.cli import options
from distckpt.cli.evaluate import named_evaluator
from distckpt.cli.output import Column, clean, one_line, plain, print_json, print_table


def compare(
    paths: options.Paths,
    by: Annotated[
        str,
        typer.Option(
            "--by", metavar="RULE", show_default=False, help="What matters, such as 'max f1_a, then earliest'."
        ),
    ],
    data: Annotated[
        str, typer.Option("--data", metavar="FILE|pkg.mod:fn", show_default=False, help="Validation rows; they choose.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", show_default=False, help="Where averages go.")],
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="FILE|pkg.mod:fn", show_default=False, help="Test rows; they only report."),
    ] = None,
    evaluator: options.EvaluatorName = "sequence-classification",
    build: options.Build = None,
    tokenizer: options.Tokenizer = None,
    config: options.ModelConfig = None,
    max_length: options.MaxLength = None,
    last: int = typer.Option(5, "--last", min=1, metavar="K", help="Average the last K."),
    top: int = typer.Option(5, "--top", min=1, metavar="K", help="Average, and ensemble, the best K by loss."),
    loss: str = typer.Option("loss", "--loss", metavar="NAME", help="The metric that --top is about."),
    ema: bool = typer.Option(True, "--ema/--no-ema", help="EMAs that the checkpoints hold."),
    soup: bool = typer.Option(True, "--soup/--no-soup", help="A greedy soup."),
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            "--ensemble",
            metavar="KIND",
            show_default=False,
            help="probabilities, logits, weighted, or none (again for more).",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", show_default=False, help="Shown besides (default: accuracy, loss)."),
    ] = None,
    cost: options.CostOptions = None,
    threshold: options.ThresholdText = None,
    prefix: str = typer.Option("model.", "--prefix", help="Which weights of a distckpt checkpoint."),
    batch_size: int = typer.Option(32, "--batch-size", min=1, help="Rows that run together."),
    batchnorm: str = typer.Option("refuse", "--batchnorm", metavar="refuse|copy_newest", help="Of averages."),
    resamples: int = typer.Option(1000, "--resamples", min=100, metavar="N", help="Of bootstrap and permutations."),
    confidence: float = typer.Option(0.95, "--confidence", min=0.5, max=0.999, help="Of intervals and tests."),
    save: Annotated[
        str | None, typer.Option("--save", metavar="FILE", show_default=False, help="Write the result as JSON, too.")
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare what a run could ship, choosing on validation rows, and say which; often it is the best single checkpoint.

    The same under torchrun: torchrun --nproc-per-node 2 --no-python distckpt compare ...
    """
    from distckpt.averaging.contenders import compare_candidates
    from distckpt.selection.sharing import torchrun_ranks

    kinds = ensemble or ["probabilities", "weighted"]
    with torchrun_ranks() as leader:
        found = compare_candidates(
            paths,
            named_evaluator(evaluator, {"tokenizer": tokenizer, "config": config, "max_length": max_length}),
            data,
            test,
            rule=by,
            out=out,
            last=last,
            top=top,
            loss=loss,
            ema=ema,
            soup=soup,
            ensembles=[kind for kind in kinds if kind != "none"],
            metrics=metric or ["accuracy", "loss"],
            build=build,
            costs=options.parse_costs(cost),
            threshold=options.parse_threshold(threshold),
            prefix=prefix,
            batch_size=batch_size,
            batchnorm=batchnorm,
            resamples=resamples,
            confidence=confidence,
            progress=not json,
        )
    if not leader:
        return
    if save is not None:
        Path(save).write_text(dumps(plain(found.to_json()), indent=1) + "\n", encoding="utf-8")
    if json:
        print_json(found.to_json())
        return
    _print(found)


def _print(found: Any) -> None:
    from distckpt.selection.evaluation import value_and_n

    print(f"rule: {clean(found.rule)}; chosen on {clean(found.validation)}")
    if found.threshold:
        print(f"each candidate has its own threshold, chosen on validation: {clean(found.threshold)}")
    tested = "" if found.test is None else f", test {clean(found.test)}"
    print(f"difference: of {clean(found.metric)} from the best single, {clean(found.single)}; paired, Holm{tested}")
    columns = [
        Column("candidate"),
        Column("models", right=True),
        Column(f"validation\n{clean(found.metric)}", right=True),
    ]
    columns += [Column("difference", right=True)]
    sides = ["validation"] if found.test is None else ["test"]
    if found.test is not None:
        columns += [Column(f"test\n{clean(found.metric)}", right=True), Column("difference", right=True)]
    others = [name for name in found.metrics if name != found.metric]
    columns += [Column(f"{sides[0]}\n{clean(name)}", right=True) for name in others]
    rows = []
    for row in found.rows:
        told = row.test if found.test is not None else row.validation
        mark = " *" if row.name == found.recommended else ""
        cells = [f"{clean(row.name)}{mark}\n  {clean(row.how)}", str(row.models)]
        cells += [_value(row.validation, row.intervals, found.metric), _difference(row.against)]
        if found.test is not None:
            cells += [_value(row.test, row.test_intervals, found.metric), _difference(row.against_test)]
        rows.append([*cells, *("" if told is None else value_and_n(told, name).partition(" ")[0] for name in others)])
    print_table(columns, rows)
    print("\n* recommended")
    for sentence in found.words:
        print(one_line(sentence))


def _value(evaluation: Any, intervals: Any, metric: str) -> str:
    from distckpt.selection.evaluation import value_and_n

    if evaluation is None:
        return ""
    value, _, counts = value_and_n(evaluation, metric).partition(" ")
    interval = intervals.get(metric)
    ends = "" if interval is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{value}{ends}\n{counts}"


def _difference(found: Any) -> str:
    if found is None:
        return ""
    d = found.difference
    return f"{d.value:+.4f} [{d.low:+.3f}, {d.high:+.3f}]\np={found.p_holm:.2g}"
