"""A store in a folder of a POSIX file system: local disks, NFS, Lustre, GPFS, CephFS.

Each operation opens the root and walks down by descriptor with O_NOFOLLOW, so a link inside the root is never
followed and no name leads out of it. The root itself may be a link. Nothing is ever replaced, except by
``replace``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from distckpt import failpoints
from distckpt.errors import AlreadyExists, NotFound, StoreError
from distckpt.storage import posix_files, posix_folders
from distckpt.storage.base import Capabilities, Entry, Reader, Writer
from distckpt.storage.paths import check_range, mapped, split_folder, split_name
from distckpt.storage.posix_reader import PosixReader

TEMP_GRACE_S = 24 * 3600.0
"""A temporary file in an otherwise empty folder is litter of a killed process when it is older than this."""

# Not ESTALE: a server that lost a handle says nothing about what exists.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
_ESTALE_TRIES = 3
_T = TypeVar("_T")
# Named here because the class has a method called ``list``.
_Entries = list[Entry]
_Contents = tuple[list[tuple[str, os.stat_result]], list[str]]


class PosixStore:
    """Implements ``storage.base.Store`` in the folder ``root``, which is made by the first write.

    ``root`` (absolute path) and ``url`` (``file://…``) name it. Every method raises ``StoreError`` or one of
    its kinds, with errno, the operation and the full path.
    """

    capabilities = Capabilities(random_write=True, folders=True, shared=True)

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = str(Path(root).absolute())
        self.url = Path(self.root).as_uri()
        self.counters: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._root_is_durable = False

    def __repr__(self) -> str:
        return f"PosixStore({self.root!r})"

    def path_of(self, name: str) -> str:
        """Return the full path of a name, for messages."""
        return os.path.join(self.root, name) if name else self.root

    # -- writing

    def create(self, name: str, data: bytes) -> None:
        """See ``Store.create``. Durable with every folder on the way up to the root when it returns."""
        *above, leaf = split_name(name)
        with mapped("create", self.path_of(name)), self._folders(above, make=True) as folders:
            posix_files.publish(folders[-1], leaf, data, name=name, count=self._count)
            # All of them, not only those made here: whoever made one may have died before its fsync.
            for folder in reversed(folders):
                posix_folders.sync_folder_fd(folder, self._count)
            failpoints.hit("create.synced", name)

    def open_writer(self, name: str, size: int) -> Writer:
        """See ``Store.open_writer``. Makes missing folders. ``sync_folder`` makes the name durable."""
        *above, leaf = split_name(name)
        path = self.path_of(name)
        if size < 0:
            raise StoreError(errno.EINVAL, f"open for writing: a file cannot have {size} bytes", path)
        with mapped("open for writing", path), self._folders(above, make=True) as folders:
            return posix_files.PosixWriter(folders[-1], leaf, name=name, path=path, size=size, count=self._count)

    def replace(self, name: str, data: bytes) -> None:
        """See ``Store.replace``. The bytes are synced before the rename, the folder is not: it is a hint."""
        *above, leaf = split_name(name)
        with mapped("replace", self.path_of(name)), self._folders(above, make=True) as folders:
            posix_files.overwrite(folders[-1], leaf, data, count=self._count)

    # -- reading

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """See ``Store.read``. Also ``NotFound`` for what is not a regular file, or lies below a link."""

        def body(fd: int, available: int) -> bytes:
            # The size is checked before anything is allocated.
            content = bytearray(check_range(self.path_of(name), offset, size, available))
            posix_files.read_all(fd, memoryview(content), offset)
            self._count("bytes_read", len(content))
            return bytes(content)

        return self._reading(name, body)

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """See ``Store.read_into``; ``destination`` must be writable and contiguous."""

        def body(fd: int, available: int) -> None:
            with contextlib.closing(PosixReader(fd, available, path=path, count=self._count)) as reader:
                reader.read_into(offset, destination)

        path = self.path_of(name)
        self._reading(name, body)

    def open_reader(self, name: str) -> Reader:
        """See ``OpensReaders.open_reader``."""

        def again(offset: int, destination: memoryview) -> None:
            self.read_into(name, offset, destination)

        path = self.path_of(name)
        return self._reading(
            name, lambda fd, available: PosixReader(fd, available, path=path, count=self._count, again=again)
        )

    def size(self, name: str) -> int:
        """See ``Store.size``."""
        return self._reading(name, lambda fd, available: available)

    def list(self, prefix: str = "") -> Iterable[Entry]:
        """See ``Store.list``. Regular files only: no links, no temporary files; absent folders are empty."""
        top = split_folder(prefix)
        self._count("lists", 1)
        found: _Entries = []
        pending = [top]
        while pending:
            here = pending.pop()
            files, below = self._read_folder(here)
            pending += [(*here, folder) for folder in reversed(below)]
            found += [Entry("/".join((*here, name)), at.st_size, at.st_mtime) for name, at in files]
        return found

    def list_folders(self, prefix: str = "") -> Sequence[str]:
        """See ``Store.list_folders``: the last components only, sorted; an absent folder has none."""
        self._count("lists", 1)
        return self._read_folder(split_folder(prefix))[1]

    # -- removing

    def delete(self, name: str) -> None:
        """See ``Store.delete``. Removes a link itself; refuses folders, FIFOs, sockets and devices."""
        *above, leaf = split_name(name)
        with mapped("delete", self.path_of(name)):
            try:
                with self._folders(above) as folders:
                    mode = os.stat(leaf, dir_fd=folders[-1], follow_symlinks=False).st_mode
                    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EPERM
                        raise OSError(code, "not a regular file")
                    failpoints.hit("delete.before", name)
                    os.unlink(leaf, dir_fd=folders[-1])
                    self._count("deletes", 1)
            except OSError as error:
                if error.errno not in _GONE:
                    raise

    def remove_folder(self, name: str) -> None:
        """See ``Store.remove_folder``. Temporary files older than ``TEMP_GRACE_S`` are no content."""
        *above, leaf = split_folder(name) or ("",)
        if not leaf:
            return  # the root itself always stays
        with mapped("remove folder", self.path_of(name)):
            try:
                with self._folders(above) as folders:
                    self._remove_below(folders[-1], leaf)
            except OSError as error:
                if error.errno not in _GONE:
                    raise

    def sweep_temporaries(self, folder: str, older_than_s: float) -> int:
        """Remove what killed processes left half made in one folder; returns how many files.

        They are invisible to ``list``, so it takes this call. Age in seconds, by the file system's clock.
        """
        with mapped("sweep", self.path_of(folder)), self._folders(split_folder(folder)) as folders:
            return posix_folders.sweep_temporaries(folders[-1], older_than_s)

    # -- folders

    def make_folder(self, name: str, *, exclusive: bool = False) -> None:
        """See ``Store.make_folder``. Every folder on the way up to the root is fsynced."""
        *above, leaf = split_folder(name) or ("",)
        with mapped("make folder", self.path_of(name)), self._folders(above, make=True) as folders:
            if leaf:
                try:
                    os.mkdir(leaf, dir_fd=folders[-1])
                except FileExistsError:
                    mode = os.stat(leaf, dir_fd=folders[-1], follow_symlinks=False).st_mode
                    if exclusive or not stat.S_ISDIR(mode):
                        raise
            elif exclusive:
                raise AlreadyExists(errno.EEXIST, "make folder: the root is there", self.root)
            for folder in reversed(folders):
                posix_folders.sync_folder_fd(folder, self._count)

    def sync_folder(self, name: str) -> None:
        """See ``Store.sync_folder``; ``NotFound`` if there is no such folder."""
        with mapped("sync folder", self.path_of(name), reading=True):  # noqa: SIM117
            with self._folders(split_folder(name)) as folders:
                posix_folders.sync_folder_fd(folders[-1], self._count)

    # -- inside

    def _count(self, what: str, amount: int) -> None:
        with self._lock:
            self.counters[what] += amount

    @contextlib.contextmanager
    def _folders(self, parts: Sequence[str], *, make: bool = False) -> Iterator[Sequence[int]]:
        """Open the root and the folders below it; descriptors are valid inside the block."""
        if make and not self._root_is_durable:
            posix_folders.make_root(self.root, self._count)
        folders = posix_folders.open_folders(self.root, parts, make=make, count=self._count)
        if make:
            self._root_is_durable = True
        try:
            yield folders
        finally:
            posix_folders.close_all(folders)

    def _reading(self, name: str, body: Callable[[int, int], _T]) -> _T:
        """Open a regular file and call ``body(descriptor, size)``, again if NFS lost the handle."""
        *above, leaf = split_name(name)
        path = self.path_of(name)
        with mapped("read", path, reading=True):
            for tries_left in reversed(range(_ESTALE_TRIES)):
                try:
                    with self._folders(above) as folders:
                        fd = os.open(leaf, posix_files.READ_FLAGS, dir_fd=folders[-1])
                    try:
                        found = os.fstat(fd)
                        if not stat.S_ISREG(found.st_mode):
                            raise NotFound(errno.EINVAL, "read: not a regular file", path)
                        self._count("opens", 1)
                        return body(fd, found.st_size)
                    finally:
                        posix_folders.close_all([fd])
                except OSError as error:
                    if error.errno != errno.ESTALE or not tries_left:
                        raise
        raise AssertionError("unreachable")

    def _read_folder(self, parts: tuple[str, ...]) -> _Contents:
        with mapped("list", self.path_of("/".join(parts))):
            try:
                with self._folders(parts) as folders:
                    return posix_folders.read_folder(folders[-1])
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                return [], []

    def _remove_below(self, parent: int, leaf: str) -> None:
        try:
            os.rmdir(leaf, dir_fd=parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if posix_folders.sweep_if_only_temporaries(parent, leaf, TEMP_GRACE_S):
                with contextlib.suppress(OSError):
                    os.rmdir(leaf, dir_fd=parent)
