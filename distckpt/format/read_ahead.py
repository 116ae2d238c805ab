"""Reading many small tensors in few requests: ranges that are known beforehand are fetched together, and early.

A request to an object store costs 10–100 ms whatever it fetches, so a tensor a request would take minutes where bytes
take a second; a disk gives a fifth of its rate to requests of a hundred KiB. Nothing is verified here: that is for who
asked.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Final

from distckpt.format.digest import BLOCK
from distckpt.storage.base import Store
from distckpt.storage.direct import ALIGNMENT, address, anonymous, copy_memory
from distckpt.storage.open_files import OpenFiles

REQUEST: Final = 8 << 20
"""Bytes of one request at most where each costs tens of milliseconds (object stores)."""
NEAR_REQUEST: Final = 2 << 20
"""The same elsewhere."""
GAP: Final = 256 << 10
"""Unwanted bytes between two ranges that are fetched rather than cost another request."""
MEMORY: Final = 128 << 20
"""Bytes that are held at most, over all files. The first touch of memory is slow on some machines: what was used last is
used again first, and what is never needed is never touched."""
AHEAD: Final = 8
"""Requests that are begun before they are needed, and threads for them, where each waits for a far service."""
NEAR_AHEAD: Final = 16
NEAR_THREADS: Final = 8
"""The same elsewhere; one thread for each file, and at least four, as more of them take a disk from who writes meanwhile."""
_File = tuple[Store, str]
"""Which store, and the name on it."""
Extent = tuple[Store, str, int, int]
"""Bytes of a file: which store, the name on it, the first byte, how many."""


@dataclass(frozen=True, slots=True, order=True)
class _Range:
    """Wanted bytes of a file, and when: in the ``turn``-th row, from ``at`` on of the ``total`` bytes of their lane."""

    start: int
    stop: int
    turn: int
    at: int
    total: int

    def when(self, start: int) -> tuple[int, float]:
        """Return a key by which spans that begin with its byte ``start`` are sorted in the order of their use."""
        return self.turn, (self.at + start - self.start) / self.total


class _Span:
    """Bytes ``start:stop`` of a file, of which ``left`` are still to be asked for; the ``place``-th that is needed."""

    __slots__ = ("content", "left", "place", "slot", "start", "stop", "users", "when")

    def __init__(self, start: int, stop: int, when: tuple[int, float]) -> None:
        self.start, self.stop, self.left = start, stop, stop - start
        self.when, self.place = when, 0
        self.content: Future[memoryview] | None = None
        self.slot: memoryview | None = None
        self.users = 0

    @property
    def aligned(self) -> int:
        """Where the request begins: at a page of the file, so that nothing has to be moved."""
        return self.start // ALIGNMENT * ALIGNMENT

    def common(self, start: int, stop: int) -> tuple[int, int]:
        """Return what it shares with a range that meets it."""
        return max(start, self.start), min(stop, self.stop)


class ReadAhead:
    """Reads what it was told of in requests of some MiB, some ahead of use; ``over`` a store it has its ``read_into``.

    ``rows`` follow each other in the order in which they are asked for. A row has lanes that are read side by side, each
    from its first extent to its last: an average's has one for each member. What was not told is passed on, and so are
    extents of ``large`` bytes or more, to which who asks has enough to do. Use it as a context; thread-safe. At most
    128 MiB are held.
    """

    def __init__(self, rows: Iterable[Iterable[Sequence[Extent]]], *, large: int | None = None) -> None:
        by_file = _by_file(rows, large)
        far = any(store.capabilities.latency for store, _ in by_file)
        threads = AHEAD if far else min(NEAR_THREADS, max(4, len(by_file)))
        self._ahead = AHEAD if far else NEAR_AHEAD
        # Of small tensors each file may have a span in use.
        most = min(REQUEST if far else NEAR_REQUEST, MEMORY // (self._ahead + len(by_file)))
        size = max(64 << 10, most // BLOCK * BLOCK)
        slot = size + 2 * ALIGNMENT  # a page's rest at each end
        self._spans = {file: list(_joined(sorted(ranges), size)) for file, ranges in by_file.items()}
        self._starts = {file: [span.start for span in spans] for file, spans in self._spans.items()}
        self._order = sorted(
            ((file, span) for file, spans in self._spans.items() for span in spans), key=lambda item: item[1].when
        )
        for place, (_, span) in enumerate(self._order):
            span.place = place
        self._lock = threading.Lock()
        # One piece of memory: a huge page for each small slot would be touched as a whole.
        slots = min(max(1, MEMORY // size), len(self._order))
        memory = anonymous(slots * slot)
        self._free = [memory[at : at + slot] for at in reversed(range(0, slots * slot, slot))]
        self._files = OpenFiles()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="distckpt-ahead")

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.close()

    def over(self, store: Store) -> ReadThrough:
        """Return a reader of one of the stores."""
        return ReadThrough(self, store)

    def read_into(self, store: Store, name: str, offset: int, destination: memoryview) -> None:
        """Fill ``destination`` from ``offset``, as ``Store.read_into`` does."""
        at = 0
        for part in self.lend(store, name, offset, destination):
            if address(part) != address(destination) + at:
                copy_memory(destination[at : at + len(part)], part)
            at += len(part)

    def lend(
        self, store: Store, name: str, offset: int, spare: memoryview, unit: int | None = None
    ) -> Iterator[memoryview]:
        """Yield ``len(spare)`` bytes from ``offset`` in parts, each to be read until the next is asked for.

        They lie where they were fetched to, cut where one request ended and the next began; else in ``spare``. Where
        ``unit`` is given, all parts but the last are multiples of it.
        """
        stop = offset + spare.nbytes
        every, starts = self._spans.get((store, name), []), self._starts.get((store, name), [])
        first, last = max(0, bisect_right(starts, offset) - 1), bisect_left(starts, stop)
        spans = [span for span in every[first:last] if span.stop > offset]
        told = _cover(spans, offset, stop)
        if told and (unit is None or not any((span.start - offset) % unit for span in spans[1:])):
            self._begin(spans)
            for span in spans:
                low, high = span.common(offset, stop)
                yield from self._lend(store, name, span, low, spare[low - offset : high - offset])
            return
        if told:
            self.read_into(store, name, offset, spare)
        else:  # not as it was told
            self._files.read_into(store, name, offset, spare)
            for span in spans:
                low, high = span.common(offset, stop)
                self._used(span, high - low)
        yield spare

    def _lend(self, store: Store, name: str, span: _Span, offset: int, spare: memoryview) -> Iterator[memoryview]:
        """Yield bytes of one span."""
        with self._lock:
            content = span.content
            span.users += content is not None
        try:
            if content is None:  # asked for again, or there is no room for more
                self._files.read_into(store, name, offset, spare)
                yield spare
            else:
                yield content.result()[offset - span.aligned : offset - span.aligned + len(spare)]
        finally:
            with self._lock:
                span.users -= content is not None
        self._used(span, len(spare))

    def _used(self, span: _Span, nbytes: int) -> None:
        """Count what was asked for of a span; after all of it its memory is free, once it has been fetched."""
        with self._lock:
            span.left -= nbytes
            content = span.content if span.left <= 0 else None
        if content is not None:
            content.add_done_callback(lambda _: self._free_slot(span))

    def _free_slot(self, span: _Span) -> None:
        with self._lock:
            if span.slot is not None and span.users == 0:
                self._free.append(span.slot)
                span.content = span.slot = None

    def _begin(self, wanted: Sequence[_Span]) -> None:
        """Have these spans fetched and some that are needed soon after, as far as there is room."""
        with self._lock:
            after = wanted[0].place + 1
            for file, span in [*(self._order[s.place] for s in wanted), *self._order[after : after + self._ahead]]:
                if not self._free:
                    break
                if span.content is None and span.left > 0:
                    span.slot = self._free.pop()
                    # To the end of a page where the next span goes on there: a direct read takes whole pages.
                    stop = min(self._spans[file][-1].stop, -(-span.stop // ALIGNMENT) * ALIGNMENT)
                    view = span.slot[: stop - span.aligned]
                    span.content = self._pool.submit(self._fetch, *file, span.aligned, view)

    def _fetch(self, store: Store, name: str, start: int, view: memoryview) -> memoryview:
        self._files.read_into(store, name, start, view)
        return view


def _cover(spans: Sequence[_Span], start: int, stop: int) -> bool:
    """Whether these spans, in order, hold every byte of a range."""
    joined = all(a.stop == b.start for a, b in pairwise(spans))
    return bool(spans) and joined and spans[0].start <= start and stop <= spans[-1].stop


class ReadThrough:
    """One store, read through a ``ReadAhead``."""

    def __init__(self, ahead: ReadAhead, store: Store) -> None:
        self._ahead, self._store = ahead, store

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """Fill ``destination`` from ``offset``, as ``Store.read_into`` does."""
        self._ahead.read_into(self._store, name, offset, destination)

    def lend(self, name: str, offset: int, spare: memoryview, unit: int) -> Iterator[memoryview]:
        """Yield bytes where they lie, see ``ReadAhead.lend``."""
        return self._ahead.lend(self._store, name, offset, spare, unit)


def _by_file(rows: Iterable[Iterable[Sequence[Extent]]], large: int | None) -> dict[_File, list[_Range]]:
    found: dict[_File, list[_Range]] = defaultdict(list)
    for turn, row in enumerate(rows):
        for lane in row:
            at, total = 0, sum(nbytes for *_, nbytes in lane)
            for store, name, start, nbytes in lane:
                if nbytes > 0 and (large is None or nbytes < large):
                    found[store, name].append(_Range(start, start + nbytes, turn, at, total))
                at += nbytes
    return found


def _joined(ranges: list[_Range], size: int) -> Iterator[_Span]:
    """Join sorted ranges into spans of at most ``size`` bytes, and cut what is longer.

    What does not fit into a span begins the next one, so that of a long range whole blocks lie together.
    """
    span: _Span | None = None
    for wanted in ranges:
        start = wanted.start if span is None else max(wanted.start, span.stop)  # asked for twice: counted once
        while start < wanted.stop:
            if span is None or start - span.stop > GAP or wanted.stop - span.start > size:
                if span is not None:
                    yield span
                span = _Span(start, start, wanted.when(start))
            end = min(wanted.stop, span.start + size)
            span.when = min(span.when, wanted.when(start))
            span.left, span.stop, start = span.left + end - start, end, end
    if span is not None:
        yield span
