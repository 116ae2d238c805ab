"""What a bench of storage has found, as plain values: curves, turns with their probes, latencies, advice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from distckpt.storage.probes import Point

WRITE: Final = "write"
READ: Final = "read"
PARTS: Final = {
    "save": WRITE, "load": READ, "partial load": READ, "replicated, each rank": READ, "replicated, shared": READ,
}  # fmt: skip
"""What is timed, and the raw limit that it is compared with."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Raw bytes a second of all ranks together at one depth and request size: ``rates`` by round, ``void`` of them moved."""

    kind: str
    threads: int
    request: int
    rates: tuple[float, ...]
    void: int = 0
    rate: float = 0.0
    """Median of the rounds that count; of all of them where none does."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement of one part of a job's checkpointing, between two raw probes (bytes a second)."""

    part: str
    setting: str
    """``default`` or ``recommended``: which settings it was done with."""
    round: int
    nbytes: int
    seconds: float
    raw: tuple[float, float]
    void: bool
    cold: bool | None = None
    """Whether the files were out of the page cache; None where there are none."""


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of one part: bytes a second, and as a share of the raw limit beside it."""

    part: str
    setting: str
    rate: float
    fraction: float
    turns: int
    void: int
    only_void: bool
    cold: bool | None


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of one kind of small operation, over all ranks and rounds."""

    operation: str
    count: int
    p50: float
    p95: float
    p99: float
    worst: float


@dataclass(frozen=True, slots=True)
class Advice:
    """A setting worth having: a field of ``CheckpointConfig``, or an environment variable, and why."""

    setting: str
    value: Any
    default: Any
    why: str
    uncertain: bool = False
    """Whether the figures behind it moved while they were taken."""

    @property
    def changes(self) -> bool:
        """Whether it is certain enough to be set, and differs from what is set without it."""
        return not self.uncertain and bool(self.value != self.default)


@dataclass(slots=True)
class TargetReport:
    """One folder or URL. ``error``: why it could not be measured to its end; figures up to then are kept."""

    url: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    far: bool = False
    """Whether requests cost tens of milliseconds whatever they fetch."""
    curve: list[CurvePoint] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    sharing: list[tuple[float, float]] = field(default_factory=list)
    """Bytes a second of storage and of the link between ranks, as loads that were shared measured them."""
    advice: list[Advice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    left: list[str] = field(default_factory=list)
    """What could not be removed again; normally nothing."""

    def best(self, kind: str) -> CurvePoint | None:
        """Return the fastest raw point of a kind."""
        return max((p for p in self.curve if p.kind == kind), key=lambda p: p.rate, default=None)


@dataclass(slots=True)
class BenchReport:
    """All targets side by side, as they were measured in turns by ``world_size`` ranks on ``hosts`` hosts."""

    world_size: int
    hosts: int
    nbytes: int
    rounds: int
    time: str
    targets: list[TargetReport]

    @property
    def ok(self) -> bool:
        """Whether every target was measured to the end, and nothing was left behind."""
        return not any(target.error or target.left for target in self.targets)


def curve_points(kind: str, found: Mapping[Point, Sequence[tuple[float, bool]]]) -> list[CurvePoint]:
    """Return a curve from each point's (bytes a second, void) by round."""
    points = []
    for point, rounds in sorted(found.items()):
        rates = tuple(rate for rate, _ in rounds)
        count = [rate for rate, void in rounds if not void] or rates
        void = sum(void for _, void in rounds)
        points.append(CurvePoint(kind, point.threads, point.request, rates, void, statistics.median(count)))
    return points


def figures_of(turns: Iterable[Turn]) -> list[Figure]:
    """Return medians of the turns that count, by part and setting; of the void ones where there are no others."""
    groups: dict[tuple[str, str], list[Turn]] = {}
    for turn in turns:
        groups.setdefault((turn.part, turn.setting), []).append(turn)
    figures = []
    order = list(PARTS)
    for (part, setting), group in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        count = [turn for turn in group if not turn.void] or group
        rate = statistics.median(t.nbytes / t.seconds for t in count)
        fraction = statistics.median(t.nbytes / t.seconds / (sum(t.raw) / 2) for t in count)
        known = [t.cold for t in group if t.cold is not None]
        void = sum(t.void for t in group)
        figures.append(
            Figure(part, setting, rate, fraction, len(group), void, void == len(group), all(known) if known else None)
        )
    return figures


def latencies_of(samples: Mapping[str, Sequence[float]]) -> list[Latency]:
    """Return percentiles (nearest rank) of each kind of operation."""

    def at(ordered: Sequence[float], share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    found = []
    for operation, values in samples.items():
        ordered = sorted(values)
        if ordered:
            found.append(
                Latency(operation, len(ordered), at(ordered, 0.5), at(ordered, 0.95), at(ordered, 0.99), ordered[-1])
            )
    return found
