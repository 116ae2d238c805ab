"""Reading boxes of a committed checkpoint into live tensors; every byte that is used is verified first.

A wanted box is intersected with the saved boxes of the shards that can hold it (read_plan.py). A request whose bytes all
go to memory as they are is first tried from the page cache, straight into the tensors: one copy. Any other is read into
a reused buffer, past the page cache where that pays, and each run of blocks is hashed and copied on while the processor's
cache holds it. Nothing is gathered; ranks that want the same bytes may read them for each other (share.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from distckpt.boxes import flat_range_to_boxes
from distckpt.dcp import share
from distckpt.dcp.buffers import memory_at, move
from distckpt.dcp.leaves import torch_dtype
from distckpt.dcp.parallel import local_ranks, processors, run_all, turns
from distckpt.dcp.read_plan import Request, Run, Use, Want, plan_requests
from distckpt.errors import ShardError, StoreError
from distckpt.format import digest as digests
from distckpt.format.dtypes import itemsize
from distckpt.format.manifest import Manifest
from distckpt.format.runs import HINT
from distckpt.format.shard_index import ShardIndex
from distckpt.storage.base import Reader, Store
from distckpt.storage.direct import ALIGNMENT, POOL, address
from distckpt.storage.open_files import OpenFiles

__all__ = ["CheckpointReader", "ReadStats", "Want"]

Progress = Callable[[int], None] | None
READ_THREADS = 12
"""Requests of a rank under way at a time, at most: enough for a device's full speed while few of them are hashed and copied on.

Fewer where ranks share few processors: six for each processor of a rank, but four in any case. Where requests wait for a
far service and not for a device, as many as the caller allows."""
SAMPLES = 16
"""Requests of which a page tells whether memory has all of them."""
HELD = 256 << 10
"""Fewer bytes, of small tensors, are copied without letting other threads in: they wait for the disk, not for this one."""


@dataclass(slots=True)
class ReadStats:
    """Counters of one read: bytes asked for, bytes read from storage, requests, bytes that went straight to tensors."""

    wanted_bytes: int = 0
    read_bytes: int = 0
    requests: int = 0
    in_place_bytes: int = 0
    mismatches: list[str] = field(default_factory=list)


class CheckpointReader:
    """Reads one committed checkpoint into live tensors. Headers are opened as they are needed and kept.

    ``folder`` is the step folder's name on the store. Safe to use from several threads.
    """

    def __init__(self, store: Store, manifest: Manifest, folder: str) -> None:
        self.store = store
        self.manifest = manifest
        self.folder = folder
        self.index = ShardIndex(store, manifest, folder)
        self.stats = ReadStats()
        self._lock = threading.Lock()

    def read(
        self,
        wants: Sequence[Want],
        *,
        threads: int = 4,
        compare: bool = False,
        progress: Progress = None,
    ) -> ReadStats:
        """Fill every want's target, or with ``compare`` only compare it with storage, bit for bit.

        Differences end up in ``stats.mismatches`` as texts that name FQN and box. Raises ``ShardError`` for
        damage (file, tensor, rank named) and ``IncompatibleState`` where the checkpoint lacks a part of a want.
        """
        self.read_requests(self.plan(wants), threads=threads, compare=compare, progress=progress)
        return self.stats

    def plan(self, wants: Sequence[Want], *, apart: bool = False) -> list[Request]:
        """Return the requests that fill every want (``plan_requests``); opens headers as needed. Raises as ``read`` does."""
        self.stats.wanted_bytes += sum(want.target.nbytes for want in wants)
        return plan_requests(self.index, [w for w in wants if w.target.numel() or w.box.numel], apart=apart)

    def read_requests(
        self, requests: Sequence[Request], *, threads: int, compare: bool = False, progress: Progress = None
    ) -> None:
        """Do what was planned, on this rank alone."""
        turn = turns(sum(r.stop - r.start for r in requests), sum(len(r.runs) for r in requests))
        with closing(OpenFiles()) as files:

            def run(request: Request) -> None:
                self._run(self._file(files, request), request, compare, turn)
                if progress is not None:
                    progress(request.stop - request.start)

            run_all(run, requests, self._depth(threads), "read")

    def read_shared(
        self,
        requests: Sequence[Request],
        group: Any,
        *,
        threads: int,
        decide: Callable[[share.Rates], bool],
        progress: Progress = None,
    ) -> list[Request]:
        """Do what was planned together with the ranks of ``group``, who planned the same: each byte is read once.

        ``decide`` may stop that after some turns, on all ranks alike; returns the rest, for ``read_requests``.
        """
        with closing(OpenFiles()) as files:

            def fetch(request: Request, buffer: memoryview) -> None:
                self._fetch(self._file(files, request), request, buffer)
                self._count(request.stop - request.start, 0)

            def deliver(request: Request, buffer: memoryview) -> None:
                self._deliver(request, buffer, compare=False, verified=True)
                if progress is not None:
                    progress(request.stop - request.start)

            depth = self._depth(threads)
            work = share.SharedRead(
                group, requests, fetch=fetch, verify=self._verify_all, deliver=deliver, threads=depth
            )
            return work.run(decide)

    def in_memory(self, requests: Sequence[Request]) -> bool:
        """Whether memory has the bytes of some requests, as far as a page each of ``SAMPLES`` of them can tell."""
        page = memoryview(bytearray(ALIGNMENT))
        with closing(OpenFiles()) as files:

            def cached(request: Request) -> bool:
                nbytes = min(ALIGNMENT, request.stop - request.start)
                file = self._file(files, request)
                with self._named(request):
                    return file.read_cached(request.start, nbytes, lambda: [page[:nbytes]])

            return bool(requests) and all(map(cached, requests[:: -(-len(requests) // SAMPLES)]))

    def _depth(self, threads: int) -> int:
        if self.store.capabilities.latency:
            return threads
        return min(threads, READ_THREADS, max(4, 6 * processors() // local_ranks()))

    def _run(self, file: Reader, request: Request, compare: bool, turn: threading.Semaphore) -> None:
        nbytes = request.stop - request.start
        if not compare and request.in_place:
            with turn:
                cached = self._read_cached(file, request)
            if cached:
                self._count(nbytes, nbytes)
                return
        with POOL.lend(nbytes + 2 * ALIGNMENT) as buffer:
            self._fetch(file, request, buffer)
            self._count(nbytes, 0)
            with turn:
                self._deliver(request, buffer, compare=compare)

    def _file(self, files: OpenFiles, request: Request) -> Reader:
        with self._named(request):  # a file of an earlier step may be gone, and nothing has looked at it yet
            return files.get(self.store, request.path)

    def _fetch(self, file: Reader, request: Request, buffer: memoryview) -> None:
        """Fill the front of a buffer with a request's bytes, whole pages of the file where there are any."""
        start, stop = share.span(request)
        stop = min(self.index.size(request.shard, request.path), stop)
        with self._named(request):
            file.read_into(start, buffer[: stop - start])

    @contextmanager
    def _named(self, request: Request) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            raise ShardError(
                f"{request.path}: bytes {request.start}..{request.stop} of rank {request.shard}'s shard "
                f"cannot be read: {error}{self._referrer(request)}"
            ) from error

    def _referrer(self, request: Request) -> str:
        """Say which shard needs a file of an earlier step."""
        own = self.index.path(request.shard)
        return "" if request.path == own else f"; {own} refers to it. If it is not there, {HINT}"

    def _count(self, nbytes: int, in_place: int) -> None:
        with self._lock:
            self.stats.read_bytes += nbytes
            self.stats.in_place_bytes += in_place
            self.stats.requests += 1

    def _read_cached(self, file: Reader, request: Request) -> bool:
        """Fill the tensors from the page cache if that holds the whole request, and verify them."""
        views: list[memoryview] = []

        def destinations() -> list[memoryview]:
            views.extend(memory_at(run.uses[0].target_of(run.first * run.block), run.nbytes) for run in request.runs)
            return views

        with self._named(request):
            if not file.read_cached(request.start, request.stop - request.start, destinations):
                return False
        for run, view in zip(request.runs, views, strict=True):
            if digests.block_digests(view, run.block) != list(run.stored.digests[run.first : run.last]):
                self._verify_run(request, run, view)
        return True

    def _verify_all(self, request: Request, buffer: memoryview) -> None:
        """Verify a request; ``buffer`` begins at its first page."""
        for run, data in _data(request, buffer):
            self._verify_run(request, run, data)

    def _verify_run(self, request: Request, run: Run, data: memoryview) -> None:
        for number in range(run.first, run.last):
            self._verify(request, run, number, data)

    def _deliver(self, request: Request, buffer: memoryview, *, compare: bool, verified: bool = False) -> None:
        """Verify a request block by block and copy on what is wanted of it; ``buffer`` begins at its first page."""
        first = address(buffer) - share.span(request)[0]  # where the file's first byte would lie
        for run, data in _data(request, buffer):
            source = first + run.start - run.first * run.block
            if not verified:
                self._verify_run(request, run, data)
            for use in run.uses:
                if compare or not use.address:
                    self._scatter(run, use, data, compare)
                else:
                    _hand_out(run, use, source)

    def _verify(self, request: Request, run: Run, number: int, data: memoryview) -> None:
        """Compare one block of a run, whose bytes ``data`` holds, with its digest."""
        begin = (number - run.first) * run.block
        part = data[begin : begin + run.block]
        if digests.digest(part) != run.stored.digests[number]:
            start = run.start + begin
            raise ShardError(
                f"{request.path}: bytes {start}..{start + len(part)} of {run.stored.fqn} (written by rank {request.shard}) "
                f"do not match their digest; the file is damaged: fall back to an older checkpoint{self._referrer(request)}"
            )

    def _scatter(self, run: Run, use: Use, data: memoryview, compare: bool) -> None:
        stored, want = run.stored, use.want
        if address(data) % itemsize(stored.dtype):  # a block of its own in an incremental shard starts at any byte
            data = memoryview(bytearray(data))
        values = torch.frombuffer(data, dtype=torch.uint8).view(torch_dtype(stored.dtype))
        first, at = run.first * run.block // itemsize(stored.dtype), 0
        for region in flat_range_to_boxes(stored.box.sizes, first, first + values.numel()):
            piece = values[at : at + region.numel].reshape(region.sizes)
            at += region.numel
            absolute = region.moved_by(stored.box.offsets)
            common = absolute.intersect(use.common)
            if common is None:
                continue
            target = want.target[common.relative_to(want.box.offsets).slices]
            found = piece[common.relative_to(absolute.offsets).slices]
            if not compare:
                target.copy_(found)
            elif not _same_bits(target, found):
                with self._lock:
                    self.stats.mismatches.append(f"{want.fqn} box {common.offsets}+{common.sizes}")


def _data(request: Request, buffer: memoryview) -> Iterator[tuple[Run, memoryview]]:
    """Yield a request's runs and the bytes of each."""
    start = share.span(request)[0]
    for run in request.runs:
        yield run, buffer[run.start - start : run.start - start + run.nbytes]


def _hand_out(run: Run, use: Use, source: int) -> None:
    """Copy what goes to memory as it is; byte 0 of the stored box would lie at ``source``."""
    low = run.first * run.block
    begin, end = max(use.begin, low), min(use.end, low + run.nbytes)
    if begin < end:
        move(use.target_of(begin), source + begin, end - begin, held=HELD)


def _same_bits(live: torch.Tensor, saved: torch.Tensor) -> bool:
    a, b = live.detach().cpu().contiguous().reshape(-1), saved.to(live.dtype).contiguous().reshape(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
