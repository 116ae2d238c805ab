"""Direct I/O (O_DIRECT): whole aligned requests past the page cache, where the file system takes them.

Bytes go from the caller's memory to the device at the device's own speed and a tenth of the CPU time, and no dirty
pages pile up before fsync. A file system that refuses (tmpfs, some FUSE and network ones, other alignments) is found
out by trying; the caller then goes on through the page cache. Durability still needs fsync: size and extents are
metadata.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence

ALIGNMENT = 4096
"""Memory address, file offset and length must be multiples of this; enough for every common device."""

REQUEST = 8 << 20
"""Bytes of one request: large enough for the device's full speed, small enough for a ring of them."""
HUGE_PAGE = 2 << 20
_IOV_MAX = 1024
DIRECT_READ = 1 << 20
"""Reads of at least this many bytes go past the page cache, unless it has them."""

_libc = ctypes.CDLL(None)  # its calls let go of the interpreter lock
_libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


class DirectFile:
    """A second descriptor of an open file, for aligned requests only."""

    def __init__(self, fd: int, flags: int) -> None:
        """Open the same file again with O_DIRECT; ``flags`` is the access mode."""
        self._fd = -1
        if fd < 0:
            return
        with contextlib.suppress(OSError):
            self._fd = os.open(f"/proc/self/fd/{fd}", flags | os.O_DIRECT | os.O_CLOEXEC)

    def write(self, view: memoryview, offset: int) -> int:
        """Write the aligned front of ``view`` and return its length in bytes; 0 where nothing could go directly."""
        nbytes = len(view) // ALIGNMENT * ALIGNMENT
        if self._fd < 0 or not nbytes or offset % ALIGNMENT or address(view) % ALIGNMENT:
            return 0
        try:
            return os.pwrite(self._fd, view[:nbytes], offset)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self.close()
            return 0

    def close(self) -> None:
        """Close it; later requests go nowhere and return 0."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class BufferPool:
    """Page-aligned buffers of ``nbytes`` each, lent one at a time; at most ``limit`` are kept.

    The first touch of fresh memory costs several copies (page faults), so they live as long as the process and ask for
    huge pages.
    """

    def __init__(self, limit: int = 16, nbytes: int = REQUEST) -> None:
        self._free: list[memoryview] = []
        self._limit = limit
        self._lock = threading.Lock()
        self.nbytes = nbytes
        self.allocations = 0

    @contextlib.contextmanager
    def lend(self, nbytes: int = 0) -> Iterator[memoryview]:
        """Yield a buffer that nobody else uses meanwhile; where more than the usual ``nbytes`` are wanted, a new one."""
        if nbytes > self.nbytes:
            yield anonymous(nbytes)
            return
        with self._lock:
            view = self._free.pop() if self._free else None
            if view is None:
                self.allocations += 1
        if view is None:
            view = anonymous(self.nbytes)
        try:
            yield view
        finally:
            with self._lock:
                if len(self._free) < self._limit:
                    self._free.append(view)


def anonymous(nbytes: int) -> memoryview:
    """Return fresh zeroed memory that starts at a huge page's boundary and asks for huge pages.

    A page fault for every 4 KiB costs more than filling them (0.3 against 8 GB/s on some virtual machines);
    see madvise(2), MADV_HUGEPAGE.
    """
    region = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(region)
    skip = -address(view) % HUGE_PAGE
    return view[skip : skip + nbytes]


def advise_huge_pages(start: int, nbytes: int) -> None:
    """Ask for huge pages behind memory that is not touched yet, as far as it holds whole ones; a hint, never an error."""
    first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, (start + nbytes) // HUGE_PAGE * HUGE_PAGE
    if first < last:
        _libc.madvise(first, last - first, mmap.MADV_HUGEPAGE)


POOL = BufferPool()
"""The process's own, for saves and loads."""


def read_direct(direct: int, view: memoryview, offset: int) -> int:
    """Fill the front of a writable view from an O_DIRECT descriptor and return how many bytes; 0 where it is refused.

    In place where memory and file are aligned alike, else by way of a reused buffer.
    """
    done = 0
    with POOL.lend() as buffer:
        while done < len(view):
            got = _read_aligned(direct, view[done:], offset + done, buffer)
            if got <= 0:
                break
            done += got
    return done


def read_resident(fd: int, views: Sequence[memoryview], offset: int) -> bool:
    """Fill the views from a file if the page cache has all of it (RWF_NOWAIT, preadv2(2)); False where it does not."""
    for first in range(0, len(views), _IOV_MAX):
        part = views[first : first + _IOV_MAX]
        nbytes = sum(map(len, part))
        try:
            if os.preadv(fd, part, offset, os.RWF_NOWAIT) != nbytes:
                return False
        except OSError:  # EAGAIN: not in the cache; EOPNOTSUPP: cannot tell
            return False
        offset += nbytes
    return True


def _read_aligned(direct: int, view: memoryview, offset: int, buffer: memoryview) -> int:
    start = offset // ALIGNMENT * ALIGNMENT
    skip = offset - start
    whole = len(view) // ALIGNMENT * ALIGNMENT
    in_place = bool(whole) and not skip and address(view) % ALIGNMENT == 0
    wanted = min(len(buffer), -(-(skip + len(view)) // ALIGNMENT) * ALIGNMENT)
    try:
        got = os.preadv(direct, [view[:whole] if in_place else buffer[:wanted]], start)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return 0
    useful = min(got - skip, len(view))
    if not in_place and useful > 0:
        _libc.memmove(address(view), address(buffer) + skip, useful)
    return useful


def address(view: memoryview) -> int:
    """Return the address of a writable view's first byte; 1, which is never aligned, for a read-only one."""
    if view.readonly or not view.nbytes:
        return 1
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
