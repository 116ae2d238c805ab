"""Aligned memory that is used again: requests for direct I/O, and images of whole shards for background saves.

The first touch of fresh memory costs several copies (page faults), so buffers live as long as the process.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator

import numpy as np

REQUEST = 8 << 20
"""Bytes of one request: large enough for the device's full speed, small enough for a ring of them."""


class BufferPool:
    """Page-aligned buffers of ``REQUEST`` bytes, lent one at a time; at most ``limit`` are kept for the next save."""

    def __init__(self, limit: int = 16) -> None:
        self._free: list[memoryview] = []
        self._limit = limit
        self._lock = threading.Lock()
        self.allocations = 0

    @contextlib.contextmanager
    def lend(self) -> Iterator[memoryview]:
        """Yield a buffer that nobody else uses meanwhile."""
        with self._lock:
            view = self._free.pop() if self._free else None
            if view is None:
                self.allocations += 1
        if view is None:
            view = memoryview(mmap.mmap(-1, REQUEST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        try:
            yield view
        finally:
            with self._lock:
                if len(self._free) < self._limit:
                    self._free.append(view)


POOL = BufferPool()
"""The process's own: a save and a load never run at the same time in one manager."""


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy equal numbers of bytes; numpy lets go of the interpreter lock meanwhile, a memoryview does not."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
