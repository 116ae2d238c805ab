"""Which checkpoint is better: one total order, the same on every rank, that nothing unmeasured can win.

A metric counts as measured if it is a real number, not NaN, and not infinite in the winning direction: a
loss of -inf or an accuracy of +inf is a broken computation, and as "best" it would block every later
checkpoint for ever. An infinity in the losing direction (a loss that overflowed) is an ordinary worst
value.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar

from distckpt.errors import ConfigError

Mode = Literal["min", "max"]
TieBreaks: TypeAlias = Sequence[tuple[str, str] | str]
"""Further metrics as (name, mode), then ``"earliest"`` (also if left out) or ``"latest"``."""

_ENDS: Final = ("earliest", "latest")


class Candidate(Protocol):
    """What is ranked: anything with a step, a generation and metrics."""

    @property
    def step(self) -> int:
        """Training step."""

    @property
    def generation(self) -> int:
        """Job start that wrote it."""

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metrics of that step."""


C = TypeVar("C", bound=Candidate)


def check_mode(mode: object, where: str = "metric_mode") -> None:
    """Raise ConfigError unless ``mode`` is ``"min"`` or ``"max"``."""
    if mode not in ("min", "max"):
        raise ConfigError(f"{where}={mode!r}: want 'min' (lower is better) or 'max' (higher is better)")


def check_tie_breaks(tie_breaks: TieBreaks, where: str = "tie_breaks") -> None:
    """Raise ConfigError unless these are (metric, mode) pairs, then perhaps ``earliest`` or ``latest``."""
    if isinstance(tie_breaks, str):
        raise ConfigError(f"{where}={tie_breaks!r}: want a sequence, such as [({tie_breaks!r}, 'min'), 'latest']")
    for place, rule in enumerate(tie_breaks):
        if isinstance(rule, str):
            if rule not in _ENDS:
                raise ConfigError(f"{where}[{place}]={rule!r}: want (metric, mode), 'earliest' or 'latest'")
            if place != len(tie_breaks) - 1:
                raise ConfigError(f"{where}[{place}]={rule!r} decides every tie, so nothing may follow it")
        elif len(rule) != 2 or not isinstance(rule[0], str):
            raise ConfigError(f"{where}[{place}]={rule!r}: want (metric, mode), 'earliest' or 'latest'")
        else:
            check_mode(rule[1], f"{where}[{place}]")


def measured(value: object, mode: str) -> float | None:
    """Return the value as a float if it can be ranked under ``mode``, else None (see the module's text)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if math.isnan(number) or number == (-math.inf if mode == "min" else math.inf):
        return None
    return number


def rank_candidates(candidates: Sequence[C], metric: str, mode: str, tie_breaks: TieBreaks = ()) -> list[C]:
    """Return the candidates that have ``metric`` measured, best first.

    Equal ones are ordered by each tie-break in turn (one who has that metric goes before one who has not),
    at last by (step, generation), the earlier first unless the tie-breaks end with ``"latest"``. Raises
    ConfigError for a wrong mode or tie-break.
    """
    return [candidates[index] for index in ranked_indices(candidates, metric, mode, tie_breaks)]


def best(candidates: Sequence[C], metric: str, mode: str, tie_breaks: TieBreaks = ()) -> C | None:
    """Return the best candidate, or None if ``metric`` is measured in none."""
    ranked = ranked_indices(candidates, metric, mode, tie_breaks)
    return candidates[ranked[0]] if ranked else None


def ranked_indices(candidates: Sequence[Candidate], metric: str, mode: str, tie_breaks: TieBreaks = ()) -> list[int]:
    """Return what ``rank_candidates`` does, as indices."""
    check_mode(mode)
    check_tie_breaks(tie_breaks)
    rules = [(metric, mode), *(rule for rule in tie_breaks if not isinstance(rule, str))]
    sign = -1 if tie_breaks and tie_breaks[-1] == "latest" else 1

    def key(index: int) -> tuple[Any, ...]:
        candidate = candidates[index]
        values = (_sort_key(candidate.metrics.get(name), rule) for name, rule in rules)
        return (*values, sign * candidate.step, sign * candidate.generation)

    usable = (i for i, candidate in enumerate(candidates) if measured(candidate.metrics.get(metric), mode) is not None)
    return sorted(usable, key=key)


def _sort_key(value: object, mode: str) -> tuple[int, float]:
    number = measured(value, mode)
    if number is None:
        return 1, 0.0
    return 0, number if mode == "min" else -number
