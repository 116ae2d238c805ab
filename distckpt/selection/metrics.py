"""Metrics from predictions: every number with the counts and the n that it rests on; 0/0 is undefined, never 0.

Names: ``accuracy``; ``precision_C``, ``recall_C``, ``f1_C`` for each class (``recall_negative``); ``macro_f1`` over the
classes whose F1 is defined, ``weighted_f1`` by support; ``cost`` per row; ``roc_auc`` (several classes: the mean of
one against the rest, each also ``roc_auc_C``), ``pr_auc_C`` (average precision); ``loss`` per term in nats;
``perplexity`` for language models; ``bleu``; and whatever the user adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Final

import numpy as np

from distckpt.errors import ConfigError, optional
from distckpt.selection.evaluation import Costs, Threshold, class_slugs
from distckpt.selection.predictions import Array, Predictions

Custom = Callable[[Predictions], Any]
"""Predictions to a number, or to several by name."""
_LARGEST: Final = 10**36  # strict JSON reads integers of 40 digits; a mean over many classes may need more


@dataclass(slots=True)
class Measured:
    """Metrics, the exact ratios among them, and the n of each; see ``Evaluation``."""

    metrics: dict[str, float | None] = field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None

    def ratio(self, name: str, numerator: int, denominator: int, n: int | None = None) -> None:
        """Add a metric that is a ratio of integers."""
        self.metrics[name] = numerator / denominator if denominator else None
        self.counts[name] = (int(numerator), int(denominator))
        self.n[name] = int(denominator if n is None else n)

    def number(self, name: str, value: float | None, n: int) -> None:
        """Add any other metric; it may be NaN or infinite, and None where it is undefined."""
        self.metrics[name], self.n[name] = (None if value is None else float(value)), int(n)


def measure(
    predictions: Predictions, *, custom: Mapping[str, Custom] | None = None, costs: Costs | None = None
) -> Measured:
    """Compute every metric that the predictions allow, then the user's own.

    Raises ``ConfigError`` for costs of unknown classes, and for a custom metric that returns no number or whose
    name is taken.
    """
    found = Measured()
    chosen = predictions.chosen()
    if predictions.labels is not None and chosen is not None:
        found.classes = predictions.class_names()
        matrix = confusion_matrix(predictions.labels, chosen, len(found.classes))
        found.confusion = tuple(tuple(map(int, row)) for row in matrix)
        from_confusion(found, costs)
    elif costs:
        raise ConfigError("costs need labels and predicted classes, which these predictions do not have")
    _areas(found, predictions)
    _losses(found, predictions)
    if predictions.texts is not None and predictions.references is not None:
        found.number("bleu", bleu_of(bleu_terms(predictions).sum(axis=0)), len(predictions))
    for name, function in (custom or {}).items():
        _add_custom(found, name, function(predictions), len(predictions))
    return found


def confusion_matrix(labels: Array, predicted: Array, classes: int) -> Array:
    """Return int64 counts (true class, predicted class)."""
    cells = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes)


def from_confusion(found: Measured, costs: Costs | None = None) -> None:
    """Add what follows from the confusion matrix, in exact arithmetic."""
    assert found.confusion is not None
    assert found.classes is not None
    matrix = found.confusion
    rows, support = sum(map(sum, matrix)), [sum(row) for row in matrix]
    said = [sum(column) for column in zip(*matrix, strict=True)]
    found.ratio("accuracy", sum(matrix[i][i] for i in range(len(matrix))), rows)
    f1: list[Fraction | None] = []
    for i, name in enumerate(class_slugs(found.classes)):
        hits = matrix[i][i]
        found.ratio(f"precision_{name}", hits, said[i])
        found.ratio(f"recall_{name}", hits, support[i])
        found.ratio(f"f1_{name}", 2 * hits, support[i] + said[i], n=support[i] + said[i] - hits)
        f1.append(Fraction(2 * hits, support[i] + said[i]) if support[i] + said[i] else None)
    defined = [value for value in f1 if value is not None]
    _fraction(found, "macro_f1", sum(defined, Fraction()) / len(defined) if defined else None, rows)
    weighted = sum((value * support[i] for i, value in enumerate(f1) if value is not None), Fraction())
    _fraction(found, "weighted_f1", weighted / rows if rows else None, rows)
    if costs:
        table = cost_table(found.classes, costs)
        total = sum((table[i][j] * matrix[i][j] for i in range(len(matrix)) for j in range(len(matrix))), Fraction())
        _fraction(found, "cost", total / rows if rows else None, rows)


def cost_table(classes: tuple[str, ...], costs: Costs) -> list[list[Fraction]]:
    """Return the cost of each cell, exactly as its decimal digits say; ``ConfigError`` for classes that are not there."""
    slugs = class_slugs(classes)
    table = [[Fraction() for _ in slugs] for _ in slugs]
    for pair, cost in costs.items():
        unknown = [name for name in pair if name.lower() not in slugs and name not in classes]
        if unknown or not math.isfinite(cost):
            raise ConfigError(f"cost of {pair}: {cost}: want a finite number for two of the classes {classes}")
        i, j = (classes.index(name) if name in classes else slugs.index(name.lower()) for name in pair)
        table[i][j] = Fraction(str(cost))
    return table


def _fraction(found: Measured, name: str, value: Fraction | None, n: int) -> None:
    if value is None:
        found.ratio(name, 0, 0, n)
    elif value.denominator > _LARGEST or value.numerator > _LARGEST:
        found.number(name, float(value), n)
    else:
        found.ratio(name, value.numerator, value.denominator, n)


def _areas(found: Measured, predictions: Predictions) -> None:
    """Add the areas under the ROC and precision-recall curves, where both sides of a class occur."""
    scores, labels = predictions.scores(), predictions.labels
    if scores is None or labels is None or not len(labels) or not np.isfinite(scores).all():
        return
    metrics = optional("sklearn.metrics", "eval")
    names = class_slugs(predictions.class_names())
    one_vs_rest: list[float | None] = []
    for i, name in enumerate(names):
        positive = labels == i
        mixed = 0 < int(positive.sum()) < len(labels)
        one_vs_rest.append(float(metrics.roc_auc_score(positive, scores[:, i])) if mixed else None)
        precision = metrics.average_precision_score(positive, scores[:, i]) if positive.any() else None
        found.number(f"pr_auc_{name}", precision, int(positive.sum()))
    if len(names) == 2:
        found.number("roc_auc", one_vs_rest[1], len(labels))
        return
    for name, value in zip(names, one_vs_rest, strict=True):
        found.number(f"roc_auc_{name}", value, len(labels))
    defined = [value for value in one_vs_rest if value is not None]
    found.number("roc_auc", math.fsum(defined) / len(defined) if defined else None, len(labels))


def _losses(found: Measured, predictions: Predictions) -> None:
    losses = predictions.row_losses()
    if losses is None:
        return
    terms = len(losses) if predictions.terms is None else int(predictions.terms.sum())
    # fsum has no order, so any number of ranks gives the same bits.
    total = math.fsum(losses) if np.isfinite(losses).all() else float(losses.sum())
    found.number("loss", total / terms if terms else None, terms)
    if predictions.terms is not None and terms:
        found.number("perplexity", perplexity(total / terms), terms)


def perplexity(loss: float) -> float:
    """Return e to the loss per token; infinite where that overflows."""
    return math.exp(loss) if loss < 709 else (math.nan if math.isnan(loss) else math.inf)


def bleu_terms(predictions: Predictions) -> Array:
    """Return what sacreBLEU's corpus score is a function of, (rows, 10) int64: summed over rows it is exact."""
    bleu = optional("sacrebleu", "eval").BLEU(effective_order=True)
    rows = []
    for text, reference in zip(predictions.texts or (), predictions.references or (), strict=True):
        one = bleu.sentence_score(text, [reference])
        rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    return np.array(rows, np.int64).reshape(-1, 10)


def bleu_of(totals: Array) -> float:
    """Return sacreBLEU's corpus score, 0 to 100, from summed ``bleu_terms``."""
    length, reference, *rest = map(int, totals)
    score = optional("sacrebleu", "eval").BLEU.compute_bleu(rest[:4], rest[4:], length, reference, smooth_method="exp")
    return float(score.score)


def _add_custom(found: Measured, name: str, value: Any, n: int) -> None:
    for key, one in value.items() if isinstance(value, Mapping) else [(name, value)]:
        if key in found.metrics:
            raise ConfigError(f"custom metric {key!r}: a metric of that name is there already; give it another name")
        if one is not None:
            try:
                one = float(one)
            except (TypeError, ValueError) as cause:
                raise ConfigError(f"custom metric {key!r} returned {one!r}, which is no number") from cause
        found.number(str(key), one, n)


# ---------------------------------------------------------------- the threshold


def at_threshold(predictions: Predictions, threshold: Threshold) -> Predictions:
    """Return the predictions with classes as the threshold has them. Raises ``ConfigError`` without scores."""
    scores, positive = predictions.scores(), class_index(predictions, threshold.positive)
    if scores is None:
        raise ConfigError("a threshold needs probabilities or logits, which these predictions do not have")
    others = scores.copy()
    others[:, positive] = -np.inf
    chosen = np.where(scores[:, positive] >= threshold.value, positive, others.argmax(axis=1))
    return replace(predictions, predicted=chosen)


def class_index(predictions: Predictions, name: str) -> int:
    """Return the number of a class by its name (any case); ``ConfigError`` if there is none."""
    names = predictions.class_names()
    slugs = class_slugs(names)
    if name in names or name.lower() in slugs:
        return names.index(name) if name in names else slugs.index(name.lower())
    raise ConfigError(f"class {name!r}: the classes are {', '.join(names)}")
