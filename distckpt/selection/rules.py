"""Rules that choose: constraints, then metrics in order with tolerances, then earlier, later or smaller. Pure.

In words: ``recall_negative >= 0.87, then max f1_negative within 0.005, then max recall_negative, then earliest``;
``lower recall_negative >= 0.87`` asks the lower end of its interval; ``max 0.7*recall_a + 0.3*precision_a`` weighs.
Ratios of counts are compared exactly: recall on 78 positives has 79 values, and equal ones are a tie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar

from distckpt.errors import ConfigError
from distckpt.manager.ranking import check_mode, measured

Number: TypeAlias = Fraction | float
End = Literal["value", "lower", "upper"]
_NUMBER: Final = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NAME: Final = r"[^\s,;<>=*]+"
_REQUIRE: Final = re.compile(rf"(?:(lower|upper)\s+)?({_NAME})\s*(>=|<=|>|<)\s*({_NUMBER})")
_BEST: Final = re.compile(rf"(max|min)\s+(.+?)(?:\s+within\s+({_NUMBER}))?")
_TERM: Final = re.compile(rf"(?:({_NUMBER})\s*\*\s*)?({_NAME})")
_PREFER: Final = {"earliest": "earliest", "earlier": "earliest", "latest": "latest", "later": "latest",
                  "smallest": "smallest", "smaller": "smallest"}  # fmt: skip


class Candidate(Protocol):
    """What is chosen from: metrics, and for ratios their counts."""

    @property
    def name(self) -> str:
        """Short name, for messages."""

    @property
    def step(self) -> int:
        """Training step."""

    @property
    def generation(self) -> int:
        """Job start."""

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metric to value."""

    @property
    def counts(self) -> Mapping[str, tuple[int, int]]:
        """Metric to (numerator, denominator)."""


C = TypeVar("C", bound=Candidate)
Interval = Callable[[Any, str], tuple[float, float] | None]
"""(candidate, metric) to the ends of its interval; None where it has none."""


@dataclass(frozen=True, slots=True)
class Require:
    """Only candidates whose metric (or an end of its interval) is on this side of a bound."""

    metric: str
    op: Literal[">=", "<=", ">", "<"]
    bound: str
    end: End = "value"

    def __str__(self) -> str:
        return f"{'' if self.end == 'value' else f'{self.end} '}{self.metric} {self.op} {self.bound}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it looks at."""
        return (self.metric,)

    def met(self, candidate: Candidate, interval: Interval) -> bool | None:
        """Say whether it holds; None where the metric is missing."""
        found: Number | None
        if self.end == "value":
            found = exact_value(candidate, self.metric)
        else:
            ends = interval(candidate, self.metric)
            found = None if ends is None else _decimal(ends[self.end == "upper"])
        if found is None:
            return None
        bound = Fraction(self.bound)
        return {">=": found >= bound, "<=": found <= bound, ">": found > bound, "<": found < bound}[self.op]


@dataclass(frozen=True, slots=True)
class Best:
    """The best by a metric, or by a weighted sum of several; all within ``within`` of it stay for the next clause."""

    terms: tuple[tuple[str, str], ...]
    """(weight as its decimal digits, metric)"""
    mode: Literal["max", "min"]
    within: str = "0"

    def __str__(self) -> str:
        sums = " + ".join(name if weight == "1" else f"{weight}*{name}" for weight, name in self.terms)
        return f"{self.mode} {sums}{'' if Fraction(self.within) == 0 else f' within {self.within}'}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it looks at."""
        return tuple(name for _, name in self.terms)

    def value(self, candidate: Candidate) -> Number | None:
        """Return the sum (see ``exact_value``), None where a term is missing."""
        found: list[Number] = []
        for weight, metric in self.terms:
            mode = self.mode if Fraction(weight) >= 0 else {"max": "min", "min": "max"}[self.mode]
            value = exact_value(candidate, metric, mode)
            if value is None:
                return None
            found.append(Fraction(weight) * value)
        return sum(found[1:], found[0])


@dataclass(frozen=True, slots=True)
class Prefer:
    """What decides between equals at last."""

    what: Literal["earliest", "latest", "smallest"]

    def __str__(self) -> str:
        return self.what

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it looks at."""
        return ()


Clause: TypeAlias = Require | Best | Prefer


@dataclass(frozen=True, slots=True)
class Rule:
    """Clauses in order; ``earliest`` decides what they leave open."""

    clauses: tuple[Clause, ...]

    def __str__(self) -> str:
        return ", then ".join(map(str, self.clauses))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that it looks at, in order."""
        return tuple(dict.fromkeys(name for clause in self.clauses for name in clause.metrics))

    @property
    def aim(self) -> Best | None:
        """The first clause that asks for a best: what the choice is about."""
        return next((clause for clause in self.clauses if isinstance(clause, Best)), None)


def as_rule(rule: Rule | str) -> Rule:
    """Return a rule, parsed if it is text. Raises ``ConfigError`` that names the clause."""
    if isinstance(rule, Rule):
        return rule
    texts = [part.strip() for part in re.split(r"[,;]|\bthen\b", rule) if part.strip()]
    if not texts:
        raise ConfigError(f"rule {rule!r} is empty; say for example 'max f1_negative, then max recall_negative'")
    clauses = tuple(map(_clause, texts))
    for place, clause in enumerate(clauses):
        if isinstance(clause, Prefer) and clause.what != "smallest" and place != len(clauses) - 1:
            raise ConfigError(f"rule {rule!r}: {clause} decides every tie, so nothing may follow it")
        if isinstance(clause, Require) and any(isinstance(before, Best) for before in clauses[:place]):
            raise ConfigError(f"rule {rule!r}: the constraint {clause} has to come before what is best")
    return Rule(clauses)


def best_by(metric: str, mode: str, tie_breaks: Sequence[tuple[str, str] | str] = ()) -> Rule:
    """Return the rule for one metric and tie-breaks as ``CheckpointConfig`` has them."""
    clauses: list[Clause] = []
    for name, direction in [(metric, mode), *(rule for rule in tie_breaks if not isinstance(rule, str))]:
        check_mode(direction, f"mode of {name}")
        clauses.append(Best((("1", name),), "max" if direction == "max" else "min"))
    return Rule((*clauses, *(_clause(rule) for rule in tie_breaks if isinstance(rule, str))))


def _clause(text: str) -> Clause:
    if text.lower() in _PREFER:
        return Prefer(_PREFER[text.lower()])  # type: ignore[arg-type]
    require = _REQUIRE.fullmatch(text)
    if require is not None:
        return Require(require[2], require[3], require[4], require[1] or "value")  # type: ignore[arg-type]
    best = _BEST.fullmatch(text)
    if best is None:
        raise ConfigError(
            f"rule: {text!r} is no clause; clauses are 'max NAME', 'min NAME within 0.01', 'NAME >= 0.9', 'lower NAME >= 0.9', "
            "'earliest', 'latest', 'smallest'"
        )
    terms = []
    for sign, part in _signed(best[2]):
        term = _TERM.fullmatch(part)
        if term is None:
            raise ConfigError(f"rule: {text!r}: {part!r} is no metric; write sums as 0.7*recall_a + 0.3*precision_a")
        terms.append((f"{sign}{term[1] or '1'}", term[2]))
    if float(best[3] or 0) < 0:
        raise ConfigError(f"rule: {text!r}: a tolerance cannot be negative")
    return Best(tuple(terms), best[1], best[3] or "0")  # type: ignore[arg-type]


def _signed(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"\s+([+-])\s+", text)
    return [("-" if sign == "-" else "", part) for sign, part in zip(["+", *parts[1::2]], parts[::2], strict=True)]


def exact_value(candidate: Candidate, metric: str, mode: str = "max") -> Number | None:
    """Return a metric as its counts have it, else as the decimal digits that it is shown with; None if it is missing.

    So ratios that are equal tie, and a tolerance of 0.01 reaches from 0.87 to 0.88 and not just short of it. Missing:
    absent, undefined (0/0), NaN, or infinite in the winning direction (see ``manager/ranking.py``).
    """
    counts = candidate.counts.get(metric)
    if counts is not None:
        return Fraction(*counts) if counts[1] else None
    value = measured(candidate.metrics.get(metric), mode)
    return None if value is None else _decimal(value)


def _decimal(value: float) -> Number:
    return Fraction(repr(float(value))) if math.isfinite(value) else value


# ---------------------------------------------------------------- deciding


@dataclass(frozen=True, slots=True)
class Stage:
    """What one clause left: ``kept`` and ``dropped`` names, those that lack the metric, and what was found in words."""

    clause: str
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    tie: bool


def eligible(rule: Rule, candidates: Sequence[C], interval: Interval) -> tuple[list[C], list[Stage]]:
    """Return the candidates that meet every constraint and have what the first ``max`` or ``min`` asks for."""
    pool, stages = list(candidates), []
    for clause in rule.clauses:
        if isinstance(clause, Require):
            verdicts = [(candidate, clause.met(candidate, interval)) for candidate in pool]
            missing = [candidate.name for candidate, verdict in verdicts if verdict is None]
            dropped = [candidate.name for candidate, verdict in verdicts if verdict is False]
            pool = [candidate for candidate, verdict in verdicts if verdict]
            stages.append(Stage(str(clause), _names(pool), tuple(dropped), tuple(missing), False))
    if rule.aim is not None:
        pool = [candidate for candidate in pool if rule.aim.value(candidate) is not None]
    return pool, stages


def choose(rule: Rule, pool: Sequence[C]) -> tuple[C, list[Stage]]:
    """Return the one that the rule's preferences choose from a pool that is not empty, and how."""
    left, stages = list(pool), []
    for clause in rule.clauses:
        if isinstance(clause, Best):
            left, stage = _best(clause, left)
        elif isinstance(clause, Prefer):
            left, stage = _prefer(clause, left)
        else:
            continue
        stages.append(stage)
    if len(left) > 1:
        left, stage = _prefer(Prefer("earliest"), left)
        stages.append(stage)
    return left[0], stages


def ranked(rule: Rule, pool: Sequence[C], k: int) -> list[C]:
    """Return the best ``k``: the choice, the choice among the others, and so on."""
    left, order = list(pool), list[C]()
    while left and len(order) < k:
        chosen, _ = choose(rule, left)
        order.append(chosen)
        left = [candidate for candidate in left if candidate is not chosen]
    return order


def _best(clause: Best, left: list[C]) -> tuple[list[C], Stage]:
    values = [(candidate, clause.value(candidate)) for candidate in left]
    have = [(candidate, value) for candidate, value in values if value is not None]
    missing = tuple(candidate.name for candidate, value in values if value is None)
    if not have:
        return left, Stage(str(clause), _names(left), (), missing, False)
    if len({all(name in candidate.counts for name in clause.metrics) for candidate, _ in have}) > 1:
        have = [(candidate, _decimal(float(value))) for candidate, value in have]  # counts of some: as floats all
    top, within = have[0][1], Fraction(clause.within)
    for _, value in have:
        if (value > top) if clause.mode == "max" else (value < top):
            top = value
    kept = [candidate for candidate, value in have if value == top or -within <= _gap(value, top) <= within]
    dropped = tuple(candidate.name for candidate, _ in have if candidate not in kept)
    return kept, Stage(str(clause), _names(kept), dropped, missing, len(kept) > 1)


def _gap(a: Any, b: Any) -> Number:
    found: Number = a - b
    return found


def _prefer(clause: Prefer, left: list[C]) -> tuple[list[C], Stage]:
    if clause.what == "smallest":
        least = min(candidate.nbytes for candidate in left)
        kept = [candidate for candidate in left if candidate.nbytes == least]
    else:
        pick = min if clause.what == "earliest" else max
        kept = [pick(left, key=lambda candidate: (candidate.step, candidate.generation, candidate.name))]
    dropped = tuple(candidate.name for candidate in left if candidate not in kept)
    return kept, Stage(str(clause), _names(kept), dropped, (), len(kept) > 1)


def pareto_front(candidates: Sequence[C], objectives: Sequence[tuple[str, str]]) -> list[C]:
    """Return the candidates that no other beats: at least as good in every (metric, mode) and better in one.

    Equals all stay; candidates that lack a metric are left out. Order as given.
    """
    for metric, mode in objectives:
        check_mode(mode, f"mode of {metric}")
    rows: list[tuple[C, list[Number]]] = []
    for candidate in candidates:
        values = [exact_value(candidate, metric, mode) for metric, mode in objectives]
        if all(value is not None for value in values):
            rows.append(
                (
                    candidate,
                    [v if m == "max" else -v for v, (_, m) in zip(values, objectives, strict=True) if v is not None],
                )
            )
    return [a for a, mine in rows if not any(_beats(other, mine) for _, other in rows)]


def _beats(other: list[Number], mine: list[Number]) -> bool:
    pairs = list(zip(other, mine, strict=True))
    return all(o >= m for o, m in pairs) and any(o > m for o, m in pairs)


def _names(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    return tuple(candidate.name for candidate in candidates)
