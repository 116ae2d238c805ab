"""Choose checkpoints by a rule, and say how the choice came about: constraints, ties, what was missing, which threshold."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distckpt.errors import CheckpointNotFound, ConfigError
from distckpt.selection.cache import load_predictions
from distckpt.selection.evaluation import Costs, Evaluation, Threshold, value_and_n
from distckpt.selection.ledger import Candidate, candidate_of, candidates_of
from distckpt.selection.metrics import Measured, from_confusion
from distckpt.selection.rules import Rule, Stage, as_rule, best_by, choose, eligible, exact_value, pareto_front, ranked
from distckpt.selection.statistics import interval_of
from distckpt.selection.thresholds import ThresholdRule, choose_threshold, with_threshold

log = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True)
class Choice:
    """What a rule chose. ``ranked``: the best ones in order, none where no candidate met the rule.

    ``stages``: what each clause left, in order; ``missing``: metric to the names that lack it (absent, 0/0, NaN: they
    can neither win nor block). ``tied``: those equal to the winner by what the rule asks first. ``data``: on what;
    ``candidates``: all there were, as the rule saw them.
    """

    rule: str
    ranked: tuple[Candidate, ...]
    stages: tuple[Stage, ...]
    missing: tuple[tuple[str, tuple[str, ...]], ...]
    tied: tuple[str, ...]
    data: str
    threshold: str
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()

    @property
    def winner(self) -> Candidate | None:
        """The best one."""
        return self.ranked[0] if self.ranked else None

    def lines(self) -> list[str]:
        """Return the story of the choice, a line each: n beside every number, ties and missing values said."""
        by_name = {candidate.name: candidate for candidate in self.candidates}
        out = [f"{len(self.candidates)} candidates on {self.data}; {self.threshold}"]
        for metric, lacking in self.missing:
            out.append(f"{metric} is missing (absent, 0/0 or NaN), so these cannot win by it: {', '.join(lacking)}")
        for stage in self.stages:
            out.append(_stage_line(stage, by_name))
        if self.winner is None:
            out.append("no candidate meets the rule")
        return [*out, *self.notes]


def select(
    candidates: str | os.PathLike[str] | Sequence[Any],
    rule: Rule | str,
    *,
    data: str | None = None,
    evaluator: str | None = None,
    k: int = 1,
    costs: Costs | None = None,
    threshold: Threshold | ThresholdRule | None = None,
    confidence: float = 0.95,
) -> Choice:
    """Choose the best ``k`` by a rule (see ``rules.py``), such as ``lower recall_a >= 0.87, then max f1_a, then earliest``.

    ``candidates``: a root (with ``data``: of the evaluations on it; without: of the run's own metrics and history), a
    results folder, or a list of paths, evaluations and candidates. ``costs``: for the metric ``cost``, from the stored
    confusion matrices. ``threshold``: a fixed one, or a rule by which each checkpoint gets its own on this data.
    ``confidence``: of the intervals that ``lower`` and ``upper`` ask for.

    Raises ``ConfigError`` for a rule that is none, evaluations on different rows or with different classes;
    ``CheckpointNotFound`` where there is no candidate, or none has what the rule asks for.
    """
    parsed = as_rule(rule)
    found = candidates_of(candidates, data, evaluator=evaluator)
    if not found:
        raise CheckpointNotFound("there is nothing to choose from")
    if k < 1:
        raise ConfigError(f"k={k}: want at least 1")
    notes = check_comparable(found)
    found = [_adjusted(candidate, costs, threshold) for candidate in found]
    _check_known(parsed, found)

    def ends(candidate: Candidate, metric: str) -> tuple[float, float] | None:
        interval = interval_of(candidate, metric, confidence=confidence)
        return None if interval is None else (interval.low, interval.high)

    pool, stages = eligible(parsed, found, ends)
    order = ranked(parsed, pool, k)
    how = choose(parsed, pool)[1] if pool else []
    tied = next((stage.kept for stage in how if stage.clause == str(parsed.aim)), ())
    lacking = {m: tuple(c.name for c in found if exact_value(c, m, _mode(parsed, m)) is None) for m in parsed.metrics}
    on = {str(c.evaluation.data) for c in found if c.evaluation is not None} or {"the run's own metrics"}
    return Choice(
        str(parsed), tuple(order), (*stages, *how), tuple((m, names) for m, names in lacking.items() if names),
        tied if len(tied) > 1 else (), " and ".join(sorted(on)), _threshold_text(threshold, order), tuple(found), tuple(notes),
    )  # fmt: skip


def select_top_k_by_metric(
    checkpoints: str | os.PathLike[str] | Sequence[Any],
    metric_name: str = "loss",
    mode: str = "min",
    k: int = 5,
    *,
    data: str | None = None,
    tie_breaks: Sequence[tuple[str, str] | str] = (),
) -> list[str]:
    """Return the paths of the best ``k`` checkpoints by one metric, best first; fewer where fewer have it.

    ``checkpoints``: a root, a list of paths, or what ``list_checkpoints`` and ``evaluate_checkpoints`` return. The metric
    is one that ``save`` was given, one of the history at the same step, or with ``data`` one of the evaluations on it.
    Equals: ``tie_breaks`` as in ``CheckpointConfig``, else the earlier. NaN counts as missing, which is warned about.

    Raises ``CheckpointNotFound`` where none has the metric, ``ConfigError`` for a wrong mode.

    Example::

        average_checkpoints(select_top_k_by_metric("runs/line", "val_loss", k=5), "runs/averaged")
    """
    choice = select(checkpoints, best_by(metric_name, mode, tie_breaks), data=data, k=k)
    lacking = dict(choice.missing).get(metric_name, ())
    if lacking:
        log.warning("%s is missing in %s: not among the best", metric_name, ", ".join(lacking))
    return [candidate.path for candidate in choice.ranked]


def pareto(
    candidates: str | os.PathLike[str] | Sequence[Any],
    objectives: Sequence[tuple[str, str]],
    *,
    data: str | None = None,
) -> list[Candidate]:
    """Return the candidates that no other beats in every (metric, mode), earliest first. Errors as in ``select``."""
    found = candidates_of(candidates, data)
    check_comparable(found)
    return pareto_front(found, objectives)


def check_comparable(candidates: Sequence[Candidate]) -> list[str]:
    """Raise ``ConfigError`` unless all were evaluated on the same rows with the same classes; return notes."""
    done = [candidate.evaluation for candidate in candidates if candidate.evaluation is not None]
    if done and len(done) != len(candidates):
        raise ConfigError("some candidates have evaluations and some the run's own metrics; compare like with like")
    for what, facts in (("rows", [one.data.digest for one in done]), ("classes", [one.classes for one in done])):
        other = next((index for index, fact in enumerate(facts) if fact != facts[0]), None)
        if other is not None:
            told = [f"{one.name} on {one.data}, classes {one.classes}" for one in (done[0], done[other])]
            raise ConfigError(
                f"evaluations on different {what} are not comparable: {told[0]}; {told[1]}; evaluate again"
            )
    versions = sorted({f"{one.evaluator.name} {one.evaluator.version}" for one in done})
    return [f"note: evaluated in {len(versions)} ways: {'; '.join(versions)}"] if len(versions) > 1 else []


def _adjusted(candidate: Candidate, costs: Costs | None, threshold: Threshold | ThresholdRule | None) -> Candidate:
    """Return the candidate at the threshold and with the costs, from what was kept of its evaluation."""
    evaluation = candidate.evaluation
    if evaluation is None:
        if costs or threshold:
            raise ConfigError(f"{candidate.name}: costs and thresholds need evaluations; name the data")
        return candidate
    if threshold is not None:
        predictions = load_predictions(evaluation)
        if isinstance(threshold, ThresholdRule):
            value = choose_threshold(predictions, threshold, data=evaluation.data.name, costs=costs)
        else:
            value = threshold
        return candidate_of(with_threshold(evaluation, predictions, value, costs=costs))
    if costs:
        return candidate_of(with_costs(evaluation, costs))
    return candidate


def with_costs(evaluation: Evaluation, costs: Costs) -> Evaluation:
    """Return an evaluation with the metric ``cost`` (per row), from its confusion matrix. Raises ``ConfigError``."""
    if evaluation.confusion is None:
        raise ConfigError(f"{evaluation.name}: costs need a confusion matrix, which this evaluation does not have")
    found = Measured(classes=evaluation.classes, confusion=evaluation.confusion)
    from_confusion(found, costs)
    return replace(
        evaluation,
        metrics={**evaluation.metrics, "cost": found.metrics["cost"]},
        counts={**evaluation.counts, **{name: c for name, c in found.counts.items() if name == "cost"}},
        n={**evaluation.n, "cost": found.n["cost"]},
        costs=tuple((true, said, float(cost)) for (true, said), cost in costs.items()),
    )


def _check_known(rule: Rule, found: Sequence[Candidate]) -> None:
    for metric in rule.metrics:
        if not any(metric in candidate.metrics for candidate in found):
            known = sorted({name for candidate in found for name in candidate.metrics})
            raise CheckpointNotFound(f"no candidate has the metric {metric!r}; there are {', '.join(known) or 'none'}")


def _mode(rule: Rule, metric: str) -> str:
    return rule.aim.mode if rule.aim is not None and metric in rule.aim.metrics else "max"


def _threshold_text(threshold: Threshold | ThresholdRule | None, order: Sequence[Candidate]) -> str:
    if threshold is None:
        return "the highest score decides a row's class"
    if isinstance(threshold, Threshold):
        return f"threshold for all: {threshold}"
    best = order[0].evaluation.threshold if order and order[0].evaluation is not None else None
    return f"each candidate has its own threshold ({threshold}), chosen on this data" + (
        f"; the winner's: {best}" if best else ""
    )


def _stage_line(stage: Stage, by_name: dict[str, Candidate]) -> str:
    def told(name: str) -> str:
        values = [shown(by_name[name], metric) for clause in as_rule(stage.clause).clauses for metric in clause.metrics]
        return f"{name} {' '.join(values)}".rstrip()

    out = (
        f"; out: {', '.join(map(told, stage.dropped[:6]))}{' ...' * (len(stage.dropped) > 6)}" if stage.dropped else ""
    )
    lacking = f"; without it: {', '.join(stage.missing)}" if stage.missing else ""
    kept = ", ".join(map(told, stage.kept[:6])) + " ..." * (len(stage.kept) > 6)
    return f"{stage.clause}: {f'tie of {len(stage.kept)}: ' if stage.tie else ''}{kept or 'none'}{out}{lacking}"


def shown(candidate: Candidate, metric: str) -> str:
    """Return a candidate's value with what it rests on: ``0.8700 (348/400)``."""
    if candidate.evaluation is not None:
        return value_and_n(candidate.evaluation, metric)
    value = candidate.metrics.get(metric)
    return "missing" if value is None else f"{value:.6g}"
