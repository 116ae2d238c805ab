"""What choosing does to a number: the best of K looks better than it is, and another sample might choose another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distckpt.errors import ConfigError
from distckpt.selection.cache import load_predictions
from distckpt.selection.evaluation import Costs, Evaluation, costs_of, value_and_n
from distckpt.selection.predictions import Array, Predictions
from distckpt.selection.rules import Rule, as_rule, choose, eligible
from distckpt.selection.statistics import Interval, check_paired, interval_of, wilson
from distckpt.selection.thresholds import kept_predictions
from distckpt.selection.totals import metric_of, row_totals

_BLOCK = 128


@dataclass(frozen=True, slots=True)
class ChoiceBootstrap:
    """The choice redone on resampled rows, the same rows for all candidates.

    ``wins``: share of the resamples that each won; ``none``: in which no candidate met the rule. ``optimism``: by how
    much the chosen one's ``metric`` looked better on the rows that chose it than on all rows, on average;
    ``corrected``: the observed value less that.
    """

    rule: str
    winner: str
    wins: Mapping[str, float]
    none: float
    metric: str
    observed: float
    optimism: float
    corrected: float
    n: int
    resamples: int


@dataclass(frozen=True, slots=True)
class Reestimate:
    """The winner on rows that had no part in the choice, beside the rows that chose it."""

    name: str
    metric: str
    chosen_on: str
    validation: str
    test_on: str
    test: str
    interval: Interval | None
    difference: float | None


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A candidate as one resample shows it."""

    name: str
    step: int
    generation: int
    nbytes: int
    metrics: Mapping[str, Any]
    counts: Mapping[str, tuple[int, int]]


def bootstrap_choice(
    candidates: Sequence[tuple[Evaluation, Predictions]] | Sequence[Evaluation],
    rule: Rule | str,
    *,
    costs: Costs | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> ChoiceBootstrap:
    """Resample the rows jointly and choose again each time: how often each candidate wins, and the winner's optimism.

    ``candidates``: evaluations (with kept predictions), or pairs with the predictions. Raises ``ConfigError`` if the rule
    has no ``max`` or ``min`` or nobody meets it on all rows; ``IncompatibleState`` for different rows.
    """
    parsed = as_rule(rule)
    aim = parsed.aim
    if aim is None:
        raise ConfigError(f"rule {parsed}: without a 'max' or 'min' there is no number that choosing could flatter")
    pairs = [one if isinstance(one, tuple) else (one, kept_predictions(one)) for one in candidates]
    for _, predictions in pairs[1:]:
        check_paired(pairs[0][1], predictions)
    tables = [_tables(predictions, parsed, costs or costs_of(one)) for one, predictions in pairs]
    n = len(pairs[0][1])
    whole = _draw(pairs, tables, np.ones((1, n)), np.arange(n)[None])[0]
    winner = _winner(parsed, whole, confidence)
    if winner is None:
        raise ConfigError(f"rule {parsed}: no candidate meets it on all {n} rows")
    truth = {one.name: aim.value(one) for one in whole}
    wins, gains, none = dict.fromkeys(truth, 0), [], 0
    rng = np.random.default_rng(seed)
    sign = 1.0 if aim.mode == "max" else -1.0
    for start in range(0, resamples, _BLOCK):
        rows = rng.integers(0, n, (min(_BLOCK, resamples - start), n))
        weights = np.stack([np.bincount(one, minlength=n) for one in rows]).astype(np.float64)
        for drawn in _draw(pairs, tables, weights, rows):
            chosen = _winner(parsed, drawn, confidence)
            if chosen is None:
                none += 1
                continue
            wins[chosen.name] += 1
            looked, really = aim.value(chosen), truth[chosen.name]
            if looked is not None and really is not None:
                gains.append(sign * (float(looked) - float(really)))
    optimism = math.fsum(gains) / len(gains) if gains else 0.0
    value = aim.value(winner)
    assert value is not None
    return ChoiceBootstrap(
        str(parsed), winner.name, {name: count / resamples for name, count in wins.items()}, none / resamples,
        str(aim), float(value), optimism, float(value) - sign * optimism, n, resamples,
    )  # fmt: skip


def _tables(predictions: Predictions, rule: Rule, costs: Costs | None) -> dict[str, Any]:
    """Return, for each metric of the rule, its totals over rows, or a function of rows where it has none."""
    return {m: row_totals(predictions, m, costs) or metric_of(predictions, m, costs) for m in rule.metrics}


def _draw(
    pairs: Sequence[tuple[Evaluation, Predictions]], tables: Sequence[dict[str, Any]], weights: Array, rows: Array
) -> list[list[_Drawn]]:
    """Return, for each resample (a row of ``weights``), every candidate's metrics; ratios exactly."""
    per: list[list[_Drawn]] = [[] for _ in weights]
    for (evaluation, _), table in zip(pairs, tables, strict=True):
        metrics: list[dict[str, Any]] = [{} for _ in weights]
        counts: list[dict[str, tuple[int, int]]] = [{} for _ in weights]
        for name, source in table.items():
            totals = weights @ source.terms if hasattr(source, "terms") else None
            values = source(rows) if totals is None else source.value(totals)
            for index, value in enumerate(values):
                metrics[index][name] = float(value)
                if totals is not None and source.exact:
                    counts[index][name] = (round(totals[index, 0]), round(totals[index, 1]))
        c = evaluation.checkpoint
        for index, (one, exact) in enumerate(zip(metrics, counts, strict=True)):
            per[index].append(_Drawn(c.name, c.step, c.generation, c.nbytes, one, exact))
    return per


def _winner(rule: Rule, drawn: Sequence[_Drawn], confidence: float) -> _Drawn | None:
    def ends(candidate: _Drawn, metric: str) -> tuple[float, float] | None:
        counts = candidate.counts.get(metric)
        found = None if counts is None or metric.startswith("f1_") else wilson(*counts, confidence)
        return None if found is None else (found.low, found.high)

    pool, _ = eligible(rule, drawn, ends)
    return choose(rule, pool)[0] if pool else None


def reestimate(chosen: Evaluation, fresh: Evaluation, metric: str, *, confidence: float = 0.95) -> Reestimate:
    """Return the chosen checkpoint's metric on rows that had no part in the choice; only that number is unbiased.

    Raises ``ConfigError`` if it is the same data, another checkpoint, another threshold, or rows of the new data were
    among those that chose (they are looked for by content).
    """
    if fresh.data.digest == chosen.data.digest:
        raise ConfigError(f"{fresh.data}: the choice was made on these rows; estimate on others")
    if (fresh.checkpoint.digest, fresh.checkpoint.prefix) != (chosen.checkpoint.digest, chosen.checkpoint.prefix):
        raise ConfigError(f"{fresh.name} is not the checkpoint that was chosen ({chosen.name})")
    same = [None if t is None else (t.positive, t.value) for t in (chosen.threshold, fresh.threshold)]
    if same[0] != same[1]:
        raise ConfigError(
            f"{chosen.name} was chosen at {chosen.threshold}, this is {fresh.threshold}; use the same threshold"
        )
    if chosen.predictions is not None and fresh.predictions is not None:
        shared = overlap(load_predictions(chosen), load_predictions(fresh))
        if shared:
            raise ConfigError(
                f"{shared} of {fresh.data.rows} rows of {fresh.data} are also in {chosen.data}: drop them first"
            )
    before, after = chosen.metrics.get(metric), fresh.metrics.get(metric)
    return Reestimate(
        chosen.name, metric, str(chosen.data), value_and_n(chosen, metric), str(fresh.data), value_and_n(fresh, metric),
        interval_of(fresh, metric, confidence=confidence), None if before is None or after is None else after - before,
    )  # fmt: skip


def overlap(a: Predictions, b: Predictions) -> int:
    """Return how many rows of b are also in a, by the digests of their content; 0 where none were kept."""
    return 0 if a.content is None or b.content is None else int(np.isin(b.content, a.content).sum())
