"""``distckpt select``: which checkpoint a rule chooses, how the choice came about, and how sure it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from distckpt.cli import options
from distckpt.cli.output import Column, clean, one_line, print_json, print_table
from distckpt.errors import CheckpointNotFound, ConfigError


def select(
    paths: options.Paths,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="RULE",
            show_default=False,
            help="Such as 'lower recall_negative >= 0.87, then max f1_negative within 0.005, then earliest'.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="NAME", show_default=False, help="Evaluations on it (else the run's own metrics)."
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="NAME", show_default=False, help="Data without a part in the choice."),
    ] = None,
    evaluator: Annotated[
        str | None, typer.Option("--evaluator", metavar="NAME", show_default=False, help="Whose evaluations.")
    ] = None,
    top: int = typer.Option(1, "--top", min=1, metavar="K", help="The best K."),
    pareto: bool = typer.Option(False, "--pareto", help="All that no other beats in every max and min of the rule."),
    threshold: options.ThresholdText = None,
    cost: options.CostOptions = None,
    bootstrap: int = typer.Option(
        0, "--bootstrap", min=0, metavar="N", help="Choose again on N resamples of the rows."
    ),
    confidence: float = typer.Option(0.95, "--confidence", min=0.5, max=0.999, help="Of intervals."),
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Choose checkpoints by a rule; ties, missing values and the threshold are said. Exit status 1 if none meets it."""
    from distckpt.selection.rules import as_rule
    from distckpt.selection.select import pareto as front
    from distckpt.selection.select import select as choose

    rule, costs = as_rule(by), options.parse_costs(cost)
    if pareto:
        other = next((str(clause) for clause in rule.clauses if not hasattr(clause, "mode")), None)
        if other is not None or costs or threshold:
            raise ConfigError(f"--pareto takes 'max NAME' and 'min NAME' alone, no {other or 'costs or thresholds'}")
        objectives = [(name, clause.mode) for clause in rule.clauses for name in clause.metrics]  # type: ignore[union-attr]
        found = front(paths, objectives, data=data, evaluator=evaluator)
        _print_front(found, [name for name, _ in objectives], json)
        return
    choice = choose(
        paths,
        rule,
        data=data,
        evaluator=evaluator,
        k=top,
        costs=costs,
        threshold=options.parse_threshold(threshold),
        confidence=confidence,
    )
    more = _more(choice, paths, test, evaluator, costs, bootstrap, confidence)
    if json:
        chosen = [
            {"name": c.name, "path": c.path, "step": c.step, **_values(c, choice.rule, confidence)}
            for c in choice.ranked
        ]
        told = {"rule": choice.rule, "data": choice.data, "threshold": choice.threshold, "tied": choice.tied}
        print_json({**told, "chosen": chosen, "missing": dict(choice.missing), "stages": choice.stages, **more})
    else:
        for line in choice.lines():
            print(one_line(line))
        _print_chosen(choice, confidence)
        _print_more(more)
    if choice.winner is None:
        raise typer.Exit(1)


def _more(
    choice: Any, paths: Any, test: str | None, evaluator: str | None, costs: Any, bootstrap: int, confidence: float
) -> dict[str, Any]:
    """Return what statistics were asked for: the winner on other data, and the choice redone."""
    from distckpt.selection.curse import bootstrap_choice, reestimate
    from distckpt.selection.evaluation import costs_of
    from distckpt.selection.ledger import candidates_of
    from distckpt.selection.rules import as_rule
    from distckpt.selection.select import with_costs
    from distckpt.selection.statistics import compare_with_best
    from distckpt.selection.thresholds import kept_predictions, with_threshold

    found: dict[str, Any] = {}
    if choice.winner is None or not (bootstrap or test):
        return found
    winner = choice.winner.evaluation
    if winner is None:
        raise ConfigError("--bootstrap and --test need evaluations: name the --data that the choice is made on")
    if bootstrap:
        every = [candidate.evaluation for candidate in choice.candidates]
        found["bootstrap"] = bootstrap_choice(
            every, choice.rule, costs=costs, resamples=bootstrap, confidence=confidence
        )
        aim = as_rule(choice.rule).aim
        if aim is not None and len(aim.terms) == 1:
            kept = {candidate.name: kept_predictions(candidate.evaluation) for candidate in choice.candidates}
            told = {"best": choice.winner.name, "costs": costs or costs_of(winner), "alpha": 1 - confidence}
            found["compared"] = compare_with_best(kept, aim.metrics[0], aim.mode, resamples=bootstrap, **told)
    if test:
        same = [c.evaluation for c in candidates_of(paths, test, evaluator=evaluator) if c.evaluation]
        mine = (winner.checkpoint.digest, winner.checkpoint.prefix)
        fresh = next((one for one in same if (one.checkpoint.digest, one.checkpoint.prefix) == mine), None)
        if fresh is None:
            raise CheckpointNotFound(f"{choice.winner.name} was not evaluated on {test}; run distckpt evaluate on it")
        if winner.threshold is not None:
            fresh = with_threshold(fresh, kept_predictions(fresh), winner.threshold, costs=costs)
        elif costs:
            fresh = with_costs(fresh, costs)
        metrics = as_rule(choice.rule).metrics
        found["test"] = [reestimate(winner, fresh, metric, confidence=confidence) for metric in metrics]
    return found


def _values(candidate: Any, rule: str, confidence: float) -> dict[str, Any]:
    from distckpt.selection.rules import as_rule

    names = as_rule(rule).metrics
    return {
        "metrics": {name: candidate.metrics.get(name) for name in names},
        "counts": {name: candidate.counts[name] for name in names if name in candidate.counts},
        "n": {name: candidate.n[name] for name in names if name in candidate.n},
        "intervals": _intervals(candidate, names, confidence),
    }


def _intervals(candidate: Any, names: Any, confidence: float) -> dict[str, Any]:
    """Return Wilson's intervals of those that are proportions; others cost a bootstrap each."""
    from distckpt.selection.statistics import interval_of, is_proportion

    found = {
        name: interval_of(candidate, name, confidence=confidence) for name in names if is_proportion(candidate, name)
    }
    return {name: interval for name, interval in found.items() if interval is not None}


def _print_chosen(choice: Any, confidence: float) -> None:
    from distckpt.selection.rules import as_rule

    for place, candidate in enumerate(choice.ranked, start=1):
        print(f"\nchosen: {clean(candidate.name)}" if len(choice.ranked) == 1 else f"{place}. {clean(candidate.name)}")
        print(f"  {clean(candidate.path)}")
        for name, interval in _intervals(candidate, as_rule(choice.rule).metrics, confidence).items():
            print(f"  {clean(name)}: {interval}, {interval.method} at {confidence:.0%}")


def _print_more(more: dict[str, Any]) -> None:
    if "bootstrap" in more:
        b = more["bootstrap"]
        shares = ", ".join(
            f"{clean(name)} {share:.0%}" for name, share in sorted(b.wins.items(), key=lambda i: -i[1]) if share
        )
        none = f"; none meets the rule in {b.none:.0%}" if b.none else ""
        print(f"\nchosen again on {b.resamples} resamples of {b.n} rows: {shares}{none}")
        print(
            f"{b.metric}: {b.observed:.4f}, of which {b.optimism:.4f} is the luck of the best; corrected {b.corrected:.4f}"
        )
    if "compared" in more:
        tied = [clean(one.name) for one in more["compared"] if one.tied]
        apart = ", ".join(tied) or "none"
        print(f"these rows do not tell it from (paired tests, Holm for {len(more['compared'])}): {apart}")
    for one in more.get("test", ()):
        ends = (
            ""
            if one.interval is None
            else f", {one.interval.confidence:.0%} {one.interval.low:.4f} to {one.interval.high:.4f}"
        )
        print(
            f"{one.metric}: {one.validation} on {one.chosen_on}; on {one.test_on}, which had no part in it: {one.test}{ends}"
        )


def _print_front(found: Any, names: list[str], json: bool) -> None:
    from distckpt.selection.select import shown

    if json:
        print_json(
            [{"name": c.name, "path": c.path, "metrics": {name: c.metrics.get(name) for name in names}} for c in found]
        )
        return
    columns = [
        Column("no other is better in all"),
        *(Column(clean(name), right=True) for name in names),
        Column("path", fold=True),
    ]
    print_table(columns, [[clean(c.name), *(shown(c, name) for name in names), clean(c.path)] for c in found])
