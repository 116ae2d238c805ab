"""The Store protocol: what every storage back end must do with bytes and names, and nothing more.

Names are relative POSIX paths (``step-0000000100/manifest-g000001.json``). There is no rename and no append,
because object stores have neither. ``storage/memory.py`` is the executable specification, and
``tests/contract`` is the class of tests that every store runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a store can do beyond the protocol; planners read it instead of asking which store it is."""

    random_write: bool
    """``Writer.write_at`` takes offsets in any order (files); else only rising ones (multipart uploads)."""
    folders: bool
    """Folders exist apart from the names in them, and must be made durable by ``sync_folder``."""
    shared: bool
    """Other processes on other hosts may see the same names."""
    exclusive_create: bool = True
    """``create`` lets exactly one of several racing writers win."""
    latency: bool = False
    """A request costs tens of milliseconds whatever it fetches: readers ask for more at once, and more at a time."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored name. ``modified`` is seconds since the epoch by the store's clock; sizes are bytes."""

    name: str
    size: int
    modified: float


@runtime_checkable
class Writer(Protocol):
    """One new file being written. Every method raises ``StoreError`` (an ``OSError``) on failure."""

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` (contiguous bytes) at ``offset``; may be called from several threads."""

    def commit(self) -> None:
        """Make the bytes durable and close. After any error the file is dead: fsync is never retried."""

    def abort(self) -> None:
        """Close without promising anything; the leftover is removed where that is possible."""


@runtime_checkable
class Store(Protocol):
    """Bytes under names. Implementations are safe to call from several threads."""

    url: str
    capabilities: Capabilities
    counters: Counter[str]
    """What this object did so far, so that tests gate on counts and not on times: ``opens`` (files opened to
    read), ``creates`` (new files), ``bytes_written``, ``bytes_read``, ``fsyncs`` (of files),
    ``folder_syncs``, ``deletes`` and ``lists``."""

    def create(self, name: str, data: bytes) -> None:
        """Store ``data`` under a new name, durably and all or nothing.

        Raises ``AlreadyExists`` if the name holds other bytes. If it holds exactly these bytes the call
        succeeds: it is our own write whose reply was lost. Makes missing folders. The commit primitive.
        """

    def open_writer(self, name: str, size: int) -> Writer:
        """Begin a new file of exactly ``size`` bytes; ``AlreadyExists`` if the name is taken."""

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return the bytes from ``offset`` (all of the rest without ``size``); ``NotFound`` if absent.

        A range that reaches past the end raises ``StoreError``: a short read is never returned.
        """

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """Fill ``destination`` with the bytes from ``offset``; short files raise ``StoreError``."""

    def list(self, prefix: str = "") -> Iterable[Entry]:
        """Yield every file below the folder ``prefix`` (with or without slash), recursively, by full name."""

    def list_folders(self, prefix: str = "") -> Sequence[str]:
        """Return the folders directly below ``prefix``: their last components only, no slash, sorted."""

    def size(self, name: str) -> int:
        """Return the size in bytes of a regular file; ``NotFound`` if absent or not a regular file."""

    def delete(self, name: str) -> None:
        """Remove one file; an absent name is success. Never follows links, refuses folders."""

    def make_folder(self, name: str, *, exclusive: bool = False) -> None:
        """Make a folder and its parents, durably. ``exclusive``: ``AlreadyExists`` if it is there."""

    def remove_folder(self, name: str) -> None:
        """Remove an empty folder; one that has content or is absent is left alone without an error."""

    def sync_folder(self, name: str) -> None:
        """Make the names in a folder durable, as this client created them."""

    def replace(self, name: str, data: bytes) -> None:
        """Write or overwrite a small file that is only a hint (heartbeat); readers see old or new bytes."""


class Reader(Protocol):
    """One stored file opened for many reads; safe to call from several threads."""

    def read_into(self, offset: int, destination: memoryview) -> None:
        """See ``Store.read_into``."""

    def read_cached(self, offset: int, nbytes: int, destinations: Callable[[], Sequence[memoryview]]) -> bool:
        """Fill views of ``nbytes`` together, one after the other, from ``offset`` on, if memory has the bytes; else False.

        They are asked for only where it seems to. After False they may hold anything.
        """

    def fetch_ahead(self, offset: int, nbytes: int) -> bool:
        """Begin to bring bytes into memory for later reads, and do not wait; False where it has them or cannot."""

    def close(self) -> None:
        """Give back what it holds; nothing is read after that."""


@runtime_checkable
class OpensReaders(Protocol):
    """A store where opening a file once pays."""

    def open_reader(self, name: str) -> Reader:
        """Open a stored file. Raises as ``Store.read_into`` does."""


def open_reader(store: Store, name: str) -> Reader:
    """Open a stored file for many reads, on any store."""
    return store.open_reader(name) if isinstance(store, OpensReaders) else PlainReader(store, name)


class PlainReader:
    """A reader that holds nothing open: every read names the file again."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name

    def read_into(self, offset: int, destination: memoryview) -> None:
        """See ``Reader.read_into``."""
        self._store.read_into(self._name, offset, destination)

    def read_cached(self, offset: int, nbytes: int, destinations: Callable[[], Sequence[memoryview]]) -> bool:
        """See ``Reader.read_cached``: never."""
        return False

    def fetch_ahead(self, offset: int, nbytes: int) -> bool:
        """See ``Reader.fetch_ahead``: it cannot."""
        return False

    def close(self) -> None:
        """See ``Reader.close``."""
