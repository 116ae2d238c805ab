"""``distckpt evaluate``: every checkpoint on the same rows, alone or under torchrun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from distckpt.cli import options
from distckpt.cli.output import Column, clean, one_line, print_json, print_table
from distckpt.errors import ConfigError
from distckpt.selection.evaluation import Evaluation, value_and_n

_SHOWN = 8


def evaluate(
    paths: options.Paths,
    data: Annotated[str, typer.Option("--data", metavar="FILE|pkg.mod:fn", help=".jsonl, .csv, .tsv, or a function.")],
    evaluator: options.EvaluatorName = "sequence-classification",
    data_name: Annotated[
        str | None, typer.Option("--data-name", metavar="NAME", show_default=False, help="Such as validation.")
    ] = None,
    step: options.Steps = None,
    build: options.Build = None,
    tokenizer: options.Tokenizer = None,
    config: options.ModelConfig = None,
    max_length: options.MaxLength = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="[NAME=]pkg.mod:fn", show_default=False, help="A metric of your own."),
    ] = None,
    cost: options.CostOptions = None,
    prefix: str = typer.Option("model.", "--prefix", help="Which weights of a distckpt checkpoint."),
    batch_size: int = typer.Option(32, "--batch-size", min=1, help="Rows that run together."),
    share: str = typer.Option("auto", "--share", metavar="auto|data|checkpoint", help="What ranks divide."),
    results: options.Results = None,
    reuse: bool = typer.Option(True, "--reuse/--no-reuse", help="Use results that are there already."),
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Evaluate checkpoints (of a root all) on the same rows; results and predictions are kept in evaluations/.

    The same under torchrun: torchrun --nproc-per-node 2 --no-python distckpt evaluate ...
    """
    from distckpt.selection.evaluate import evaluate_checkpoints
    from distckpt.selection.sharing import torchrun_ranks

    options_of_model = {"tokenizer": tokenizer, "config": config, "max_length": max_length}
    with torchrun_ranks() as leader:
        found = evaluate_checkpoints(
            paths,
            named_evaluator(evaluator, options_of_model),
            data,
            data_name=data_name,
            steps=step,
            build=build,
            metrics=dict(_named(text) for text in metric or ()),
            costs=options.parse_costs(cost),
            prefix=prefix,
            batch_size=batch_size,
            share=share,  # type: ignore[arg-type]
            results=results,
            reuse=reuse,
            progress=not json,
        )
        if leader and json:
            print_json([one.to_json()["evaluation"] | {"metrics": dict(one.metrics)} for one in found])
        elif leader:
            print(f"{clean(found[0].evaluator.name)} on {clean(found[0].data)}")
            print_evaluations(found)


def named_evaluator(name: str, options_of_model: dict[str, Any]) -> Any:
    """Return a built-in evaluator by its name, with its options; else what was typed. Raises ``ConfigError``."""
    from distckpt.selection.huggingface import BUILT_IN

    if name in BUILT_IN:
        return BUILT_IN[name](**options_of_model)
    given = [f"--{key.replace('_', '-')}" for key, value in options_of_model.items() if value is not None]
    if given:
        raise ConfigError(f"{given[0]} is for the built-in evaluators ({', '.join(BUILT_IN)}), not for {name}")
    return name


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals else (text.rpartition(":")[2], text)


def print_evaluations(found: Sequence[Evaluation], metrics: Sequence[str] = ()) -> None:
    """Print a table, a row for each checkpoint; without ``metrics`` those of accuracy, classes and loss that fit."""
    names = list(metrics) or _headline(found[0])
    columns = [Column("checkpoint"), *(Column(clean(name).replace("_", "\n", 1), right=True) for name in names)]
    rows = [[clean(one.name), *(value_and_n(one, name).replace(" (", "\n(") for name in names)] for one in found]
    print_table(columns, rows)
    support = ", ".join(f"{clean(name)} {count}" for name, count in found[0].support.items())
    if support:
        print(f"\nrows of each class: {one_line(support)}")


def _headline(evaluation: Evaluation) -> list[str]:
    order = ("accuracy", "cost", "recall_", "precision_", "f1_", "macro_f1", "roc_auc", "loss", "perplexity", "bleu")
    ranked = [
        name
        for start in order
        for name in evaluation.metrics
        if name == start or (start[-1] == "_" and name.startswith(start))
    ]
    own = [
        name
        for name in evaluation.metrics
        if name not in ranked and not name.startswith(("pr_auc", "roc_auc", "weighted"))
    ]
    rest = [name for name in ranked if name not in ("macro_f1",)]
    return [*own, *rest][:_SHOWN] or sorted(evaluation.metrics)[:_SHOWN]
