"""Reading many small tensors in few requests: ranges that are known beforehand are fetched together, and early.

A request to an object store costs 10–100 ms whatever it fetches, so a tensor a request would take minutes where bytes
take a second; a disk gives a fifth of its rate to requests of a hundred KiB. Nothing is verified here: that is for who
asked.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Final

from distckpt.storage.base import Store
from distckpt.storage.direct import ALIGNMENT, BufferPool, copy_memory

REQUEST: Final = 8 << 20
"""Bytes of one request at most; ranges as large as this are left to who asks for them."""
GAP: Final = 256 << 10
"""Unwanted bytes between two ranges that are fetched rather than cost another request."""
MEMORY: Final = 128 << 20
"""Bytes that are held at most, over all files."""
AHEAD: Final = 8
_File = tuple[Store, str]
"""Which store, and the name on it."""


class _Span:
    """Bytes ``start:stop`` of a file, of which ``left`` are still to be asked for."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.left = start, stop, stop - start
        self.content: Future[memoryview] | None = None
        self.loan = ExitStack()
        self.users = 0

    @property
    def aligned(self) -> int:
        """Where the request begins: at a page of the file, so that nothing has to be moved."""
        return self.start // ALIGNMENT * ALIGNMENT


class ReadAhead:
    """Reads what it was told of in requests of up to 8 MiB, some ahead of use; ``over`` a store it has its ``read_into``.

    ``extents`` are (store, name, first byte, bytes); they should be asked for in this order within a file, each once.
    Anything else is passed on. Use it as a context; thread-safe. At most 128 MiB are held.
    """

    def __init__(self, extents: Iterable[tuple[Store, str, int, int]]) -> None:
        by_file: dict[_File, list[tuple[int, int]]] = defaultdict(list)
        for store, name, start, nbytes in extents:
            if 0 < nbytes < REQUEST:
                by_file[store, name].append((start, start + nbytes))
        size = max(64 << 10, min(REQUEST - ALIGNMENT, MEMORY // (2 * max(1, len(by_file)))))
        self._ahead = max(1, min(AHEAD, MEMORY // (size * max(1, len(by_file)))))
        self._spans = {file: list(_joined(sorted(ranges), size)) for file, ranges in by_file.items()}
        self._starts = {file: [span.start for span in spans] for file, spans in self._spans.items()}
        self._lock = threading.Lock()
        self._held = 0
        self._buffers = BufferPool(limit=MEMORY // REQUEST)
        self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="distckpt-ahead")

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def over(self, store: Store) -> ReadThrough:
        """Return a reader of one of the stores."""
        return ReadThrough(self, store)

    def read_into(self, store: Store, name: str, offset: int, destination: memoryview) -> None:
        """Fill ``destination`` from ``offset``, as ``Store.read_into`` does."""
        file, stop = (store, name), offset + destination.nbytes
        index = bisect_right(self._starts.get(file, []), offset) - 1
        span = self._spans[file][index] if index >= 0 else None
        if span is None or stop > span.stop:
            store.read_into(name, offset, destination)
            return
        with self._lock:
            for near in self._spans[file][index : index + self._ahead]:
                self._begin(store, name, near)
            content = span.content
            span.users += content is not None
        if content is None:  # asked for again, or there is no room for more
            store.read_into(name, offset, destination)
        else:
            try:
                copy_memory(destination, content.result()[offset - span.aligned : stop - span.aligned])
            finally:
                with self._lock:
                    span.users -= 1
        with self._lock:
            span.left -= stop - offset
            if span.left <= 0 and span.users == 0 and span.content is not None and span.content.done():
                span.content = None
                span.loan.close()
                self._held -= span.stop - span.start

    def _begin(self, store: Store, name: str, span: _Span) -> None:
        """Have a span fetched, if it is wanted and there is room; the lock is held."""
        nbytes = span.stop - span.start
        if span.content is None and span.left > 0 and self._held + nbytes <= MEMORY:
            self._held += nbytes
            span.content = self._pool.submit(self._fetch, store, name, span)

    def _fetch(self, store: Store, name: str, span: _Span) -> memoryview:
        view = span.loan.enter_context(self._buffers.lend(span.stop - span.aligned))[: span.stop - span.aligned]
        store.read_into(name, span.aligned, view)
        return view


class ReadThrough:
    """One store, read through a ``ReadAhead``."""

    def __init__(self, ahead: ReadAhead, store: Store) -> None:
        self._ahead, self._store = ahead, store

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """Fill ``destination`` from ``offset``, as ``Store.read_into`` does."""
        self._ahead.read_into(self._store, name, offset, destination)


def _joined(ranges: list[tuple[int, int]], size: int) -> Iterator[_Span]:
    """Join sorted ranges into spans of at most ``size`` bytes (a longer range is one of its own)."""
    span: _Span | None = None
    for start, stop in ranges:
        if span is not None and start - span.stop <= GAP and stop - span.start <= size:
            span.left += stop - start - max(0, span.stop - start)
            span.stop = max(span.stop, stop)
        else:
            if span is not None:
                yield span
            span = _Span(start, stop)
    if span is not None:
        yield span
