"""The interleaver: peers in turn, A B C … C B A, raw limits probed around every turn, turns of a moving machine again.

A *turn* is one measurement of one peer. The raw limit that belongs to it (disk write, disk read, memory copy, a training
step without saves) is probed before and after it; the mean is what the turn is compared with. Where the two differ by
more than ``VOID``, the turn is void: it stays in the results, marked, and is taken again, at most ``again`` times.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import limits, meters
from benchmarks.pool import ROOT, Pool, RanksFailed
from benchmarks.shapes import Workload
from distckpt.dcp.read_plan import SPAN
from distckpt.storage.probes import VOID as VOID
from distckpt.storage.probes import Point, best_point, differ, warm_caches

Row = dict[str, Any]
Probe = Callable[[], dict[str, float]]
"""Returns bytes (or steps) a second by kind of limit."""
VERIFIED, COPIED, STAGING = "verified", "copied", "staging"
"""The raw disk with every byte hashed and copied, or only copied; the raw copy tensor by tensor, to idle memory."""
DEPTH = 12
"""Threads of the first two: the disk has requests while some are hashed and copied, whatever depth it needs by itself."""
EXTRA = (VERIFIED, COPIED, STAGING)
"""No turn is void for what these limits do."""


def palindrome(peers: Sequence[str]) -> list[str]:
    """Return each peer twice, there and back: what drifts slowly hits all of them alike."""
    return [*peers, *reversed(peers)]


@dataclass
class Turns:
    """Takes turns. ``again`` is how often a void one is repeated; ``clock`` is replaced by tests."""

    again: int = 1
    clock: Callable[[], float] = time.monotonic
    _last: tuple[Probe, float, dict[str, float]] | None = None

    def take(self, work: Callable[[], Row], probe: Probe, *, shared: bool = False) -> Iterator[Row]:
        """Yield the row of each attempt, with its probes, until one is not void or ``again`` are used up.

        ``shared``: the probe after one turn may be the probe before the next, if nothing came between them.
        What a failing ``work`` yields is a row with its ``error`` and no time; it is not repeated.
        """
        for attempt in range(1 + self.again):
            before = self._before(probe, shared)
            with meters.foreign_load() as foreign:
                try:
                    row = work()
                except RanksFailed as error:
                    row = {"error": str(error)}
            if "error" in row:
                self._last = None
                yield {**row, "attempt": attempt, "void": False}
                return
            after = probe()
            self._last = (probe, self.clock(), after)
            void = differ(*({kind: rate for kind, rate in p.items() if kind not in EXTRA} for p in (before, after)))
            mean = {kind: (before[kind] + after[kind]) / 2 for kind in before}
            yield {
                **row, "attempt": attempt, "void": void, "limit": mean, "probes": [before, after], **foreign,
                "load_average": os.getloadavg()[0],
            }  # fmt: skip
            if not void:
                return

    def _before(self, probe: Probe, shared: bool) -> dict[str, float]:
        last = self._last
        if shared and last is not None and last[0] is probe and self.clock() - last[1] < 2.0:
            return last[2]
        return probe()


@dataclass(frozen=True)
class Settings:
    """What the command line asks for. ``nbytes`` is the size of a state; ``peers`` empty: those that a job names."""

    full: bool = False
    nbytes: int = 200_000_000
    rounds: int = 1
    again: int = 1
    peers: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def chosen(self, peers: Iterable[str]) -> list[str]:
        """Return a job's peers, or those of them that were asked for."""
        return [name for name in peers if not self.peers or name in self.peers]


@dataclass
class Bench:
    """What jobs work with: processes, a folder on the disk under test, and the rows so far."""

    settings: Settings
    folder: Path
    sink: Callable[[Row], None] = lambda row: None
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that cannot be used here, and why."""

    def __post_init__(self) -> None:
        self._pools: dict[str, Pool] = {}
        self._built: dict[str, tuple[int, Workload]] = {}
        self._steps = 0
        self._touched = np.empty(0, np.uint8)
        (self.folder / "logs").mkdir(exist_ok=True)
        self.turns = Turns(self.settings.again)
        self.write_point = self.read_point = Point()

    # ------------------------------------------------------------------ processes

    def pool(self, world: int, name: str) -> Pool:
        """Return the processes of this name: ``writer`` and ``reader`` live as long as the run."""
        key = f"{name}{world}"
        if key not in self._pools:
            self._pools[key] = Pool(world, key, self.folder / "logs")
        return self._pools[key]

    def hold(self, world: int, name: str, workload: Workload, *, filled: bool) -> Pool:
        """Return processes that hold this state, made again where a failure has ended them."""
        from benchmarks import tasks

        pool = self.pool(world, name)
        pool.start()
        key = f"{name}{world}"
        if self._built.get(key) != (pool.starts, workload):
            self._built.pop(key, None)
            pool.call(tasks.build, workload, filled)
            self._built[key] = (pool.starts, workload)
        return pool

    def release(self, world: int, name: str) -> None:
        """End these processes."""
        pool = self._pools.pop(f"{name}{world}", None)
        self._built.pop(f"{name}{world}", None)
        if pool is not None:
            pool.close()

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self._built.clear()

    # ------------------------------------------------------------------ rows

    def step(self) -> int:
        """Return a step number that no checkpoint has yet."""
        self._steps += 1
        return self._steps

    def add(self, row: Row) -> None:
        """Keep a row, and write it down at once; errors without the folders of this machine."""
        if "error" in row:
            hidden = {str(self.folder): "FOLDER", str(ROOT): "ROOT", sys.prefix: "PREFIX"}
            for path, name in hidden.items():
                row["error"] = row["error"].replace(path, name)
        self.rows.append(row)
        self.sink(row)

    def usable(self, peers: Iterable[str], pool: Pool) -> list[str]:
        """Return the peers that can be used here, and note why others cannot."""
        from benchmarks import tasks

        found = []
        for name in self.settings.chosen(peers):
            if name not in self.absent:
                try:
                    version = pool.call(tasks.facts, name)[0]
                except RanksFailed as error:
                    self.absent[name] = str(error).removeprefix("rank 0: ").split("; rank 1:")[0]
                    self.add({"kind": "absent", "peer": name, "error": self.absent[name]})
                    continue
                if name not in self.versions:
                    self.add({"kind": "peer", "peer": name, "version": version})
                found.append(name)
        return found

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions of the peers that were used so far."""
        return {row["peer"]: row["version"] for row in self.rows if row.get("kind") == "peer"}

    def measure(
        self, about: Row, work: Callable[[], Row], probe: Probe, *, shared: bool = False, failed: set[str] | None = None
    ) -> Row | None:
        """Take a turn, add its rows, and return the last one; None if the peer failed (then it is in ``failed``)."""
        row: Row = {}
        for row in self.turns.take(work, probe, shared=shared):
            self.add({**about, **row, "kind": "row"})
        what = f"{about['workload']} x{about['world']} {about['part']} {about['peer']}"
        if "error" in row:
            print(f"{what}: failed: {row['error'][:200]}", file=sys.stderr, flush=True)
            if failed is not None:
                failed.add(about["peer"])
            return None
        state = " void" if row["void"] else ""
        print(f"{what}: {row['seconds']:.3f} s{state}", file=sys.stderr, flush=True)
        return row

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Repeat no void turn meanwhile: for what can be done only once."""
        again, self.turns.again = self.turns.again, 0
        try:
            yield
        finally:
            self.turns.again = again

    # ------------------------------------------------------------------ limits

    def calibrate(self) -> None:
        """Find the depth and the request size at which this disk is fastest; they are the limit from now on."""
        points = limits.ALL_POINTS if self.settings.full else limits.QUICK_POINTS
        nbytes = min(self.settings.nbytes, 256 << 20)
        self.write_point = best_point(
            lambda p: limits.disk_write(self.folder, nbytes, threads=p.threads, request=p.request), points
        )
        path = self.folder / "calibrate"
        limits.write_file(path, nbytes)
        self.read_point = best_point(lambda p: limits.disk_read([path], threads=p.threads, request=p.request), points)
        path.unlink()
        self.add({"kind": "calibration", "write": asdict(self.write_point), "read": asdict(self.read_point)})

    def write_limit(self, nbytes: int) -> Probe:
        """Return a probe of the disk with as many bytes as are saved."""
        point = self.write_point
        return lambda: {"write": limits.disk_write(self.folder, nbytes, threads=point.threads, request=point.request)}

    def read_limit(self, files: Sequence[Path]) -> Probe:
        """Return a probe of the disk with the very files that are loaded."""
        point, large = self.read_point, [path for path in files if path.stat().st_size]
        return lambda: {"read": limits.disk_read(large, threads=point.threads, request=point.request)}

    def cached_limit(self, files: Sequence[Path]) -> Probe:
        """Return a probe of reading these files from the page cache and hashing them; of one process, of all processors."""
        large = [path for path in files if path.stat().st_size]
        nbytes = sum(path.stat().st_size + SPAN for path in large)

        def probe() -> dict[str, float]:
            warm_caches(large)
            return {"cached": limits.cached_read(large, self._room(nbytes), request=SPAN)}

        return probe

    def verified_write_limit(self, nbytes: int) -> Probe:
        """Return a probe of hashing, copying and writing as many bytes; of one process."""

        def probe() -> dict[str, float]:
            room = self._room(max(nbytes, SPAN))
            return {VERIFIED: limits.verified_write(self.folder, room, nbytes, threads=DEPTH, request=SPAN)}

        return probe

    def verified_read_limit(self, files: Sequence[Path], *, hashed: bool = True) -> Probe:
        """Return a probe of reading these files directly, hashing (or not) and copying what they hold; of one process."""
        large = [path for path in files if path.stat().st_size]
        nbytes = sum(path.stat().st_size + SPAN for path in large)

        def probe() -> dict[str, float]:
            rate = limits.verified_read(large, self._room(nbytes), threads=DEPTH, request=SPAN, hashed=hashed)
            return {VERIFIED if hashed else COPIED: rate}

        return probe

    def _room(self, nbytes: int) -> np.ndarray:
        """Return at least so much memory, always the same, each page touched just now.

        A virtual machine's host may take back what lies idle for seconds; a job's tensors do not.
        """
        if self._touched.size < nbytes:
            self._touched = np.ones(nbytes, np.uint8)
        self._touched[:: mmap.PAGESIZE] += 1
        return self._touched

    def copy_limit(self, pool: Pool, nbytes: int) -> Probe:
        """Return a probe of copying the live state, by all ranks at once."""
        from benchmarks import tasks

        def probe() -> dict[str, float]:
            by_threads = zip(*pool.call(tasks.copy_limit), strict=True)
            fastest = min(max(end for _, end in spans) - min(start for start, _ in spans) for spans in by_threads)
            return {"copy": nbytes / fastest}

        return probe

    def staging_limit(self, pool: Pool) -> Probe:
        """Return a probe of what a copy to a staging buffer can reach, by all ranks and their threads at once."""
        from benchmarks import tasks

        def probe() -> dict[str, float]:
            starts, ends, sizes = zip(*pool.call(tasks.staging_limit), strict=True)
            return {STAGING: sum(sizes) / (max(ends) - min(starts))}

        return probe


def together(*every: Probe) -> Probe:
    """Return a probe of several limits."""
    return lambda: {name: value for probe in every for name, value in probe().items()}


def merged(replies: Sequence[Mapping[str, Any]], nbytes: int) -> Row:
    """Return one row from what the ranks measured: wall time to the last rank, bytes a second of the slowest."""
    start = min(reply["started"] for reply in replies)
    row: Row = {
        "seconds": max(reply["ended"] for reply in replies) - start,
        "nbytes": nbytes,
        "min_rank_bytes_s": min(r["nbytes"] / (r["ended"] - r["started"]) for r in replies if r["nbytes"]),
        "cpu_seconds": sum(reply["cpu_seconds"] for reply in replies),
        "peak_extra_bytes": max(reply["peak_extra_bytes"] for reply in replies),
        "read_bytes": sum(reply["io"]["read_bytes"] for reply in replies),
        "written_bytes": sum(reply["io"]["write_bytes"] for reply in replies),
        "requests": sum(reply["io"]["syscr"] + reply["io"]["syscw"] for reply in replies),
    }
    for mark in ("returned", "free"):
        if mark in replies[0]:
            row[f"{mark}_seconds"] = max(reply[mark] for reply in replies) - start
    if "folder" in replies[0]:
        row["folder"] = replies[0]["folder"]
    checks = [reply["check"] for reply in replies if "check" in reply]
    if checks:
        row["check"] = next((check for check in checks if check != "equal"), "equal")
    counters: dict[str, int] = {}
    for reply in replies:
        for name, count in reply.get("counters", {}).items():
            counters[name] = counters.get(name, 0) + int(count)
    return {**row, "counters": counters} if counters else row


def json_lines(path: Path) -> Callable[[Row], None]:
    """Return a sink that appends each row to a file; folders of the machine are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")

    def write(row: Row) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded({k: v for k, v in row.items() if k != "folder"})) + "\n")

    return write


def rounded(value: Any) -> Any:
    """Return the value with floats of at most six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def settle() -> None:
    """Write dirty pages back, so that no peer pays for those of another."""
    os.sync()


@contextlib.contextmanager
def folder_for(bench: Bench, name: str) -> Iterator[Path]:
    """Yield a folder for a job's checkpoints, and remove it afterwards."""
    path = bench.folder / name
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
