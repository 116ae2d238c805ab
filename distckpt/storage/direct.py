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
import os

ALIGNMENT = 4096
"""Memory address, file offset and length must be multiples of this; enough for every common device."""

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


def address(view: memoryview) -> int:
    """Return the address of a writable view's first byte; 1, which is never aligned, for a read-only one."""
    if view.readonly or not view.nbytes:
        return 1
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
