"""When to save: small frozen objects that look at a moment of training and give a reason, or None.

They hold no state, so a resumed run decides as an uninterrupted one would: all that they need to know about
the past is in the ``Moment``, which is filled from the run's history on storage. ``a | b`` saves when
either wants to, ``a & b`` when both do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distckpt.errors import ConfigError
from distckpt.manager.ranking import check_mode, measured


@dataclass(frozen=True, slots=True)
class MetricRange:
    """What was seen of one metric: the lowest, the highest, and the last value.

    NaN is never taken in; ``low`` leaves out -inf and ``high`` leaves out +inf, which no honest measurement
    gives.
    """

    low: float | None = None
    high: float | None = None
    last: float | None = None

    def include(self, value: object) -> MetricRange:
        """Return the range with one more value."""
        low, high = measured(value, "min"), measured(value, "max")
        last = low if low is not None else high
        return MetricRange(
            low=self.low if low is None else (low if self.low is None else min(low, self.low)),
            high=self.high if high is None else (high if self.high is None else max(high, self.high)),
            last=self.last if last is None else last,
        )


def metric_ranges(history: Iterable[Mapping[str, Any]]) -> dict[str, MetricRange]:
    """Return the range of each metric over a history, oldest first."""
    ranges: dict[str, MetricRange] = {}
    for metrics in history:
        for name, value in metrics.items():
            ranges[name] = ranges.get(name, MetricRange()).include(value)
    return ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One step boundary, as a save policy sees it."""

    step: int
    epoch: float | None = None
    seconds_since_save: float = 0.0
    """Since the last save, or since the job's start if it has saved nothing."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Metrics of this step; one that was not computed at this step is left out."""
    seen: Mapping[str, MetricRange] = field(default_factory=dict)
    """Every metric before this step, earlier job starts included."""
    saved: Mapping[str, MetricRange] = field(default_factory=dict)
    """Metrics of the steps that were saved in this lineage, those since removed included."""
    preempted: bool = False
    requested: bool = False
    last_saved_step: int | None = None


class SavePolicy:
    """Base of all save policies: called with a moment, it returns the reason to save, or None.

    ``deterministic`` is True where the answer depends on the step alone, so that every rank finds it
    without asking; else the leader decides for all.
    """

    __slots__ = ()

    @property
    def deterministic(self) -> bool:
        """Whether the step alone decides."""
        return False

    def __call__(self, moment: Moment) -> str | None:
        """Return why to save now, or None."""
        raise NotImplementedError

    def __or__(self, other: SavePolicy) -> AnyOf:
        return AnyOf(_members(AnyOf, self) + _members(AnyOf, other))

    def __and__(self, other: SavePolicy) -> AllOf:
        return AllOf(_members(AllOf, self) + _members(AllOf, other))


def _members(kind: type[AnyOf] | type[AllOf], policy: SavePolicy) -> tuple[SavePolicy, ...]:
    return policy.policies if isinstance(policy, kind) else (policy,)


@dataclass(frozen=True, slots=True)
class EverySteps(SavePolicy):
    """At the steps offset + k·n, from step 1 on (before the first step nothing has been trained)."""

    n: int
    offset: int = 0

    def __post_init__(self) -> None:
        _whole("EverySteps.n", self.n, 1)
        _whole("EverySteps.offset", self.offset, 0)

    @property
    def deterministic(self) -> bool:
        """True: only the step counts."""
        return True

    def __call__(self, moment: Moment) -> str | None:
        """Fire at every n-th step."""
        due = moment.step >= max(1, self.offset) and (moment.step - self.offset) % self.n == 0
        return f"every {self.n} steps" if due else None


@dataclass(frozen=True, slots=True)
class EverySeconds(SavePolicy):
    """When that many seconds have passed since the last save."""

    seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ConfigError(f"EverySeconds.seconds={self.seconds!r}: want a number above 0")

    def __call__(self, moment: Moment) -> str | None:
        """Fire when the time is up."""
        return f"every {self.seconds:g} s" if moment.seconds_since_save >= self.seconds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class WhenMetric(SavePolicy):
    """When a metric falls below ``below``, or rises above ``above`` (exactly one is given).

    ``once=True``: as long as nothing saved in this lineage is past the threshold; a save that failed is
    thus tried again, and one that stands is not repeated after a restart. ``once=False``: each time the
    metric crosses, compared with its last value before.
    """

    name: str
    below: float | None = None
    above: float | None = None
    once: bool = True

    def __post_init__(self) -> None:
        if (self.below is None) == (self.above is None):
            raise ConfigError(f"WhenMetric({self.name!r}): give exactly one of below= and above=")
        limit = self.below if self.above is None else self.above
        if measured(limit, "min") is None and measured(limit, "max") is None:
            raise ConfigError(f"WhenMetric({self.name!r}): threshold {limit!r} is not a number")

    def __call__(self, moment: Moment) -> str | None:
        """Fire when the threshold is passed."""
        value = measured(moment.metrics.get(self.name), "min" if self.above is None else "max")
        if value is None or not self._passed(value):
            return None
        if self.once:
            saved = moment.saved.get(self.name, MetricRange())
            before = saved.low if self.above is None else saved.high
        else:
            before = moment.seen.get(self.name, MetricRange()).last
        if before is not None and self._passed(before):
            return None
        limit = f"below {self.below:g}" if self.above is None else f"above {self.above:g}"
        return f"{self.name} {limit} ({value:g})"

    def _passed(self, value: float) -> bool:
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)


@dataclass(frozen=True, slots=True)
class WhenImproves(SavePolicy):
    """When a metric is better than in every save before, by more than ``min_delta``.

    Compared with what is saved, not with what was seen: many small improvements add up to one worth saving,
    and a best value that died with its process does not hide the next one.
    """

    name: str
    mode: str = "min"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_mode(self.mode, f"WhenImproves({self.name!r}).mode")
        if not self.min_delta >= 0:
            raise ConfigError(f"WhenImproves({self.name!r}).min_delta={self.min_delta!r}: want 0 or more")

    def __call__(self, moment: Moment) -> str | None:
        """Fire on an improvement; the first measured value is one, a NaN or missing one never."""
        value = measured(moment.metrics.get(self.name), self.mode)
        if value is None:
            return None
        saved = moment.saved.get(self.name, MetricRange())
        best = saved.low if self.mode == "min" else saved.high
        if best is None:
            return f"{self.name} first measured ({value:g})"
        better = value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta
        return f"{self.name} improved from {best:g} to {value:g}" if better else None


@dataclass(frozen=True, slots=True)
class OnRequest(SavePolicy):
    """When somebody asked for a save by the control file."""

    def __call__(self, moment: Moment) -> str | None:
        """Fire when a request is there."""
        return "requested" if moment.requested else None


@dataclass(frozen=True, slots=True)
class OnPreemption(SavePolicy):
    """When a rank was told that the job will be stopped."""

    def __call__(self, moment: Moment) -> str | None:
        """Fire on a preemption notice."""
        return "preempted" if moment.preempted else None


@dataclass(frozen=True, slots=True)
class _Several(SavePolicy):
    policies: tuple[SavePolicy, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", _checked(type(self).__name__, self.policies))

    @property
    def deterministic(self) -> bool:
        """True if every member is."""
        return all(policy.deterministic for policy in self.policies)


@dataclass(frozen=True, slots=True)
class AnyOf(_Several):
    """When any member wants to; with no members, never. The reasons are joined."""

    def __call__(self, moment: Moment) -> str | None:
        """Fire if one does."""
        return ", ".join(reason for policy in self.policies if (reason := policy(moment))) or None


@dataclass(frozen=True, slots=True)
class AllOf(_Several):
    """When every member wants to; with no members, never. The reasons are joined."""

    def __call__(self, moment: Moment) -> str | None:
        """Fire if all do."""
        reasons = [policy(moment) for policy in self.policies]
        return (" and ".join(filter(None, reasons)) or None) if all(reasons) else None


@dataclass(frozen=True, slots=True)
class MinGap(SavePolicy):
    """A policy held back until so many steps, and so many seconds, have passed since the last save.

    Don't put ``OnPreemption`` inside: that save cannot wait.
    """

    policy: SavePolicy
    steps: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        _whole("MinGap.steps", self.steps, 0)
        if not self.seconds >= 0:
            raise ConfigError(f"MinGap.seconds={self.seconds!r}: want 0 or more")
        _checked("MinGap", (self.policy,))

    def __call__(self, moment: Moment) -> str | None:
        """Fire if the policy does and the gap is wide enough; before the first save there is none to keep."""
        last = moment.last_saved_step
        if last is not None and (moment.step - last < self.steps or moment.seconds_since_save < self.seconds):
            return None
        return self.policy(moment)


def _checked(owner: str, policies: Iterable[object]) -> tuple[SavePolicy, ...]:
    checked: list[SavePolicy] = []
    for policy in policies:
        if not isinstance(policy, SavePolicy):
            raise ConfigError(f"{owner}: {policy!r} is not a save policy")
        checked.append(policy)
    return tuple(checked)


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: want an int of at least {least}")
