"""What to keep: pure objects that choose among a run's checkpoints, and the plan of what may be removed.

A keep policy maps a list of ``Kept`` to the set of indices it wants to keep; ``a | b`` keeps what either
wants. Nothing here deletes: ``plan_removal`` gives the list, and the collector acts on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from distckpt.errors import ConfigError
from distckpt.manager.ranking import TieBreaks, check_mode, check_tie_breaks, ranked_indices


@dataclass(frozen=True, slots=True)
class Kept:
    """One committed checkpoint, as a keep policy sees it. ``time`` is seconds since the epoch (UTC)."""

    step: int
    generation: int = 0
    epoch: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    pinned: bool = False
    time: float = 0.0


class KeepPolicy:
    """Base of all keep policies."""

    __slots__ = ()

    def __call__(self, candidates: Sequence[Kept]) -> frozenset[int]:
        """Return the indices of the candidates to keep."""
        raise NotImplementedError

    def __or__(self, other: KeepPolicy) -> KeepAny:
        return KeepAny(_members(self) + _members(other))


def _members(policy: KeepPolicy) -> tuple[KeepPolicy, ...]:
    return policy.policies if isinstance(policy, KeepAny) else (policy,)


@dataclass(frozen=True, slots=True)
class KeepLast(KeepPolicy):
    """The n newest, by step, then generation."""

    n: int

    def __post_init__(self) -> None:
        _at_least("KeepLast.n", self.n, 1)

    def __call__(self, candidates: Sequence[Kept]) -> frozenset[int]:
        """Return the newest n."""
        return frozenset(_oldest_first(candidates)[-self.n :])


@dataclass(frozen=True, slots=True)
class KeepBest(KeepPolicy):
    """The k best by a metric; candidates without a usable value are never among them."""

    metric: str
    mode: str = "min"
    k: int = 1
    ties: TieBreaks = ()

    def __post_init__(self) -> None:
        check_mode(self.mode, f"KeepBest({self.metric!r}).mode")
        check_tie_breaks(self.ties, f"KeepBest({self.metric!r}).ties")
        _at_least("KeepBest.k", self.k, 1)

    def __call__(self, candidates: Sequence[Kept]) -> frozenset[int]:
        """Return the best k."""
        return frozenset(ranked_indices(candidates, self.metric, self.mode, self.ties)[: self.k])


@dataclass(frozen=True, slots=True)
class KeepEvery(KeepPolicy):
    """Those at steps that are multiples of n."""

    n: int

    def __post_init__(self) -> None:
        _at_least("KeepEvery.n", self.n, 1)

    def __call__(self, candidates: Sequence[Kept]) -> frozenset[int]:
        """Return every n-th step."""
        return frozenset(i for i, candidate in enumerate(candidates) if candidate.step % self.n == 0)


@dataclass(frozen=True, slots=True)
class KeepPinned(KeepPolicy):
    """Those that somebody pinned."""

    def __call__(self, candidates: Sequence[Kept]) -> frozenset[int]:
        """Return the pinned ones."""
        return frozenset(i for i, candidate in enumerate(candidates) if candidate.pinned)


@dataclass(frozen=True, slots=True)
class KeepSteps(KeepPolicy):
    """Those at the given steps."""

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        """Take any iterable of steps."""
        object.__setattr__(self, "steps", frozenset(steps))

    def __call__(self, candidates: Sequence[Kept]) -> frozenset[int]:
        """Return those whose step is listed."""
        return frozenset(i for i, candidate in enumerate(candidates) if candidate.step in self.steps)


@dataclass(frozen=True, slots=True)
class KeepAll(KeepPolicy):
    """All of them."""

    def __call__(self, candidates: Sequence[Kept]) -> frozenset[int]:
        """Return every index."""
        return frozenset(range(len(candidates)))


@dataclass(frozen=True, slots=True)
class KeepAny(KeepPolicy):
    """The union of what its members keep; with no members, nothing."""

    policies: tuple[KeepPolicy, ...]

    def __post_init__(self) -> None:
        for policy in self.policies:
            if not isinstance(policy, KeepPolicy):
                raise ConfigError(f"KeepAny: {policy!r} is not a keep policy")
        object.__setattr__(self, "policies", tuple(self.policies))

    def __call__(self, candidates: Sequence[Kept]) -> frozenset[int]:
        """Return the union."""
        return frozenset().union(*(policy(candidates) for policy in self.policies))


def protected(
    candidates: Sequence[Kept],
    *,
    resumed_from: tuple[int, int] | None = None,
    best: Kept | None = None,
    minimum: int = 2,
) -> frozenset[int]:
    """Return the indices that no policy may remove.

    The ``minimum`` newest (two; one only where a limit of 1 was asked for, which the caller warns about),
    the pinned ones, ``best`` (what ``ranking.best`` gave), and ``resumed_from``, a pair (generation, step).
    Raises ConfigError if ``minimum`` is below 1.
    """
    _at_least("minimum", minimum, 1)
    chosen = set(_oldest_first(candidates)[-minimum:]) | KeepPinned()(candidates)
    special = {resumed_from, (best.generation, best.step) if best is not None else None}
    chosen |= {i for i, candidate in enumerate(candidates) if (candidate.generation, candidate.step) in special}
    return frozenset(chosen)


def plan_removal(
    candidates: Sequence[Kept], keep: AbstractSet[int], protected: AbstractSet[int]
) -> tuple[list[Kept], list[Kept]]:
    """Split the candidates in (kept, removed), both oldest first: removed is what is in neither set."""
    ordered = _oldest_first(candidates)
    kept = [candidates[i] for i in ordered if i in keep or i in protected]
    removed = [candidates[i] for i in ordered if i not in keep and i not in protected]
    return kept, removed


def _oldest_first(candidates: Sequence[Kept]) -> list[int]:
    return sorted(range(len(candidates)), key=lambda i: (candidates[i].step, candidates[i].generation))


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: want an int of at least {least}")
