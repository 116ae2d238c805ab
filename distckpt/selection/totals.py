"""Metrics as functions of totals over rows, so that a resample of rows costs one product of matrices.

Most metrics are: a ratio of two sums (accuracy, recall, cost, loss), a mean of such ratios (macro F1), or BLEU. Areas
under curves and custom metrics are not; they are computed afresh for each resample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from distckpt.errors import ConfigError
from distckpt.selection.evaluation import Costs, class_slugs
from distckpt.selection.metrics import Custom, bleu_of, bleu_terms, class_index, cost_table, measure
from distckpt.selection.predictions import Array, Predictions


@dataclass(frozen=True, slots=True, eq=False)
class RowTotals:
    """A metric by its row terms (rows, m): ``value`` takes totals (..., m) and gives (...), NaN where undefined.

    ``exact``: the two terms are whole numbers, numerator and denominator.
    """

    terms: Array
    value: Callable[[Array], Array]
    exact: bool = False

    def of_rows(self, rows: Array) -> Array:
        """Return the metric of each set of rows; ``rows`` is (..., k) of positions."""
        return self.value(self.terms[rows].sum(axis=-2))


def row_totals(predictions: Predictions, metric: str, costs: Costs | None = None) -> RowTotals | None:
    """Return a metric as a function of totals, or None where it is none.

    Raises ``ConfigError`` where the predictions lack what a known metric needs.
    """
    if metric in ("loss", "perplexity"):
        return _loss(predictions, metric)
    if metric == "bleu":
        return RowTotals(bleu_terms(predictions).astype(np.float64), _bleu)
    labels, chosen = predictions.labels, predictions.chosen()
    kind, _, name = metric.partition("_")
    known = metric in ("accuracy", "macro_f1", "weighted_f1", "cost")
    if not known and not (kind in ("precision", "recall", "f1") and name in class_slugs(predictions.class_names())):
        return None
    if labels is None or chosen is None:
        raise ConfigError(f"{metric} needs labels and predicted classes, which these predictions do not have")
    if metric == "accuracy":
        return _ratio(labels == chosen, np.ones(len(labels)), exact=True)
    if metric == "cost":
        if not costs:
            raise ConfigError("metric cost: say what errors cost (costs=..., --cost true:predicted=5)")
        table = np.array([[float(cell) for cell in row] for row in cost_table(predictions.class_names(), costs)])
        return _ratio(table[labels, chosen], np.ones(len(labels)))
    classes = predictions.class_count
    if metric in ("macro_f1", "weighted_f1"):
        every = np.arange(classes)
        hits = (labels[:, None] == every) & (chosen[:, None] == every)
        both = (labels[:, None] == every).astype(np.float64) + (chosen[:, None] == every)
        support = (labels[:, None] == every).astype(np.float64)
        terms = np.concatenate([2.0 * hits, both, support], axis=1)
        return RowTotals(terms, _macro if metric == "macro_f1" else _weighted)
    which = class_index(predictions, name)
    true, said = labels == which, chosen == which
    if kind == "f1":
        return _ratio(2 * (true & said), true.astype(np.int64) + said, exact=True)
    return _ratio(true & said, said if kind == "precision" else true, exact=True)


def metric_of(
    predictions: Predictions, metric: str, costs: Costs | None = None, custom: dict[str, Custom] | None = None
) -> Callable[[Array], Array]:
    """Return a function from sets of rows (..., k) to the metric of each, whatever metric it is."""
    totals = row_totals(predictions, metric, costs)
    if totals is not None:
        return totals.of_rows

    def afresh(rows: Array) -> Array:
        flat = [_measured(predictions, metric, one, custom) for one in rows.reshape(-1, rows.shape[-1])]
        return np.array(flat).reshape(rows.shape[:-1])

    return afresh


def _measured(predictions: Predictions, metric: str, rows: Array, custom: dict[str, Custom] | None) -> float:
    drawn = predictions.take(rows, renumber=True)
    one = {metric: custom[metric]} if custom and metric in custom else None
    found = measure(drawn, custom=one).metrics
    if metric not in found:
        raise ConfigError(f"metric {metric!r}: these predictions give {', '.join(sorted(found))}")
    value = found[metric]
    return np.nan if value is None else value


def _loss(predictions: Predictions, metric: str) -> RowTotals:
    losses = predictions.row_losses()
    if losses is None:
        raise ConfigError(f"{metric} needs losses or probabilities, which these predictions do not have")
    terms = np.ones(len(losses)) if predictions.terms is None else predictions.terms
    ratio = _ratio(losses, terms)
    if metric == "loss":
        return ratio
    return RowTotals(ratio.terms, lambda totals: np.exp(np.minimum(_divide(totals), 709.0)))


def _ratio(numerator: Array, denominator: Array, *, exact: bool = False) -> RowTotals:
    return RowTotals(np.stack([numerator, denominator], axis=1).astype(np.float64), _divide, exact)


def _divide(totals: Array) -> Array:
    return _quotient(totals[..., 0], totals[..., 1])


def _quotient(numerator: Array, denominator: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(denominator == 0, np.nan, numerator / denominator)
    return found


def _macro(totals: Array) -> Array:
    hits, both, _ = np.split(totals, 3, axis=-1)
    each = _quotient(hits, both)
    defined = ~np.isnan(each)
    return _quotient(np.where(defined, each, 0.0).sum(axis=-1), defined.sum(axis=-1))


def _weighted(totals: Array) -> Array:
    hits, both, support = np.split(totals, 3, axis=-1)
    each = _quotient(hits, both)
    return _quotient((np.where(np.isnan(each), 0.0, each) * support).sum(axis=-1), support.sum(axis=-1))


def _bleu(totals: Array) -> Array:
    flat = totals.reshape(-1, totals.shape[-1])
    return np.array([bleu_of(one) for one in flat]).reshape(totals.shape[:-1])
