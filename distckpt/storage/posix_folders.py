"""Folders of a POSIX root: walked by descriptor, component by component, so that no link is followed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Sequence

from distckpt.storage.paths import TEMP_PREFIX

CREATE_FLAGS = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_ROOT_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FOLDER_FLAGS = _ROOT_FLAGS | os.O_NOFOLLOW
# Some FUSE file systems cannot fsync a folder and say so with one of these; there is nothing to be done about
# it, and ``posix_facts`` reports it.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})

Count = Callable[[str, int], None]
"""Adds to a store's counter of that name."""


def sync_folder_fd(folder: int, count: Count) -> None:
    """fsync a folder, so that the names in it outlive a power cut."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    count("folder_syncs", 1)


def sync_folder_path(path: str, count: Count) -> None:
    """fsync the folder at a path outside the root (links are followed here: it is the user's own path)."""
    folder = os.open(path, _ROOT_FLAGS)
    try:
        sync_folder_fd(folder, count)
    finally:
        os.close(folder)


def make_root(root: str, count: Count) -> None:
    """Make the root and its missing parents, each durable in its own parent; an existing one stays."""
    missing = []
    path = root
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        sync_folder_path(os.path.dirname(path), count)
    if not missing:
        # Another process may have made it and died before its fsync. Where the parent cannot be opened this
        # user cannot have made the root either.
        with contextlib.suppress(PermissionError):
            sync_folder_path(os.path.dirname(os.path.realpath(root)), count)


def open_folders(root: str, parts: Sequence[str], *, make: bool, count: Count) -> list[int]:
    """Return open descriptors of the root and of each folder on the way down; the caller closes all of them.

    ``make``: make missing folders, each durable in its parent before anything is put into it.
    """
    folders = [os.open(root, _ROOT_FLAGS)]
    try:
        for part in parts:
            folders.append(_open_below(folders[-1], part, make=make, count=count))
    except BaseException:
        close_all(folders)
        raise
    return folders


def _open_below(parent: int, part: str, *, make: bool, count: Count) -> int:
    try:
        return os.open(part, _FOLDER_FLAGS, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(part, dir_fd=parent)
    sync_folder_fd(parent, count)
    return os.open(part, _FOLDER_FLAGS, dir_fd=parent)


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors whose errors mean nothing (folders, files that were only read)."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def unlink_quietly(folder: int, leaf: str) -> None:
    """Unlink a leftover of our own, if that is possible."""
    with contextlib.suppress(OSError):
        os.unlink(leaf, dir_fd=folder)


def temp_name() -> str:
    """Return a name that no other process uses, and that listings skip."""
    return f"{TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"


def read_folder(folder: int) -> tuple[list[tuple[str, os.stat_result]], list[str]]:
    """Return the regular files (name, stat) and the names of the folders in a folder, each sorted by name.

    Links, devices and our own temporary files are not part of a store. What vanishes meanwhile is left out.
    """
    files: list[tuple[str, os.stat_result]] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TEMP_PREFIX):
                continue
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    files.append((entry.name, entry.stat(follow_symlinks=False)))
    return sorted(files, key=lambda item: item[0]), sorted(folders)


def sweep_temporaries(folder: int, older_than_s: float) -> int:
    """Unlink temporary files that a killed process left in a folder; returns how many.

    Their age is taken by the file system's clock (a file made now), never by this host's.
    """
    names = [name for name in os.listdir(folder) if name.startswith(TEMP_PREFIX)]
    if not names:
        return 0
    probe = temp_name()
    descriptor = os.open(probe, CREATE_FLAGS, 0o644, dir_fd=folder)
    try:
        present = os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        unlink_quietly(folder, probe)
    removed = 0
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and present - found.st_mtime >= older_than_s:
                os.unlink(name, dir_fd=folder)
                removed += 1
    return removed


def sweep_if_only_temporaries(parent: int, leaf: str, older_than_s: float) -> bool:
    """Sweep the folder ``leaf`` if it holds nothing but temporary files; tells whether any was removed."""
    folder = os.open(leaf, _FOLDER_FLAGS, dir_fd=parent)
    try:
        if all(name.startswith(TEMP_PREFIX) for name in os.listdir(folder)):
            return sweep_temporaries(folder, older_than_s) > 0
    finally:
        os.close(folder)
    return False
