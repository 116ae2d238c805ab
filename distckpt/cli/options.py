"""Arguments and options that several subcommands share."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from distckpt.errors import ConfigError

Where = Annotated[
    str,
    typer.Argument(metavar="PATH", show_default=False, help="Folder or URL: a root, a step's folder, or a manifest."),
]
Root = Annotated[str, typer.Argument(metavar="ROOT", show_default=False, help="Folder or URL of a root.")]
Step = Annotated[int | None, typer.Option("--step", min=0, show_default=False, help="This step of the root.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")]
Metric = Annotated[
    str | None,
    typer.Option("--metric", metavar="NAME", show_default=False, help="What 'best' is about (default: the run's own)."),
]
MetricMode = Annotated[
    str | None,
    typer.Option(
        "--mode", metavar="min|max", show_default=False, help="Which way it is better (default: the run's own)."
    ),
]
Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...",
        show_default=False,
        help="Roots, steps, Hugging Face folders or folders of them, results folders.",
    ),
]
Steps = Annotated[
    list[int] | None, typer.Option("--step", min=0, show_default=False, help="Only this step (again for more).")
]
EvaluatorName = Annotated[
    str,
    typer.Option(
        "--evaluator",
        metavar="NAME|pkg.mod:fn",
        help="fn(model, rows), or sequence-classification, language-model, translation.",
    ),
]
Build = Annotated[
    str | None,
    typer.Option("--build", metavar="pkg.mod:fn", show_default=False, help="fn(state_dict, config) -> model."),
]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", metavar="DIR", show_default=False, help="Hugging Face tokenizer.")
]
ModelConfig = Annotated[
    str | None, typer.Option("--config", metavar="DIR", show_default=False, help="Folder with config.json.")
]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=1, show_default=False, help="Tokens of a row.")]
Results = Annotated[
    str | None,
    typer.Option(
        "--results", metavar="DIR", show_default=False, help="Where results go (default: the steps' folders)."
    ),
]
CostOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--cost", metavar="TRUE:PREDICTED=5", show_default=False, help="What an error costs, for the metric cost."
    ),
]

ThresholdText = Annotated[
    str | None,
    typer.Option(
        "--threshold",
        metavar="CLASS=0.3|f1",
        show_default=False,
        help="A fixed one, or the best of an aim for each, as in 'negative=precision recall>=0.9'.",
    ),
]


def parse_costs(texts: list[str] | None) -> dict[tuple[str, str], float] | None:
    """Return costs of errors as typed; ``ConfigError`` for what is none."""
    found: dict[tuple[str, str], float] = {}
    for text in texts or ():
        pair, _, cost = text.rpartition("=")
        true, colon, said = pair.partition(":")
        try:
            if not (colon and true and said):
                raise ValueError
            found[true, said] = float(cost)
        except ValueError:
            raise ConfigError(f"--cost {text!r}: want TRUE:PREDICTED=NUMBER, such as negative:positive=5") from None
    return found or None


def parse_threshold(text: str | None) -> Any:
    """Return a ``Threshold`` or a ``ThresholdRule`` as typed; ``ConfigError`` for what is none."""
    from distckpt.selection.evaluation import Threshold
    from distckpt.selection.thresholds import ThresholdRule

    if text is None:
        return None
    name, equals, rest = text.partition("=")
    if re.fullmatch(r"\d*\.?\d+", rest.strip()):
        return Threshold(name.strip(), float(rest))
    found = re.fullmatch(r"(\w+)(?:\s+(precision|recall)\s*>=\s*(\d*\.?\d+))?", rest.strip())
    if not equals or found is None:
        raise ConfigError(f"--threshold {text!r}: want CLASS=0.3, CLASS=f1, or 'CLASS=precision recall>=0.9'")
    return ThresholdRule(name.strip(), found[1], None if found[2] is None else (found[2], float(found[3])))
