"""The threshold is a free parameter: fixed for all checkpoints, or chosen for each on validation, and always said."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from distckpt.errors import ConfigError
from distckpt.selection.cache import load_predictions
from distckpt.selection.evaluation import Costs, Evaluation, Threshold, costs_of
from distckpt.selection.metrics import at_threshold, class_index, cost_table, measure
from distckpt.selection.predictions import Array, Predictions

_AIMS = ("f1", "precision", "recall", "accuracy", "cost")


@dataclass(frozen=True, slots=True)
class ThresholdRule:
    """How a checkpoint's threshold for ``positive`` is chosen: the best ``aim`` of the class, perhaps under a constraint.

    ``aim``: f1, precision, recall, accuracy (positive or not) or cost. ``at_least``: (precision or recall, bound).
    Of several that are equal, the highest threshold.
    """

    positive: str
    aim: str = "f1"
    at_least: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        if self.aim not in _AIMS or (self.at_least is not None and self.at_least[0] not in ("precision", "recall")):
            raise ConfigError(
                f"threshold by {self.aim!r}, {self.at_least}: want one of {', '.join(_AIMS)}, and at_least of precision or recall"
            )

    def __str__(self) -> str:
        least = "" if self.at_least is None else f" with {self.at_least[0]} >= {self.at_least[1]}"
        return f"best {self.aim} of {self.positive}{least}"


def choose_threshold(
    predictions: Predictions, rule: ThresholdRule, *, data: str = "this data", costs: Costs | None = None
) -> Threshold:
    """Return the threshold that the rule chooses on these rows, among the scores that occur.

    It is chosen on the rows that it is then judged on, so its metrics look better than they are: judge it on others.
    Raises ``ConfigError`` without scores and labels, or where no threshold meets the constraint.
    """
    scores, labels = predictions.scores(), predictions.labels
    if scores is None or labels is None:
        raise ConfigError("a threshold needs labels and probabilities or logits, which these predictions do not have")
    which = class_index(predictions, rule.positive)
    order = np.argsort(-scores[:, which], kind="stable")
    values, positive = scores[order, which], (labels == which)[order]
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # rows of equal score go together
    hits, said = np.cumsum(positive)[last], last + 1
    true, rows = int(positive.sum()), len(values)
    aims = {
        "f1": 2 * hits / np.maximum(said + true, 1),
        "precision": hits / said,
        "recall": hits / max(true, 1),
        "accuracy": (hits + (rows - true) - (said - hits)) / rows,
    }
    if rule.aim == "cost":
        aims["cost"] = -_costs(predictions, rule.positive, costs, hits, said, true)
    allowed = np.ones(len(said), np.bool_) if rule.at_least is None else aims[rule.at_least[0]] >= rule.at_least[1]
    if not allowed.any():
        raise ConfigError(f"no threshold has {rule}: {rule.at_least} is out of reach on {data}")
    best = int(np.argmax(np.where(allowed, aims[rule.aim], -np.inf)))
    return Threshold(rule.positive, float(values[last[best]]), f"chosen on {data}, n={rows}: {rule}")


def _costs(predictions: Predictions, positive: str, costs: Costs | None, hits: Array, said: Array, true: int) -> Array:
    if not costs or predictions.class_count != 2:
        raise ConfigError("a threshold by cost needs costs (costs=..., --cost) and two classes")
    which = class_index(predictions, positive)
    table = [[float(cell) for cell in row] for row in cost_table(predictions.class_names(), costs)]
    return table[which][1 - which] * (true - hits) + table[1 - which][which] * (said - hits)


def kept_predictions(evaluation: Evaluation) -> Predictions:
    """Return what was kept about each row, at the evaluation's threshold. Raises as ``load_predictions``."""
    predictions = load_predictions(evaluation)
    return predictions if evaluation.threshold is None else at_threshold(predictions, evaluation.threshold)


def with_threshold(
    evaluation: Evaluation, predictions: Predictions, threshold: Threshold, *, costs: Costs | None = None
) -> Evaluation:
    """Return the evaluation with every metric at this threshold; own metrics are left out where they cannot be redone."""
    found = measure(at_threshold(predictions, threshold), costs=costs or costs_of(evaluation))
    return replace(
        evaluation,
        metrics=found.metrics,
        counts=found.counts,
        n=found.n,
        confusion=found.confusion,
        threshold=threshold,
    )
