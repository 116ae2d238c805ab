"""What a folder's file system or a bucket can do, found out by trying: for ``doctor`` and for the curious."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
from collections.abc import Callable

from distckpt.errors import StoreError
from distckpt.storage.objects import ObjectStore
from distckpt.storage.paths import mapped
from distckpt.storage.posix_folders import CREATE_FLAGS, temp_name, unlink_quietly

_SECTOR = 4096
_VOLATILE = frozenset({"tmpfs", "ramfs", "overlay"})


def posix_facts(root: str | os.PathLike[str]) -> dict[str, object]:
    """Return facts about the file system of ``root`` or, where that does not exist, of its nearest parent.

    Keys: ``path`` (what was looked at), ``fs_type``, ``mount_point`` (None if unknown), ``free_bytes``,
    ``total_bytes`` (for this user), ``writable``, ``hard_links``, ``direct_io``, ``folder_sync`` (bool, or
    None where it is not writable), ``volatile`` (the type is known to lose everything in a power cut, or to
    promise nothing). Tries are made with temporary files that are removed again. Raises ``StoreError``.
    """
    path = os.path.realpath(root)
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    with mapped("look at the file system", path):
        space = os.statvfs(path)
        fs_type, mount_point = _mount_of(path)
        facts: dict[str, object] = {
            "path": path,
            "fs_type": fs_type,
            "mount_point": mount_point,
            "free_bytes": space.f_bavail * space.f_frsize,
            "total_bytes": space.f_blocks * space.f_frsize,
            "volatile": fs_type is not None and (fs_type in _VOLATILE or fs_type.startswith("fuse")),
        }
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            facts |= _try_files(folder)
        finally:
            os.close(folder)
    return facts


def object_facts(store: ObjectStore) -> dict[str, object]:
    """Return facts about a bucket, found out by writing a probe under the store's prefix, which is removed again.

    Keys: ``path`` (the URL), ``service``, ``writable``, ``conditional_put`` (whether if-none-match is honoured; None if
    that could not be found out), ``problem`` (why something does not work, else None).
    """
    facts: dict[str, object] = {"path": store.url, "service": store.bucket.service, "problem": None}
    try:
        store.check_conditional()
    except StoreError as error:
        ignored = error.errno == errno.EOPNOTSUPP
        return facts | {"writable": ignored, "conditional_put": False if ignored else None, "problem": str(error)}
    return facts | {"writable": True, "conditional_put": True}


def _try_files(folder: int) -> dict[str, object]:
    unknown: dict[str, object] = dict.fromkeys(("hard_links", "direct_io", "folder_sync"))
    unknown["writable"] = False
    first, second = temp_name(), temp_name()
    try:
        os.close(os.open(first, CREATE_FLAGS, 0o644, dir_fd=folder))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            return unknown
        raise
    try:
        return {
            "writable": True,
            "hard_links": _works(lambda: os.link(first, second, src_dir_fd=folder, dst_dir_fd=folder)),
            "direct_io": _works(lambda: _write_direct(folder, first)),
            "folder_sync": _works(lambda: os.fsync(folder)),
        }
    finally:
        unlink_quietly(folder, second)
        unlink_quietly(folder, first)


def _works(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _write_direct(folder: int, leaf: str) -> None:
    fd = os.open(leaf, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
    try:
        with mmap.mmap(-1, _SECTOR) as aligned:
            os.pwrite(fd, aligned, 0)
    finally:
        os.close(fd)


def _mount_of(path: str) -> tuple[str | None, str | None]:
    """Return type and mount point of the file system that holds a real path, from /proc/self/mountinfo."""
    best: tuple[str | None, str | None] = (None, None)
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as table:
        for line in map(os.fsdecode, table):
            before, _, after = line.partition(" - ")
            point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            # Of equal points the later one is mounted on top.
            if inside and len(point) >= len(best[1] or ""):
                best = (after.split()[0], point)
    return best
