"""Times saves, loads, parts of loads and small operations on any folders and URLs, side by side.

Targets take turns, there and back, so that what drifts hits all of them alike. First raw writes and reads at several
depths and request sizes, then saves and loads by the library's own paths with the settings as they are and with those
that the curves recommend, each between two raw probes. A scratch root of its own below each target is all that is written; every
rank removes it when it has stopped, whatever stopped it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from distckpt import clock
from distckpt.analysis.stops import Stopped, Stops, stoppable
from distckpt.analysis.store_advice import IN_FLIGHT, PART, Measured, notes, recommend
from distckpt.analysis.store_report import (
    READ,
    WRITE,
    BenchReport,
    TargetReport,
    Turn,
    curve_points,
    figures_of,
    latencies_of,
)
from distckpt.analysis.store_work import PART as AN_EIGHTH
from distckpt.analysis.store_work import REPLICATED, SHARDED, Saved, Workload
from distckpt.analysis.together import Together
from distckpt.config import DEFAULT_THREADS, CheckpointConfig, ObjectStoreConfig
from distckpt.dcp.agreement import Agreement
from distckpt.errors import AgreementError, ConfigError, DistckptError
from distckpt.format import names
from distckpt.storage import MemoryStore, ObjectStore, open_store
from distckpt.storage.base import Store
from distckpt.storage.probes import Point, cold, differ, raw_read, raw_write, small_operations
from distckpt.storage.scratch import remove_file, remove_names, remove_scratch, scratch_name, scratch_url, target_facts

log = logging.getLogger("distckpt")

VOID: Final = 0.20
"""Most by which the raw probes around a turn may differ: shared storage never holds still as a local disk does."""
MIB: Final = 1 << 20
ANCHOR: Final = Point(12, 8 * MIB)
"""The raw probe around each pass over the curves, as far as the bytes allow."""

Progress = Callable[[int, int], None] | None
"""Called on every rank with (bytes moved by all ranks so far, bytes in all)."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """``nbytes``: of all ranks together, in each write, read, save or load. ``again``: how often a void turn is repeated.

    ``operations``: small operations of each kind, rank and round. ``state_nbytes``: the real job's whole state, for advice
    on deadlines.
    """

    nbytes: int = 256 * MIB
    rounds: int = 3
    operations: int = 24
    again: int = 1
    threads: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    far_threads: tuple[int, ...] = (1, 4, 12, 32)
    timeout_s: float = 600.0
    state_nbytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "operations", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: want a positive number")
        if self.nbytes < MIB:
            raise ConfigError(f"nbytes={self.nbytes}: want 1 MiB or more, storage is not measured by less")


@dataclass(slots=True)
class _Target:
    """One target on one rank: its scratch root, and what was measured there so far."""

    report: TargetReport
    store: Store
    sums: dict[str, dict[Point, list[tuple[float, bool]]]] = field(default_factory=lambda: {WRITE: {}, READ: {}})
    samples: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, tuple[Store, int]] = field(default_factory=dict)
    """By name: the store and the threads that saves and loads use."""
    best: dict[str, Point] = field(default_factory=dict)
    steps: int = 0


def bench_stores(
    urls: Sequence[str],
    options: BenchOptions | None = None,
    *,
    agreement: Agreement | None = None,
    progress: Progress = None,
) -> BenchReport:
    """Measure storage at each of ``urls`` (folders that are there, or URLs as in docs/storage.md) on all ranks together.

    Every rank calls it alike and gets the same report. A target that fails is reported with its error, and the others
    go on. Nothing is left on any target, also after a signal (SIGINT, SIGTERM and SIGHUP raise ``Stopped``, a
    ``KeyboardInterrupt``). Raises ``ConfigError`` where a target cannot be used at all, or lacks the space;
    ``AgreementError`` where a rank is missing.
    """
    options = options or BenchOptions()
    ranks = Together(agreement or Agreement.from_environment(timeout_s=options.timeout_s))
    if not urls:
        raise ConfigError("no target: name folders or URLs")
    with stoppable() as stops:
        return _Bench(ranks, urls, options, stops, progress).run()


class _Bench:
    def __init__(
        self, ranks: Together, urls: Sequence[str], options: BenchOptions, stops: Stops, progress: Progress
    ) -> None:
        self.ranks, self.urls, self.options, self.stops = ranks, list(urls), options, stops
        self.targets: list[_Target] = []
        self._progress, self._moved, self._expected = progress, 0, 0
        self._part = max(MIB, options.nbytes // ranks.world_size)

    def run(self) -> BenchReport:
        facts = self.ranks.led("targets", self._look)
        name = self.ranks.led("name", scratch_name)
        self.targets = [
            _Target(TargetReport(url, known), open_store(scratch_url(url, name)))
            for url, known in zip(self.urls, facts, strict=True)
        ]
        finished = False
        try:
            self._measure()
            self.ranks.gather("end", lambda: None)
            finished = True
        finally:
            with self.stops.held():
                # Together at the end one rank tidies for all; a rank that was stopped cannot know who still writes.
                if not finished or self.ranks.rank == 0:
                    for target in self.targets:
                        self._remove(target)
        hosts = len({peer.host for peer in self.ranks.agreement.peers() if peer is not None})
        reports = [target.report for target in self.targets]
        return BenchReport(
            self.ranks.world_size,
            hosts,
            self._part * self.ranks.world_size,
            self.options.rounds,
            clock.utc_text(),
            reports,
        )

    # ------------------------------------------------------------------ before and after

    def _look(self) -> list[dict[str, Any]]:
        """Check every target before anything is written to any; the leader's work."""
        found = []
        for url in self.urls:
            facts = target_facts(url)
            if self.ranks.world_size > 1 and isinstance(open_store(url), MemoryStore):
                raise ConfigError(f"{url}: a memory store is one process's own; measure it without torchrun")
            free = facts.get("free_bytes")
            needed = 3 * self._part * self.ranks.world_size + 64 * MIB
            if free is not None and free < needed:
                raise ConfigError(
                    f"{url}: {free // MIB} MiB are free and {needed // MIB} MiB are needed; choose a smaller --mbytes"
                )
            found.append({key: value for key, value in facts.items() if key != "problem"})
        return found

    def _remove(self, target: _Target) -> None:
        try:
            target.report.left = remove_scratch(target.store)
        except Exception as error:  # the next target has to be tidied all the same
            target.report.left = [f"{target.store.url}: {error}"]
        for name in target.report.left:
            log.warning("left behind: %s", name)

    @contextmanager
    def _on(self, target: _Target) -> Iterator[None]:
        """Work on a target; where that fails, on all ranks alike, it is left out from now on and tidied."""
        try:
            yield
        except DistckptError as error:
            if isinstance(error, AgreementError) and (
                error.missing or error.in_doubt or any(f.kind == Stopped.__name__ for f in error.failures)
            ):
                raise  # a rank is gone, and waiting for it would take long
            target.report.error = str(error)
            if self.ranks.rank == 0:
                log.warning("%s: left out from now on: %s", target.report.url, error)
            with self.stops.held():
                self.ranks.gather("tidy", lambda: None)
                if self.ranks.rank == 0:
                    self._remove(target)
                self.ranks.gather("tidied", lambda: None)

    def _alive(self, number: int) -> list[_Target]:
        """Return the targets that still work, there and back by turns."""
        order = self.targets if number % 2 == 0 else self.targets[::-1]
        return [target for target in order if not target.report.error]

    # ------------------------------------------------------------------ measuring

    def _measure(self) -> None:
        options, rounds = self.options, self.options.rounds
        for target in self.targets:
            target.report.far = target.store.capabilities.latency
        for target in self.targets:
            curves = len(self._points(target, WRITE)) + len(self._points(target, READ)) + 4
            self._expected += options.nbytes * (1 + rounds * (curves + 12))
        for target in self._alive(0):
            with self._on(target):
                self._raw(target, WRITE, self._anchor(target), name="kept")
        for number in range(rounds):
            self._curves(number)
        work = Workload(self.ranks, self._part * self.ranks.world_size, options.timeout_s)
        for target in self._alive(0):
            self._settle(target)
        for number in range(rounds):
            for target in self._alive(number):
                with self._on(target):
                    self._operations(target, number)
                    for name in target.settings:
                        self._turns(target, work, name, number)
        for target in self.targets:
            self._conclude(target)

    def _points(self, target: _Target, kind: str) -> list[Point]:
        """Return the points of a curve; those with more in flight than there is to move say nothing."""
        far = target.store.capabilities.latency
        requests = ((5, 8, 16) if kind == WRITE else (4, 8, 16)) if far else (2, 8, 16)
        depths = sorted({*(self.options.far_threads if far else self.options.threads), DEFAULT_THREADS})
        points = [Point(threads, request * MIB) for request in requests for threads in depths]
        return [p for p in points if p.threads * p.request <= self._part or p == min(points)]

    def _anchor(self, target: _Target) -> Point:
        """Return the point of the probes that tell whether the storage has moved."""
        points = [p for p in self._points(target, WRITE) if p.threads <= ANCHOR.threads and p.request <= ANCHOR.request]
        return max(points, key=lambda p: (p.request, p.threads))

    def _curves(self, number: int) -> None:
        """Take every point once, targets in turns; a pass over a target is void if its anchor has moved."""
        passes: dict[int, list[tuple[str, Point, float]]] = {id(t): [] for t in self.targets}
        before = {id(t): self._anchors(t) for t in self._alive(number)}
        for kind in (WRITE, READ):
            longest = max((len(self._points(t, kind)) for t in self._alive(number)), default=0)
            for index in range(longest):
                for target in self._alive(number + index):
                    points = self._points(target, kind)
                    if index < len(points):
                        point = points[index] if number % 2 == 0 else points[-1 - index]
                        with self._on(target):
                            passes[id(target)].append((kind, point, self._raw(target, kind, point)))
        for target in self._alive(number):
            after = self._anchors(target)
            for kind, point, rate in passes[id(target)]:
                first = before[id(target)]
                void = kind in after and kind in first and differ({kind: first[kind]}, {kind: after[kind]}, VOID)
                target.sums[kind].setdefault(point, []).append((rate, void))

    def _anchors(self, target: _Target) -> dict[str, float]:
        """Probe raw speeds; empty where that fails."""
        found = {}
        with self._on(target):
            for kind in (WRITE, READ):
                found[kind] = self._raw(target, kind, self._anchor(target))
        return found

    def _raw(self, target: _Target, kind: str, point: Point, name: str = "") -> float:
        """Return raw bytes a second of all ranks together; a read is of the file ``kept``, cold where that is possible."""
        store, own = target.store, f"raw/{self.ranks.rank:05}"
        path = f"{own}/{name or 'probe'}"
        if kind == READ:
            kept = f"{own}/kept"
            self.ranks.gather("cold", lambda: cold(store, [kept]))
            seconds = self.ranks.seconds("read", lambda: raw_read(store, kept, self._part, point))
        else:
            seconds = self.ranks.seconds("write", lambda: raw_write(store, path, self._part, point))
            if not name:
                self.ranks.gather("drop", lambda: remove_file(store, path))
        self._count(self._part * self.ranks.world_size)
        return self._part * self.ranks.world_size / max(seconds, 1e-9)

    def _operations(self, target: _Target, number: int) -> None:
        folder = f"small/{self.ranks.rank:05}-{number}"
        for found in self.ranks.gather(
            "small", lambda: small_operations(target.store, folder, self.options.operations)
        ):
            for kind, seconds in found.items():
                target.samples.setdefault(kind, []).extend(seconds)

    # ------------------------------------------------------------------ saves and loads

    def _settle(self, target: _Target) -> None:
        """Choose the settings of saves and loads: as they are, and as the curves recommend if that is something else."""
        report = target.report
        report.curve = [p for kind in (WRITE, READ) for p in curve_points(kind, target.sums[kind])]
        for kind in (WRITE, READ):
            best = report.best(kind)
            if best is not None:
                target.best[kind] = Point(best.threads, best.request)
        config = CheckpointConfig(report.url)
        target.settings["default"] = (target.store, config.threads)
        said = {a.setting: a.value for a in recommend(self._found(target), config, self._objects(target)) if a.changes}
        store, threads = target.store, int(said.get("threads", config.threads))
        if isinstance(store, ObjectStore) and (PART in said or IN_FLIGHT in said):
            now = store.bucket.settings
            part = int(said.get(PART, now.part_bytes // MIB)) * MIB
            store = store.tuned(replace(now, part_bytes=part, in_flight=int(said.get(IN_FLIGHT, now.in_flight))))
        if store is not target.store or threads != config.threads:
            target.settings["recommended"] = (store, threads)

    def _turns(self, target: _Target, work: Workload, setting: str, number: int) -> None:
        """Save and load once between two probes; again where the storage has moved meanwhile."""
        for _ in range(1 + self.options.again):
            before = self._both(target)
            parts = self._parts(target, work, setting)
            after = self._both(target)
            moved = {kind: differ({kind: before[kind]}, {kind: after[kind]}, VOID) for kind in before}
            for part, nbytes, seconds, was_cold in parts:
                kind = WRITE if part == "save" else READ
                raw = (before[kind], after[kind])
                target.report.turns.append(Turn(part, setting, number, nbytes, seconds, raw, moved[kind], was_cold))
            if not any(moved.values()):
                return

    def _both(self, target: _Target) -> dict[str, float]:
        return {kind: self._raw(target, kind, target.best[kind]) for kind in (WRITE, READ)}

    def _parts(self, target: _Target, work: Workload, setting: str) -> list[tuple[str, int, float, bool | None]]:
        store, threads = target.settings[setting]
        target.steps += 1
        saved, seconds = work.save(store, target.steps, threads)
        found: list[tuple[str, int, float, bool | None]] = [("save", work.saved_nbytes, seconds, None)]
        loads = [("load", SHARDED, False), ("partial load", AN_EIGHTH, False)]
        if self.ranks.world_size > 1:
            loads += [("replicated, each rank", REPLICATED, False), ("replicated, shared", REPLICATED, True)]
        for part, prefix, shared in loads:
            loaded = work.load(store, saved, threads, prefix, shared=shared)
            found.append((part, loaded.nbytes, loaded.seconds, loaded.cold))
            if loaded.rates is not None:
                target.report.sharing.append((loaded.rates.store, loaded.rates.link))
        self._count(sum(nbytes for _, nbytes, _, _ in found))
        self.ranks.led("forget", functools.partial(_forget, target.store, saved))
        return found

    def _conclude(self, target: _Target) -> None:
        """Put medians, percentiles and advice together; what a failed target has, too."""
        report = target.report
        report.figures = figures_of(report.turns)
        report.latencies = latencies_of(target.samples)
        if not report.error:
            found = self._found(target)
            report.advice = recommend(found, CheckpointConfig(report.url), self._objects(target))
            report.notes = notes(found)

    def _found(self, target: _Target) -> Measured:
        report = target.report
        return Measured(
            report.far, isinstance(target.store, ObjectStore), self.ranks.world_size, report.curve, report.figures,
            report.latencies, report.sharing, self.options.state_nbytes,
        )  # fmt: skip

    def _objects(self, target: _Target) -> ObjectStoreConfig | None:
        return target.store.bucket.settings if isinstance(target.store, ObjectStore) else None

    def _count(self, nbytes: int) -> None:
        self._moved += nbytes
        if self._progress is not None:
            self._progress(self._moved, max(self._moved, self._expected))


def _forget(store: Store, saved: Saved) -> None:
    """Remove a checkpoint of the scratch root, so that there is room for the next."""
    remove_names(store, names.step_folder(saved.step))
