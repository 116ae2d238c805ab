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
_MADV_POPULATE_WRITE = 23
DIRECT_READ = 128 << 10
"""Reads of at least this many bytes go past the page cache, unless it has them."""

_libc = ctypes.CDLL(None)  # its calls let go of the interpreter lock
_libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_MAP_FAILED = ctypes.c_void_p(-1).value or 0

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


def prefault(start: int, nbytes: int) -> None:
    """Take the page faults of writable memory now (MADV_POPULATE_WRITE, Linux 5.14); a hint, never an error.

    A huge page at a time: longer calls would keep the process from mapping anything else meanwhile.
    """
    first, end = -(-start // ALIGNMENT) * ALIGNMENT, (start + nbytes) // ALIGNMENT * ALIGNMENT
    for at in range(first, end, HUGE_PAGE):
        if _libc.madvise(at, min(HUGE_PAGE, end - at), _MADV_POPULATE_WRITE):
            return


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


WRONG = 8
"""Wrong answers about the page cache after which it is not asked any more."""


class Residency:
    """What the page cache has of an open file, as mincore(2) tells; asking reads nothing. Safe in several threads.

    A kernel tells everything to be there to a caller who may not write the file (Linux 5.2, against side channels).
    """

    def __init__(self, fd: int, size: int) -> None:
        """Map the file's ``size`` bytes; its pages are never touched. What cannot be mapped is nowhere resident."""
        self._size = size
        self._start: int = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0) if size else _MAP_FAILED
        self._wrong = 0

    def holds(self, offset: int, nbytes: int) -> bool:
        """Whether every page of the range is in memory. The first is asked for alone: what is cold is cold from there."""
        if self._wrong > WRONG or self._start == _MAP_FAILED or not 0 <= offset < offset + nbytes <= self._size:
            return False
        first, last = offset // mmap.PAGESIZE, -(-(offset + nbytes) // mmap.PAGESIZE)
        return self._all(first, 1) and self._all(first, last - first)

    def _all(self, first: int, pages: int) -> bool:
        found = ctypes.create_string_buffer(pages)
        start = self._start + first * mmap.PAGESIZE
        return _libc.mincore(start, pages * mmap.PAGESIZE, found) == 0 and _resident(found.raw) == pages

    def pages(self) -> int:
        """Count the file's pages that are in memory, from its start to its end. Raises ``OSError`` if nobody can tell."""
        count = -(-self._size // mmap.PAGESIZE)
        found = ctypes.create_string_buffer(count)
        if count and (self._start == _MAP_FAILED or _libc.mincore(self._start, self._size, found) != 0):
            raise OSError("mincore(2) does not say what of the file is in the page cache")
        return _resident(found.raw)

    def distrust(self) -> None:
        """Remember that a yes was wrong. A page may be there and locked just now; after a few it is always no."""
        self._wrong += 1

    def close(self) -> None:
        """Unmap it; nobody may ask any more."""
        start, self._start = self._start, _MAP_FAILED
        if start != _MAP_FAILED:
            _libc.munmap(start, self._size)


def _resident(found: bytes) -> int:
    """Count the bytes with the lowest bit set; the others mean nothing, and are 0 on every kernel so far."""
    ones = found.count(1)
    return ones if ones + found.count(0) == len(found) else sum(map((1).__and__, found))


def read_resident(fd: int, views: Sequence[memoryview], offset: int) -> bool:
    """Fill the views from a file if the page cache has all of it (RWF_NOWAIT, preadv2(2)); False where it does not.

    Ask ``Residency`` before: where pages are missing this starts a readahead (Linux 5.10), megabytes that nobody needs.
    """
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
        copy_memory(view[:useful], buffer[skip : skip + useful])
    return useful


def copy_memory(target: memoryview, source: memoryview) -> None:
    """Copy equal numbers of bytes between writable buffers; other threads run meanwhile."""
    if target.nbytes:
        _libc.memmove(address(target), address(source), target.nbytes)


def address(view: memoryview) -> int:
    """Return the address of a writable view's first byte; 1, which is never aligned, for a read-only one."""
    if view.readonly or not view.nbytes:
        return 1
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
