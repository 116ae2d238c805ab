"""Is anything better than the best single checkpoint: candidates of all kinds in one table, and a recommendation in words.

What is chosen is chosen on validation. The test set reports and has no say, so that its numbers stay what they claim.
``averaging/contenders.py`` makes the candidates of a run; here they are already evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from distckpt.errors import CheckpointNotFound, ConfigError
from distckpt.selection.evaluation import Evaluation, costs_of
from distckpt.selection.ledger import Candidate, candidate_of
from distckpt.selection.predictions import Predictions
from distckpt.selection.rules import Rule, as_rule, best_by, choose, eligible, exact_value
from distckpt.selection.select import check_comparable
from distckpt.selection.statistics import (
    Comparison,
    Interval,
    bootstrap_interval,
    compare_with_best,
    is_proportion,
    wilson,
)
from distckpt.selection.totals import row_totals
from distckpt.selection.verdict import BEST_BY, shown_apart, verdict

Kind = Literal["single", "average", "ema", "soup", "ensemble"]
LOWER_IS_BETTER = ("loss", "cost", "perplexity")


@dataclass(frozen=True, slots=True)
class Entrant:
    """A candidate with what it said about each row. ``how``: what it is made of; ``models``: that run for each row."""

    name: str
    kind: Kind
    validation: Evaluation
    predictions: Predictions
    test: Evaluation | None = None
    test_predictions: Predictions | None = None
    how: str = ""
    models: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. ``intervals``: of the rule's metrics and of proportions; None where there is none.

    ``against``: compared with the best single checkpoint on validation, which chose that one and so flatters it;
    ``against_test``: on the test set, which is fair to both. None for that checkpoint itself, and without such rows.
    """

    name: str
    kind: Kind
    how: str
    models: int
    validation: Evaluation
    test: Evaluation | None
    intervals: Mapping[str, Interval | None]
    test_intervals: Mapping[str, Interval | None]
    against: Comparison | None = None
    against_test: Comparison | None = None


@dataclass(frozen=True, slots=True)
class CandidateComparison:
    """The table and what follows from it.

    ``single``: the best single checkpoint by the rule; ``chosen``: the best of all by the rule; ``recommended``: the
    chosen one if the validation rows show it to be better, else the single one. ``metric``, ``mode``: what was tested;
    ``looks``: how many candidates were scored on validation; ``left_out``: what could not be made, and why; ``threshold``: by
    which each candidate got its own on validation, empty where the highest score decides.
    """

    rule: str
    metric: str
    mode: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    single: str
    chosen: str
    recommended: str
    validation: str
    test: str | None
    looks: int
    alpha: float
    left_out: tuple[str, ...]
    threshold: str
    words: tuple[str, ...]

    def row(self, name: str) -> Row:
        """Return the line of a candidate."""
        return next(row for row in self.rows if row.name == name)

    @property
    def winner(self) -> Row:
        """The line of what is recommended."""
        return self.row(self.recommended)

    def to_json(self) -> dict[str, Any]:
        """Return plain values: the table without what was said about each row."""
        facts = {name: getattr(self, name) for name in self.__slots__ if name != "rows"}
        return facts | {"rows": [_row_json(row, self.metrics) for row in self.rows]}


def compare_entrants(
    entrants: Sequence[Entrant],
    rule: Rule | str,
    *,
    metrics: Sequence[str] = (),
    criteria: Sequence[tuple[str, str]] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    looks: int | None = None,
    left_out: Sequence[str] = (),
    threshold: str = "",
) -> CandidateComparison:
    """Compare evaluated candidates with the best single checkpoint by ``rule``, on validation and on a test set.

    The table has the best single checkpoint by the rule, by each of ``criteria`` (metric and mode; default: the rule's
    metrics, accuracy, macro F1, loss), the newest, and everything that is no single checkpoint. ``metrics``: shown
    beside what the rule asks first, which is also what is tested: McNemar for accuracy and recall, else permutation, Holm
    over the candidates.

    Raises ``ConfigError`` for a rule without ``max`` or ``min``, candidates on different rows, two of one name;
    ``CheckpointNotFound`` where no single checkpoint meets the rule.
    """
    parsed = as_rule(rule)
    aim = parsed.aim
    if aim is None:
        raise ConfigError(f"rule {parsed}: without a 'max' or 'min' there is nothing to compare by")
    names = [one.name for one in entrants]
    if len(set(names)) < len(names):
        raise ConfigError(f"candidates {names}: two have one name")
    check_comparable([candidate_of(one.validation) for one in entrants])
    check_comparable([candidate_of(one.test) for one in entrants if one.test is not None])
    compared = _Compared(parsed, {one.name: one for one in entrants}, confidence, resamples, seed)
    singles = [one for one in entrants if one.kind == "single"]
    single = compared.best(singles, parsed)
    if single is None:
        raise CheckpointNotFound(f"no single checkpoint meets {parsed} on {entrants[0].validation.data}")
    wanted = _criteria(parsed, singles[0].validation) if criteria is None else list(criteria)
    labels: dict[str, list[str]] = {single.name: ["the rule"]}
    for metric, mode in wanted:
        best = compared.best(singles, best_by(metric, mode))
        if best is not None:
            labels.setdefault(best.name, []).append(metric)
    newest = max(singles, key=lambda one: (one.validation.step, one.validation.generation))
    labels.setdefault(newest.name, []).append("newest")
    shown = [replace(one, how=_how(labels[one.name])) for one in singles if one.name in labels]
    shown = sorted(shown, key=lambda one: one.name != single.name) + [one for one in entrants if one.kind != "single"]
    chosen = compared.best(shown, parsed) or single
    if all(exact_value(_as(chosen), m) == exact_value(_as(single), m) for m in parsed.metrics):
        chosen = single  # equal in all that was asked for: the plainer one
    columns = tuple(dict.fromkeys([*parsed.metrics, *metrics]))
    rows = compared.rows(shown, single.name, columns)
    row = next(row for row in rows if row.name == chosen.name)
    recommended = chosen.name if chosen.name == single.name or shown_apart(row.against, aim.mode, 1) else single.name
    found = CandidateComparison(
        str(parsed), aim.metrics[0], aim.mode, columns, tuple(rows), single.name, chosen.name, recommended,
        str(single.validation.data), None if single.test is None else str(single.test.data),
        len(entrants) if looks is None else looks, 1 - confidence, tuple(left_out), threshold, (),
    )  # fmt: skip
    return replace(found, words=tuple(verdict(found)))


@dataclass(slots=True)
class _Compared:
    """What one comparison asks again and again."""

    rule: Rule
    entrants: Mapping[str, Entrant]
    confidence: float
    resamples: int
    seed: int

    def best(self, pool: Sequence[Entrant], rule: Rule) -> Entrant | None:
        """Return what a rule chooses, None where nothing meets it."""

        def ends(candidate: Candidate, metric: str) -> tuple[float, float] | None:
            one = self.entrants[candidate.name]
            found = self.interval(one.validation, one.predictions, metric)
            return None if found is None else (found.low, found.high)

        left, _ = eligible(rule, [_as(one) for one in pool], ends)
        winner = choose(rule, left)[0].name if left else None
        return next((one for one in pool if one.name == winner), None)

    def interval(self, evaluation: Evaluation, predictions: Predictions, metric: str) -> Interval | None:
        """Return Wilson's interval of a proportion, else the bootstrap's."""
        if is_proportion(evaluation, metric):
            return wilson(*evaluation.counts[metric], self.confidence)
        if not _can_be_drawn(evaluation, predictions, metric):
            return None
        options = {"confidence": self.confidence, "resamples": self.resamples, "seed": self.seed}
        return bootstrap_interval(predictions, metric, costs=costs_of(evaluation), **options)  # type: ignore[arg-type]

    def intervals(
        self, evaluation: Evaluation, predictions: Predictions, metrics: Sequence[str]
    ) -> dict[str, Interval | None]:
        """Return the intervals of what the rule asks for, and of other metrics where they cost nothing."""
        wanted = [m for m in metrics if m in self.rule.metrics or is_proportion(evaluation, m)]
        return {metric: self.interval(evaluation, predictions, metric) for metric in wanted}

    def rows(self, shown: Sequence[Entrant], single: str, metrics: Sequence[str]) -> list[Row]:
        """Return the lines, each compared with the best single checkpoint on both sets of rows."""
        validation = self._against({one.name: (one.validation, one.predictions) for one in shown}, single)
        tested = {one.name: (one.test, one.test_predictions) for one in shown
                  if one.test is not None and one.test_predictions is not None}  # fmt: skip
        test = self._against(tested, single) if single in tested else {}
        found = []
        for one in shown:
            own = self.intervals(one.validation, one.predictions, metrics)
            other = self.intervals(*tested[one.name], metrics) if one.name in tested else {}
            found.append(Row(one.name, one.kind, one.how, one.models, one.validation, one.test, own, other,
                             validation.get(one.name), test.get(one.name)))  # fmt: skip
        return found

    def _against(self, every: Mapping[str, tuple[Evaluation, Predictions]], single: str) -> dict[str, Comparison]:
        aim = self.rule.aim
        assert aim is not None
        metric, (evaluation, predictions) = aim.metrics[0], every[single]
        if not _can_be_drawn(evaluation, predictions, metric):
            return {}  # there is a table, and no test
        found = compare_with_best(
            {name: said for name, (_, said) in every.items()}, metric, aim.mode, best=single, costs=costs_of(evaluation),
            alpha=1 - self.confidence, resamples=self.resamples, seed=self.seed,
        )  # fmt: skip
        return {one.name: one for one in found}


def _how(labels: Sequence[str]) -> str:
    return "the newest" if list(labels) == ["newest"] else BEST_BY + ", ".join(labels)


def _can_be_drawn(evaluation: Evaluation, predictions: Predictions, metric: str) -> bool:
    """Whether a metric can be had of resampled rows: not if it is undefined, or the user's own."""
    known = (
        metric.startswith(("roc_auc", "pr_auc")) or row_totals(predictions, metric, costs_of(evaluation)) is not None
    )
    return known and evaluation.metrics.get(metric) is not None


def _as(one: Entrant) -> Candidate:
    return replace(candidate_of(one.validation), name=one.name)


def _criteria(rule: Rule, evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return the metrics of the rule as it asks for them, then the usual ones that are there."""
    asked = {name: clause.mode for clause in rule.clauses if hasattr(clause, "mode") and len(clause.metrics) == 1
             for name in clause.metrics}  # fmt: skip
    usual = [name for name in ("accuracy", "macro_f1", "bleu", "loss", "cost") if name in evaluation.metrics]
    return [*asked.items(), *((n, "min" if n in LOWER_IS_BETTER else "max") for n in usual if n not in asked)]


def _row_json(row: Row, metrics: Sequence[str]) -> dict[str, Any]:
    def side(evaluation: Evaluation | None, intervals: Mapping[str, Interval | None]) -> Any:
        if evaluation is None:
            return None
        return {
            "data": str(evaluation.data),
            "metrics": dict(evaluation.metrics),
            "counts": {m: evaluation.counts[m] for m in metrics if m in evaluation.counts},
            "n": {m: evaluation.n[m] for m in metrics if m in evaluation.n},
            "intervals": dict(intervals),
        }

    return {
        "name": row.name, "kind": row.kind, "how": row.how, "models": row.models, "path": row.validation.checkpoint.path,
        "step": row.validation.step, "prefix": row.validation.checkpoint.prefix,
        "validation": side(row.validation, row.intervals), "test": side(row.test, row.test_intervals),
        "against": row.against, "against_test": row.against_test,
    }  # fmt: skip
