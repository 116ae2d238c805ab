"""What a run's folder says, as values: job starts, saves, metrics, leftovers, sizes. ``reading.py`` fills them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from distckpt.format.lineage import Committed, Generation, lineage
from distckpt.format.uncommitted import Uncommitted
from distckpt.manager import ranking
from distckpt.storage.base import Store

GROUPS: Final = ("model", "optimizer", "other")
"""What a checkpoint's bytes are counted as."""


@dataclass(frozen=True, slots=True)
class Row:
    """Metrics of one step as the job logged them, with the second (since the epoch) at which it did."""

    step: int
    generation: int
    epoch: float | None
    time: float
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Save:
    """One commit. ``problem``: why it cannot be used; what a manifest says is empty where that is unreadable.

    ``digest``: of the manifest's file. ``committed_at``: when the manifest appeared, by the store's clock. ``groups``: bytes
    of tensors by ``GROUPS``; ``nbytes``: of its files.
    """

    committed: Committed
    stray: bool
    committed_at: float
    digest: str = ""
    epoch: float | None = None
    time: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)
    save_id: str = ""
    engine: str = ""
    world_size: int = 0
    nbytes: int = 0
    groups: tuple[int, ...] = ()
    shards: tuple[tuple[str, int], ...] = ()
    pinned: bool = False
    problem: str | None = None

    @property
    def step(self) -> int:
        """The training step."""
        return self.committed.step

    @property
    def generation(self) -> int:
        """The job start that wrote it."""
        return self.committed.generation


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a root says about a run. ``saves`` and ``rows`` are in the order of steps.

    ``line``: rows of the lineage, those of jobs whose steps were done again later left out. ``beats``: generation to the
    second of its last heartbeat, of jobs that never said that they ended. ``storage``: (what, bytes, files).
    """

    root: str
    store: Store
    run_id: str
    created: str
    generations: tuple[Generation, ...]
    saves: tuple[Save, ...]
    rows: tuple[Row, ...]
    line: tuple[Row, ...]
    attempts: tuple[Uncommitted, ...]
    beats: Mapping[int, float]
    storage: tuple[tuple[str, int, int], ...]
    metric: tuple[str, str]
    problems: tuple[str, ...]

    @property
    def kept(self) -> list[Save]:
        """The commits that count and are whole, as far as was looked, earliest first."""
        return [save for save in self.saves if not save.stray and save.problem is None]

    @property
    def best(self) -> Save | None:
        """The best of those by the run's own metric."""
        return ranking.best(self.kept, *self.metric)

    @property
    def newest(self) -> Save | None:
        """What a job would go on from."""
        line = lineage([save.committed for save in self.kept], self.generations)
        return next((save for save in self.kept if line and save.committed == line[0]), None)


def finite_or_not(value: object) -> float | None:
    """Return a metric's value as a float, also NaN and infinite ones; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if str(value)[:1] != "-" else -math.inf
