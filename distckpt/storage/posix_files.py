"""Writing files on POSIX: the shard writer, and publishing a small file all or nothing.

Only raw descriptors, never Python file objects: bytes in a buffer that fsync does not see cannot happen here.
An fsync or close error ends a file for good, because the kernel may have dropped the dirty pages and would
answer 0 the next time (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator

from distckpt import failpoints
from distckpt.errors import StoreError
from distckpt.storage.direct import DirectFile
from distckpt.storage.paths import flat_bytes, store_error
from distckpt.storage.posix_folders import CREATE_FLAGS, Count, close_all, temp_name, unlink_quietly

READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""O_NONBLOCK: opening a FIFO that was put in a file's place must not hang; nothing for regular files."""

_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
_NO_LINK = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSYS})


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of a flat view at ``offset``. Short writes are normal (full disk, limits, 2 GiB calls)."""
    done = 0
    while done < len(data):
        written = os.pwrite(fd, data[done:], offset + done)
        if written <= 0:
            raise OSError(errno.EIO, f"wrote 0 of {len(data) - done} bytes at offset {offset + done}")
        done += written


def read_all(fd: int, destination: memoryview, offset: int) -> None:
    """Fill a flat view from ``offset``; ENODATA where the file ends before."""
    done = 0
    while done < len(destination):
        got = os.preadv(fd, [destination[done:]], offset + done)
        if got == 0:
            missing = len(destination) - done
            raise OSError(errno.ENODATA, f"the file ends at {offset + done}, {missing} bytes early")
        done += got


def holds(folder: int, leaf: str, data: bytes, *, sync: Count | None = None) -> bool:
    """Tell whether a regular file has exactly these bytes; ``sync``: make them durable too, then."""
    try:
        fd = os.open(leaf, READ_FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return False
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != len(data):
            return False
        content = bytearray(len(data))
        read_all(fd, memoryview(content), 0)
        if content != data:
            return False
        if sync is not None:
            os.fsync(fd)
            sync("fsyncs", 1)
        return True
    finally:
        close_all([fd])


def publish(folder: int, leaf: str, data: bytes, *, name: str, count: Count) -> None:
    """Put ``data`` under a new name in a folder, all or nothing; the caller then makes the folder durable.

    link() and not rename(): it fails where the name is taken instead of replacing it. ``AlreadyExists`` then,
    unless the name holds these very bytes. ``name`` is the name on the store, for failpoints.
    """
    failpoints.hit("create.before_temp", name)
    temp = temp_name()
    try:
        _fill(os.open(temp, CREATE_FLAGS, 0o644, dir_fd=folder), data, count, name)
        failpoints.hit("create.temp_synced", name)
        try:
            os.link(temp, leaf, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            failpoints.hit("create.linked", name)
        except OSError as error:
            _settle_link(error, folder, temp, leaf, data, name=name, count=count)
        count("creates", 1)
    finally:
        unlink_quietly(folder, temp)


def overwrite(folder: int, leaf: str, data: bytes, *, count: Count) -> None:
    """Write or replace a file whose readers accept old or new bytes; its name is not made durable."""
    temp = temp_name()
    try:
        _fill(os.open(temp, CREATE_FLAGS, 0o644, dir_fd=folder), data, count)
        os.rename(temp, leaf, src_dir_fd=folder, dst_dir_fd=folder)
        count("creates", 1)
    except BaseException:
        unlink_quietly(folder, temp)
        raise


def _fill(fd: int, data: bytes, count: Count, name: str | None = None) -> None:
    """Write a new file, make it durable and close it, every error checked; failpoints if it has a name."""
    try:
        write_all(fd, memoryview(data), 0)
        count("bytes_written", len(data))
        if name is not None:
            failpoints.hit("create.temp_written", name)
        os.fsync(fd)
        count("fsyncs", 1)
    except BaseException:
        close_all([fd])
        raise
    os.close(fd)


def _settle_link(error: OSError, folder: int, temp: str, leaf: str, data: bytes, *, name: str, count: Count) -> None:
    """Find out what a failed link() did: NFS may lose the reply, or repeat a call that worked."""
    with contextlib.suppress(OSError):
        # The temporary name is ours alone, so a second link to it can only be the one we asked for.
        if os.stat(temp, dir_fd=folder, follow_symlinks=False).st_nlink == 2:
            return
    if holds(folder, leaf, data, sync=count):
        return
    if error.errno not in _NO_LINK:
        raise error
    # No hard links here. O_EXCL still gives one winner; a torn file fails its own checksum, thus is absent.
    fd = os.open(leaf, CREATE_FLAGS, 0o644, dir_fd=folder)
    try:
        _fill(fd, data, count, name)
    except BaseException:
        unlink_quietly(folder, leaf)
        raise
    failpoints.hit("create.linked", name)


class PosixWriter:
    """Writes one new file of a known size; safe to call from several threads.

    Aligned requests go past the page cache where the file system takes them, all others through it.

    States: open, committing, committed, dead. After any error it is dead: the file is closed and unlinked,
    and every further call but ``abort`` raises.
    """

    def __init__(self, folder: int, leaf: str, *, name: str, path: str, size: int, count: Count) -> None:
        """Create the file in an open folder and reserve its space, so that a full disk is known now."""
        self._leaf, self._name, self._path, self._size, self._count = leaf, name, path, size, count
        self._lock = threading.Lock()
        self._state, self._running, self._written = "open", 0, 0
        self._fd = -1
        self._direct = DirectFile(-1, os.O_WRONLY)
        self._folder = os.dup(folder)
        try:
            self._fd = os.open(leaf, CREATE_FLAGS, 0o644, dir_fd=folder)
            self._count("creates", 1)
            self._identity = _identity(os.fstat(self._fd))
            _reserve(self._fd, size)
            self._direct = DirectFile(self._fd, os.O_WRONLY)
            failpoints.hit("writer.opened", name)
        except BaseException:
            self._state = "dead"
            self._discard()
            raise

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` (contiguous bytes) at ``offset``."""
        with self._call("write"):
            view = flat_bytes(memoryview(data))
            if offset < 0 or offset + len(view) > self._size:
                end = offset + len(view)
                raise OSError(errno.EINVAL, f"[{offset}, {end}) is outside a file of {self._size} bytes")
            failpoints.hit("writer.chunk", self._name)
            direct = self._direct.write(view, offset)
            write_all(self._fd, view[direct:], offset + direct)
            self._count("bytes_written", len(view))
            self._count("direct_bytes", direct)
            with self._lock:
                self._written += len(view)

    def commit(self) -> None:
        """fsync and close, both checked, neither ever repeated. The folder is the caller's to sync."""
        with self._call("commit"):
            with self._lock:
                if self._running > 1:
                    raise OSError(errno.EBUSY, "commit while another thread still writes")
                self._state = "committing"
            if self._written < self._size:
                raise OSError(errno.EINVAL, f"only {self._written} of {self._size} bytes were written")
            self._direct.close()
            failpoints.hit("writer.before_fsync", self._name)
            os.fsync(self._fd)
            self._count("fsyncs", 1)
            fd, self._fd = self._fd, -1
            os.close(fd)
            failpoints.hit("writer.synced", self._name)
            self._state = "committed"
            close_all([self._folder])

    def abort(self) -> None:
        """Close and unlink, best effort; after ``commit`` or a failure there is nothing left to do."""
        with self._lock:
            if self._state == "committed":
                return
            self._state = "dead"
            if self._running:
                return  # the last running call cleans up: its descriptor must not be closed under it
        self._discard()

    @contextlib.contextmanager
    def _call(self, operation: str) -> Iterator[None]:
        with self._lock:
            if self._state != "open":
                reason = f"{operation}: this file is {self._state}, write a new one"
                raise StoreError(errno.EBADF, reason, self._path)
            self._running += 1
        try:
            yield
        except BaseException as error:
            with self._lock:
                self._state = "dead"
            if isinstance(error, OSError):
                raise store_error(error, operation, self._path) from error
            raise
        finally:
            with self._lock:
                self._running -= 1
                last = self._state == "dead" and self._running == 0
            if last:
                self._discard()

    def _discard(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
            folder, self._folder = self._folder, -1
        if folder == -1:
            return
        with contextlib.suppress(OSError):
            self._direct.close()
        close_all([fd] if fd != -1 else [])
        with contextlib.suppress(OSError, AttributeError):
            # Only our own file: the name may belong to somebody else by now, or have done so all along.
            if _identity(os.stat(self._leaf, dir_fd=folder, follow_symlinks=False)) == self._identity:
                os.unlink(self._leaf, dir_fd=folder)
        close_all([folder])


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _reserve(fd: int, size: int) -> None:
    """Give a new file its size, with real blocks where the file system can promise them."""
    if size == 0:
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, size)
