"""What a rank does on a command: build the state, and the timed operations. Times are of the machine's monotonic clock."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import meters
from benchmarks.limits import copy_rate
from benchmarks.payload import Live
from benchmarks.shapes import Workload
from benchmarks.worker import Worker

SCRATCH = 256 << 20
"""Bytes that the state is copied to, again and again: every process holds them. Copies as large go past the caches."""
IDLE = 1 << 30
"""Bytes of the state that are copied to idle memory: every process holds as many for that, besides what peers hold."""
Measured = dict[str, Any]


def facts(worker: Worker, name: str) -> str:
    """Return the version of a peer; raises what it raises where it cannot be used."""
    return worker.peer(name).version()


def build(worker: Worker, workload: Workload, filled: bool) -> Measured:
    """Make this state the live one, in the memory of the one before."""
    worker.close_peers()
    worker.kept.clear()
    _forget_plans()
    worker.live = None
    worker.noise.versions.clear()
    worker.live = Live(workload, worker.rank, worker.world, worker.arena, worker.noise)
    worker.live.fill() if filled else worker.live.poison()
    worker.scratch.take(min(SCRATCH, max(worker.live.nbytes, 1 << 20)))
    return {"nbytes": worker.live.nbytes, "tensors": len(worker.live.locals)}


def _forget_plans() -> None:
    """Empty DCP's caches, which are attributes of its planner's class."""
    from torch.distributed.checkpoint.planner import SavePlanner

    for name, value in vars(SavePlanner).items():
        if name.startswith("_cached") and isinstance(value, dict):
            value.clear()


def change(worker: Worker, containing: str) -> int:
    """Give the tensors whose name contains this other values; return their bytes on this rank."""
    live = state_of(worker)
    changed = 0
    for local in live.locals:
        if containing in local.spec.name:
            worker.noise.versions[local.spec.name] = worker.noise.versions.get(local.spec.name, 0) + 1
            changed += local.octets.size
    live.fill()
    return changed


def expect(worker: Worker, versions: Mapping[str, int]) -> None:
    """Compare with these versions of tensors from now on."""
    worker.noise.versions = dict(versions)


def versions(worker: Worker) -> dict[str, int]:
    """Return how often each changed tensor has changed."""
    return dict(worker.noise.versions)


def state_of(worker: Worker) -> Live:
    """Return the live state."""
    assert worker.live is not None, "build comes first"
    return worker.live


# ---------------------------------------------------------------------- the clock


@contextlib.contextmanager
def measured(worker: Worker, out: Measured) -> Iterator[Callable[[str], None]]:
    """Time what is done inside, all ranks from a barrier on; yields a function that marks a moment by name.

    ``out`` gets ``started`` and ``ended`` (seconds of a clock that all ranks share), ``<mark>`` likewise, CPU seconds,
    bytes and calls of this rank and its children, and the most memory beyond what was held before.
    """
    children = meters.descendants(os.getpid())
    peak = meters.PeakMemory()
    worker.barrier()
    before = meters.read(children)
    out["started"] = time.monotonic()
    yield lambda name: out.__setitem__(name, time.monotonic())
    out["ended"] = time.monotonic()
    children = meters.descendants(os.getpid())
    after = meters.read(children)
    out["cpu_seconds"] = after.cpu_seconds - before.cpu_seconds
    out["io"] = {name: after.io[name] - before.io[name] for name in after.io}
    out["peak_extra_bytes"] = peak.extra(children)
    out["nbytes"] = state_of(worker).nbytes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' own notices out of the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------- operations


def save(worker: Worker, name: str, root: Path, step: int) -> Measured:
    """Save durably, from memory that was used just now, as by a training step. ``returned``: when the library came back."""
    live, peer, out = state_of(worker), worker.peer(name), Measured()
    live.use()
    with quiet(), measured(worker, out) as mark:
        peer.save(root, step, live)
        mark("returned")
        worker.barrier()  # a rank syncs files of others
        peer.sync(root, step, worker.rank, worker.world)
    return _about(worker, name, root, step, out)


def load(worker: Worker, name: str, root: Path, step: int) -> Measured:
    """Load into a state that was overwritten before, and compare every byte after the clock has stopped."""
    live, peer, out = state_of(worker), worker.peer(name), Measured()
    live.poison()
    with quiet(), measured(worker, out):
        peer.load(root, step, live)
    out["check"] = live.compare()
    return _about(worker, name, root, step, out)


def resume(worker: Worker, name: str, root: Path, step: int) -> Measured:
    """Load in a process that has done nothing before; the saves that follow are this job's."""
    live, peer, out = state_of(worker), worker.peer(name), Measured()
    live.poison()
    with quiet(), measured(worker, out):
        peer.resume(root, step, live)
    out["check"] = live.compare()
    return _about(worker, name, root, step, out)


def background(worker: Worker, name: str, root: Path, step: int) -> Measured:
    """Save in the background with nothing to do meanwhile: the stall until weights may change, and the whole."""
    live, peer, out = state_of(worker), worker.peer(name), Measured()
    with quiet(), measured(worker, out) as mark:
        peer.begin(root, step, live)
        mark("returned")
        peer.fence()
        mark("free")
        peer.finish()
    return _about(worker, name, root, step, out)


def _about(worker: Worker, name: str, root: Path, step: int, out: Measured) -> Measured:
    peer = worker.peer(name)
    return {**out, "folder": str(peer.path(root, step)), "counters": peer.counters()}


def copy_limit(worker: Worker) -> list[tuple[float, float]]:
    """Copy the whole live state to touched memory with one thread, and with as many as this rank may use.

    Returns (start, end) of each; the ranks do it together.
    """
    live = state_of(worker)
    whole = worker.arena.take(live.nbytes)
    scratch = worker.scratch.take(min(SCRATCH, max(live.nbytes, 1 << 20)))
    spans = []
    for threads in sorted({1, torch.get_num_threads()}):
        worker.barrier()
        started = time.monotonic()
        copy_rate(whole, scratch, threads=threads)
        spans.append((started, time.monotonic()))
    return spans


def staging_limit(worker: Worker) -> tuple[float, float, int]:
    """Copy every other tensor of the live state, by all threads that this rank may use; (start, end, bytes).

    The odd ones and the even ones in turn, each to memory of their own: that lay idle since the probe before the last, as
    what a save is staged in has since the save before. Hosts of virtual machines may take pages back meanwhile: the first use
    of one then takes tens of microseconds, and no counter of the guest tells. Of a large state a part stands for all of it.
    """
    live, threads = state_of(worker), torch.get_num_threads()
    worker.odd = not worker.odd
    pieces = [local.octets for local in live.locals]
    ends = list(itertools.accumulate(piece.size for piece in pieces))
    count = max(2, bisect.bisect_right(ends, IDLE))
    room = worker.idle.take(max(1, *ends[:count]))
    jobs = list(zip(pieces[:count], ends[:count], strict=True))[worker.odd :: 2]
    left = iter(jobs)

    def copy(_: int) -> None:
        for piece, end in left:
            np.copyto(room[end - piece.size : end], piece)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # threads are started before the clock
        worker.barrier()
        started = time.monotonic()
        list(pool.map(copy, range(threads)))
        return started, time.monotonic(), sum(piece.size for piece, _ in jobs)


def remove(worker: Worker, folder: str) -> None:
    """Delete a checkpoint that was measured: its commit mark first, so that nobody sees half of it."""
    if worker.rank == 0:
        path = Path(folder)
        for mark in path.glob("manifest-*.json"):
            mark.unlink()
        shutil.rmtree(path, ignore_errors=True)


def close_peer(worker: Worker, name: str) -> None:
    """End an adapter and what it runs in the background."""
    peer = worker.peers.pop(name, None)
    if peer is not None:
        peer.close()
