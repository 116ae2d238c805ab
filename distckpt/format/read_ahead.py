"""Reading many small tensors in few requests: ranges that are known beforehand are fetched together, and early.

A request to an object store costs 10–100 ms whatever it fetches, so a tensor a request would take minutes where bytes
take a second. Nothing is verified here: that is for who asked.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final

from distckpt.storage.base import Store

REQUEST: Final = 8 << 20
"""Bytes of one request at most; ranges as large as this are left to who asks for them."""
GAP: Final = 256 << 10
"""Unwanted bytes between two ranges that are fetched rather than cost another request."""
MEMORY: Final = 256 << 20
"""Bytes that are held at most, over all files."""
AHEAD: Final = 8


class _Span:
    """Bytes ``start:stop`` of a file, of which ``left`` are still to be asked for."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.left = start, stop, stop - start
        self.content: Future[memoryview] | None = None


class ReadAhead:
    """Has the ``read_into`` of a store, and reads what it was told of in requests of up to 8 MiB, some ahead of use.

    ``extents`` are (name, first byte, bytes); they should be asked for in this order within a file, each once. Anything
    else is passed on. Use it as a context; thread-safe.
    """

    def __init__(self, store: Store, extents: Iterable[tuple[str, int, int]]) -> None:
        self._store = store
        by_file: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for name, start, nbytes in extents:
            if 0 < nbytes < REQUEST:
                by_file[name].append((start, start + nbytes))
        size = max(64 << 10, min(REQUEST, MEMORY // (2 * max(1, len(by_file)))))
        self._ahead = max(1, min(AHEAD, MEMORY // (size * max(1, len(by_file)))))
        self._spans = {name: list(_joined(sorted(ranges), size)) for name, ranges in by_file.items()}
        self._starts = {name: [span.start for span in spans] for name, spans in self._spans.items()}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="distckpt-ahead")

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """Fill ``destination`` from ``offset``, as ``Store.read_into`` does."""
        stop = offset + destination.nbytes
        index = bisect_right(self._starts.get(name, []), offset) - 1
        span = self._spans[name][index] if index >= 0 else None
        if span is None or stop > span.stop:
            self._store.read_into(name, offset, destination)
            return
        with self._lock:
            for near in self._spans[name][index : index + self._ahead]:
                if near.content is None and near.left > 0:
                    near.content = self._pool.submit(self._fetch, name, near)
            content = span.content
        if content is None:  # asked for again
            self._store.read_into(name, offset, destination)
            return
        destination.cast("B")[:] = content.result()[offset - span.start : stop - span.start]
        with self._lock:
            span.left -= stop - offset
            if span.left <= 0:
                span.content = None

    def _fetch(self, name: str, span: _Span) -> memoryview:
        view = memoryview(bytearray(span.stop - span.start))
        self._store.read_into(name, span.start, view)
        return view


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
