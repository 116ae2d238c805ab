"""An open file that is read in many requests, from the page cache where it has the bytes, past it elsewhere."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence

from distckpt.storage.direct import DIRECT_READ, Residency, read_direct, read_resident
from distckpt.storage.paths import check_range, flat_bytes, mapped
from distckpt.storage.posix_files import read_all
from distckpt.storage.posix_folders import Count, close_all


class PosixReader:
    """See ``storage.base.Reader``. ``again`` reads by name, for a server that lost the open file (ESTALE)."""

    def __init__(
        self, fd: int, size: int, *, path: str, count: Count, again: Callable[[int, memoryview], None] | None = None
    ) -> None:
        """Duplicate the descriptor ``fd`` of a file of ``size`` bytes; large reads get one more with O_DIRECT."""
        self._path, self._size, self._count, self._again = path, size, count, again
        self._fd = os.dup(fd)
        self._direct = -1
        self._residency: Residency | None = None
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):  # refused: tmpfs, some FUSE
            self._direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def read_into(self, offset: int, destination: memoryview) -> None:
        """See ``Reader.read_into``; ``destination`` must be writable and contiguous."""
        view = flat_bytes(memoryview(destination), writable=True)
        with mapped("read", self._path, reading=True):
            check_range(self._path, offset, len(view), self._size)
            try:
                done = self._quick(view, offset) if len(view) >= DIRECT_READ else 0
                read_all(self._fd, view[done:], offset + done)
            except OSError as error:
                if error.errno != errno.ESTALE or self._again is None:
                    raise
                self._again(offset, view)
                return
        self._count("bytes_read", len(view))

    def read_cached(self, offset: int, nbytes: int, destinations: Callable[[], Sequence[memoryview]]) -> bool:
        """See ``Reader.read_cached``: what the page cache has, scattered into the views in one copy."""
        with mapped("read", self._path, reading=True):
            check_range(self._path, offset, nbytes, self._size)
            if not self._resident(offset, nbytes, destinations):
                return False
        self._count("bytes_read", nbytes)
        return True

    def fetch_ahead(self, offset: int, nbytes: int) -> bool:
        """See ``Reader.fetch_ahead``: the kernel reads into the page cache (posix_fadvise(2))."""
        if not hasattr(os, "posix_fadvise") or self._pages().holds(offset, nbytes):
            return False
        with mapped("fetch ahead", self._path, reading=True):
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_WILLNEED)
        self._count("bytes_fetched_ahead", nbytes)
        return True

    def _quick(self, view: memoryview, offset: int) -> int:
        """Fill the front of a view, from memory or past the page cache; 0 bytes where neither works."""
        if self._resident(offset, len(view), lambda: [view]):
            return len(view)
        return read_direct(self._direct, view, offset) if self._direct >= 0 else 0

    def _resident(self, offset: int, nbytes: int, views: Callable[[], Sequence[memoryview]]) -> bool:
        """Fill the views if the page cache has all of it."""
        pages = self._pages()
        if not pages.holds(offset, nbytes):
            return False
        if read_resident(self._fd, views(), offset):
            return True
        pages.distrust()
        return False

    def _pages(self) -> Residency:
        with self._lock:
            if self._residency is None:
                self._residency = Residency(self._fd, self._size)
            return self._residency

    def close(self) -> None:
        """See ``Reader.close``."""
        descriptors, self._fd, self._direct = [self._fd, self._direct], -1, -1
        if self._residency is not None:
            self._residency.close()
        close_all([fd for fd in descriptors if fd >= 0])
