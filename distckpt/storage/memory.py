"""A store in this process's memory: the executable specification, and storage for threads that play ranks."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from distckpt import clock, failpoints
from distckpt.errors import AlreadyExists, NotFound, StoreError
from distckpt.storage.base import Capabilities, Entry, Writer
from distckpt.storage.paths import check_range, flat_bytes, split_folder, split_name

_shared: dict[str, MemoryStore] = {}
_shared_lock = threading.Lock()
_Entries = list[Entry]


def shared_store(name: str) -> MemoryStore:
    """Return the store of that name, the same object for every caller in this process."""
    with _shared_lock:
        return _shared.setdefault(name, MemoryStore(name))


def forget(name: str) -> None:
    """Drop a shared store; who still holds it may go on using it."""
    with _shared_lock:
        _shared.pop(name, None)


class MemoryStore:
    """Implements ``storage.base.Store`` with a dict. Folders stay until removed, as they do on POSIX.

    A file being written is invisible until ``commit``, but its name is taken from ``open_writer`` on.
    """

    capabilities = Capabilities(random_write=True, folders=False, shared=False)

    def __init__(self, name: str = "private") -> None:
        self.url = f"memory://{name}"
        self.counters: Counter[str] = Counter()
        self._files: dict[str, tuple[bytes, float]] = {}
        self._pending: dict[str, MemoryWriter] = {}
        self._folders: set[str] = set()
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"MemoryStore({self.url!r})"

    # -- writing

    def create(self, name: str, data: bytes) -> None:
        """See ``Store.create``."""
        parts = split_name(name)
        failpoints.hit("create.before_temp", name)
        with self._lock:
            self._make_above(parts, "create")
            if name not in self._files or self._files[name][0] != bytes(data):
                self._refuse_taken(name, "create")
                self._store(name, bytes(data))
        failpoints.hit("create.linked", name)
        failpoints.hit("create.synced", name)

    def open_writer(self, name: str, size: int) -> Writer:
        """See ``Store.open_writer``."""
        parts = split_name(name)
        if size < 0:
            raise self._error(StoreError, errno.EINVAL, f"open for writing: {size} bytes", name)
        writer = MemoryWriter(self, name, size)
        with self._lock:
            self._make_above(parts, "open for writing")
            self._refuse_taken(name, "open for writing")
            self._pending[name] = writer
        failpoints.hit("writer.opened", name)
        return writer

    def replace(self, name: str, data: bytes) -> None:
        """See ``Store.replace``."""
        parts = split_name(name)
        with self._lock:
            self._make_above(parts, "replace")
            if name in self._folders:
                raise self._error(StoreError, errno.EISDIR, "replace: it is a folder", name)
            self._store(name, bytes(data))

    # -- reading

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """See ``Store.read``."""
        content = self._content(name)
        wanted = check_range(name, offset, size, len(content))
        self._count("opens", 1)
        self._count("bytes_read", wanted)
        return content[offset : offset + wanted]

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """See ``Store.read_into``."""
        view = flat_bytes(memoryview(destination), writable=True)
        view[:] = self.read(name, offset, len(view))

    def size(self, name: str) -> int:
        """See ``Store.size``."""
        return len(self._content(name))

    def list(self, prefix: str = "") -> Iterable[Entry]:
        """See ``Store.list``."""
        top = "".join(f"{part}/" for part in split_folder(prefix))
        self._count("lists", 1)
        with self._lock:
            files = sorted(self._files.items())
        found: _Entries = [Entry(name, len(data), at) for name, (data, at) in files if name.startswith(top)]
        return found

    def list_folders(self, prefix: str = "") -> Sequence[str]:
        """See ``Store.list_folders``: the last components only, sorted."""
        top = "".join(f"{part}/" for part in split_folder(prefix))
        self._count("lists", 1)
        with self._lock:
            below = [name[len(top) :] for name in self._folders if name.startswith(top)]
        return sorted(name for name in below if "/" not in name)

    # -- removing

    def delete(self, name: str) -> None:
        """See ``Store.delete``."""
        split_name(name)
        failpoints.hit("delete.before", name)
        with self._lock:
            if name in self._folders:
                raise self._error(StoreError, errno.EISDIR, "delete: it is a folder", name)
            self._pending.pop(name, None)
            if self._files.pop(name, None) is not None:
                self._count("deletes", 1)

    def remove_folder(self, name: str) -> None:
        """See ``Store.remove_folder``."""
        folder = "/".join(split_folder(name))
        with self._lock:
            inside = f"{folder}/"
            if not any(n.startswith(inside) for n in (*self._files, *self._pending, *self._folders)):
                self._folders.discard(folder)

    # -- folders

    def make_folder(self, name: str, *, exclusive: bool = False) -> None:
        """See ``Store.make_folder``."""
        parts = split_folder(name)
        folder = "/".join(parts)
        with self._lock:
            self._make_above(parts, "make folder")
            is_folder = not folder or folder in self._folders
            if folder in self._files or folder in self._pending or (exclusive and is_folder):
                raise self._error(AlreadyExists, errno.EEXIST, "make folder: the name is taken", name)
            if folder:
                self._folders.add(folder)

    def sync_folder(self, name: str) -> None:
        """See ``Store.sync_folder``: only checks that the folder is there."""
        folder = "/".join(split_folder(name))
        self._count("folder_syncs", 1)
        with self._lock:
            if folder and folder not in self._folders:
                raise self._error(NotFound, errno.ENOENT, "sync folder: no such folder", name)

    # -- inside

    def finish(self, writer: MemoryWriter, name: str, data: bytes | None) -> None:
        """Publish (or, without data, give up) what a writer holds; used by ``MemoryWriter`` only."""
        with self._lock:
            owner = self._pending.get(name) is writer
            if owner:
                del self._pending[name]
            if owner and data is not None:
                self._store(name, data)
                self._count("fsyncs", 1)

    def _store(self, name: str, data: bytes) -> None:
        self._files[name] = (data, clock.now())
        self._count("creates", 1)
        self._count("bytes_written", len(data))

    def _content(self, name: str) -> bytes:
        split_name(name)
        with self._lock:
            if name not in self._files:
                raise self._error(NotFound, errno.ENOENT, "read: no such file", name)
            return self._files[name][0]

    def _make_above(self, parts: Sequence[str], operation: str) -> None:
        for end in range(1, len(parts)):
            folder = "/".join(parts[:end])
            if folder in self._files or folder in self._pending:
                name = "/".join(parts)
                raise self._error(StoreError, errno.ENOTDIR, f"{operation}: {folder!r} is a file", name)
            self._folders.add(folder)

    def _refuse_taken(self, name: str, operation: str) -> None:
        if name in self._files or name in self._pending or name in self._folders:
            raise self._error(AlreadyExists, errno.EEXIST, f"{operation}: the name is taken", name)

    def _count(self, what: str, amount: int) -> None:
        with self._lock:
            self.counters[what] += amount

    def _error(self, kind: type[StoreError], code: int, message: str, name: str) -> StoreError:
        return kind(code, message, f"{self.url}/{name}")


class MemoryWriter:
    """Collects one file and publishes it at ``commit``; dead after any error, like the writer for files."""

    def __init__(self, store: MemoryStore, name: str, size: int) -> None:
        self._store, self._name = store, name
        self._content = bytearray(size)
        self._written = 0
        self._state = "open"
        self._lock = threading.Lock()

    def write_at(self, offset: int, data: memoryview) -> None:
        """See ``Writer.write_at``."""
        with self._lock:
            self._check_open("write")
            self._state = "dead"  # until this call has worked
            view = flat_bytes(memoryview(data))
            if offset < 0 or offset + len(view) > len(self._content):
                self._fail("write", f"{len(view)} bytes at {offset} are outside {len(self._content)} bytes")
            failpoints.hit("writer.chunk", self._name)
            self._content[offset : offset + len(view)] = view
            self._written += len(view)
            self._state = "open"

    def commit(self) -> None:
        """See ``Writer.commit``."""
        with self._lock:
            self._check_open("commit")
            self._state = "dead"
            if self._written < len(self._content):
                self._fail("commit", f"only {self._written} of {len(self._content)} bytes were written")
            failpoints.hit("writer.before_fsync", self._name)
            self._store.finish(self, self._name, bytes(self._content))
            self._state = "committed"
            failpoints.hit("writer.synced", self._name)

    def abort(self) -> None:
        """See ``Writer.abort``."""
        with self._lock:
            if self._state != "committed":
                self._state = "dead"
                self._store.finish(self, self._name, None)

    def _check_open(self, operation: str) -> None:
        if self._state != "open":
            self._fail(operation, f"this file is {self._state}, write a new one", errno.EBADF)

    def _fail(self, operation: str, reason: str, code: int = errno.EINVAL) -> None:
        raise StoreError(code, f"{operation}: {reason}", f"{self._store.url}/{self._name}")
