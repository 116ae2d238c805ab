"""Is it really better: intervals, paired tests, and what choosing the best of K does to a number.

Wilson intervals, McNemar's test and Holm's correction come from statsmodels, bootstrap and permutation from scipy. Every
result carries the n that it rests on, and undefined (0/0) stays undefined.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from distckpt.errors import ConfigError, IncompatibleState, optional
from distckpt.manager.ranking import check_mode
from distckpt.selection.evaluation import Costs, Evaluation, costs_of
from distckpt.selection.metrics import class_index
from distckpt.selection.predictions import Array, Predictions, concatenated
from distckpt.selection.thresholds import kept_predictions
from distckpt.selection.totals import metric_of, row_totals

_PROPORTIONS: Final = ("accuracy", "precision_", "recall_")
_BCA_WORK: Final = 4 * 10**8
_CELLS: Final = 4_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its ends at ``confidence``, from ``n`` rows, by ``method``."""

    value: float
    low: float
    high: float
    n: int
    confidence: float
    method: str

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}] (n={self.n})"


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A test of "no difference" on the same rows. ``discordant``: (right only in a, right only in b), for McNemar's."""

    p: float
    n: int
    method: str
    discordant: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One candidate against the best. ``tied``: no difference is shown at ``alpha`` after Holm's correction."""

    name: str
    best: str
    value: float
    best_value: float
    difference: Interval
    test: PairedTest
    p_holm: float
    tied: bool


def wilson(hits: int, n: int, confidence: float = 0.95) -> Interval | None:
    """Return Wilson's interval of a proportion; None for n = 0."""
    if n == 0:
        return None
    proportion = optional("statsmodels.stats.proportion", "eval")
    low, high = proportion.proportion_confint(hits, n, alpha=1 - confidence, method="wilson")
    return Interval(hits / n, float(low), float(high), n, confidence, "Wilson")


def interval_of(
    candidate: Any, metric: str, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Return the interval of an evaluation's (or candidate's) metric; None where it is undefined or nothing was kept.

    Proportions (accuracy, precision, recall) get Wilson's from their counts; everything else the bootstrap of the kept
    predictions.
    """
    evaluation = candidate if isinstance(candidate, Evaluation) else getattr(candidate, "evaluation", None)
    counts = candidate.counts.get(metric)
    if counts is not None and metric.startswith(_PROPORTIONS):
        return wilson(counts[0], counts[1], confidence)
    if evaluation is None or evaluation.predictions is None:
        return None
    return bootstrap_interval(
        kept_predictions(evaluation),
        metric,
        costs=costs_of(evaluation),
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def bootstrap_interval(
    predictions: Predictions,
    metric: str,
    *,
    costs: Costs | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Return the bootstrap interval (BCa where it is affordable and defined, else percentile) of a metric over rows."""
    value = metric_of(predictions, metric, costs)
    width = _width(predictions, metric, costs)
    return _bootstrap(value, 1, len(predictions), width, confidence, resamples, seed)


def paired_difference(
    a: Predictions,
    b: Predictions,
    metric: str,
    *,
    costs: Costs | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Return the difference a - b of a metric on the same rows, with its paired bootstrap interval; None if undefined."""
    check_paired(a, b)
    first, second = metric_of(a, metric, costs), metric_of(b, metric, costs)

    def difference(rows_a: Array, rows_b: Array) -> Array:
        return first(rows_a) - second(rows_b)

    return _bootstrap(difference, 2, len(a), _width(a, metric, costs), confidence, resamples, seed)


def _width(predictions: Predictions, metric: str, costs: Costs | None) -> int | None:
    totals = row_totals(predictions, metric, costs)
    return None if totals is None else totals.terms.shape[1]


def _bootstrap(
    value: Callable[..., Array], samples: int, n: int, width: int | None, confidence: float, resamples: int, seed: int
) -> Interval | None:
    """Bootstrap a function of sets of rows with scipy; ``width`` is the number of totals, None where there are none."""
    stats = optional("scipy.stats", "eval")
    rows = np.arange(n)
    observed = float(value(*[rows] * samples)) if n else np.nan
    if not np.isfinite(observed):
        return None
    resamples = resamples if width is not None else min(resamples, 400)
    affordable = width is not None and n * n * width <= _BCA_WORK
    options = {"paired": True, "vectorized": True, "axis": -1, "n_resamples": resamples, "confidence_level": confidence,
               "batch": max(1, _CELLS // (n * (width or 1)))}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # degenerate distributions are told from NaN ends below
        found = stats.bootstrap(
            [rows] * samples, lambda *sets, axis: value(*sets), method="BCa" if affordable else "percentile",
            rng=np.random.default_rng(seed), **options,
        )  # fmt: skip
    low, high, method = (
        *map(float, found.confidence_interval),
        f"{'BCa' if affordable else 'percentile'} bootstrap, {resamples}",
    )
    if not (np.isfinite(low) and np.isfinite(high)):
        drawn = found.bootstrap_distribution[np.isfinite(found.bootstrap_distribution)]
        if not len(drawn):
            return None
        low, high = map(float, np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2]))
        method = f"percentile bootstrap, {len(drawn)} of {resamples} defined"
    return Interval(observed, low, high, n, confidence, method)


def check_paired(a: Predictions, b: Predictions) -> None:
    """Raise ``IncompatibleState`` unless both are about the same rows with the same labels and classes."""
    same = len(a) == len(b) and np.array_equal(a.ids, b.ids) and a.class_names() == b.class_names()
    for name in ("labels", "content"):
        one, other = getattr(a, name), getattr(b, name)
        same = same and (one is None or other is None or np.array_equal(one, other))
    if not same:
        raise IncompatibleState(
            "predictions of different rows, labels or classes cannot be paired; evaluate on the same data"
        )


# ---------------------------------------------------------------- tests


def mcnemar(a: Predictions, b: Predictions, metric: str = "accuracy") -> PairedTest:
    """Return McNemar's exact test of accuracy, or of a class's recall (on the rows of that class)."""
    check_paired(a, b)
    chosen_a, chosen_b, labels = a.chosen(), b.chosen(), a.labels
    if labels is None or chosen_a is None or chosen_b is None:
        raise ConfigError("McNemar's test needs labels and predicted classes")
    rows = np.ones(len(labels), np.bool_)
    if metric.startswith("recall_"):
        rows = labels == class_index(a, metric.removeprefix("recall_"))
    elif metric != "accuracy":
        raise ConfigError(f"McNemar's test is of accuracy or recall, not of {metric}")
    right_a, right_b = (chosen_a == labels)[rows], (chosen_b == labels)[rows]
    table = np.array(
        [
            [np.sum(right_a & right_b), np.sum(right_a & ~right_b)],
            [np.sum(~right_a & right_b), np.sum(~right_a & ~right_b)],
        ]
    )
    found = optional("statsmodels.stats.contingency_tables", "eval").mcnemar(table, exact=True)
    return PairedTest(float(found.pvalue), int(rows.sum()), "McNemar, exact", (int(table[0, 1]), int(table[1, 0])))


def permutation_test(
    a: Predictions, b: Predictions, metric: str, *, costs: Costs | None = None, resamples: int = 2000, seed: int = 0
) -> PairedTest:
    """Return a paired permutation test of any metric: under "no difference" a row's two predictions may be exchanged."""
    check_paired(a, b)
    both = concatenated(a, b)
    value, n, width = metric_of(both, metric, costs), len(a), _width(both, metric, costs)
    rows = np.arange(n)
    resamples = resamples if width is not None else min(resamples, 400)
    found = optional("scipy.stats", "eval").permutation_test(
        (rows, rows + n), lambda x, y, axis: value(x) - value(y), permutation_type="samples", vectorized=True, axis=-1,
        n_resamples=resamples, batch=max(1, _CELLS // (n * (width or 1))), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return PairedTest(float(found.pvalue), n, f"paired permutation, {resamples}")


def compare_with_best(
    candidates: Mapping[str, Predictions],
    metric: str,
    mode: str = "max",
    *,
    best: str | None = None,
    costs: Costs | None = None,
    alpha: float = 0.05,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Comparison]:
    """Compare every candidate with the best one (or with ``best``) on the same rows, corrected for their number (Holm).

    Accuracy and recall by McNemar's test, other metrics by permutation. Those ``tied`` with the best are the set that
    the data cannot tell from it. Candidates whose metric is undefined are left out. Order as given, the best excluded.
    """
    check_mode(mode)
    rows = {name: np.arange(len(one)) for name, one in candidates.items()}
    values = {name: float(metric_of(one, metric, costs)(rows[name])) for name, one in candidates.items()}
    defined = {name: value for name, value in values.items() if not np.isnan(value)}
    if not defined:
        return []
    pick = max if mode == "max" else min
    best = best or pick(defined, key=lambda name: defined[name])
    others = [name for name in defined if name != best]
    found = []
    for name in others:
        pair = (candidates[name], candidates[best])
        if metric == "accuracy" or metric.startswith("recall_"):
            test = mcnemar(*pair, metric)
        else:
            test = permutation_test(*pair, metric, costs=costs, resamples=resamples, seed=seed)
        difference = paired_difference(*pair, metric, costs=costs, resamples=resamples, seed=seed)
        assert difference is not None
        found.append((name, difference, test))
    if not found:
        return []
    correct = optional("statsmodels.stats.multitest", "eval").multipletests
    rejected, adjusted, *_ = correct([test.p for _, _, test in found], alpha=alpha, method="holm")
    return [
        Comparison(name, best, defined[name], defined[best], difference, test, float(p), not bool(no))
        for (name, difference, test), p, no in zip(found, adjusted, rejected, strict=True)
    ]
