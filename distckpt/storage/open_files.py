"""Stored files that are read in many requests: each is opened once, by name, and kept."""

from __future__ import annotations

import threading
from typing import Final

from distckpt.storage.base import PlainReader, Reader, Store, open_reader

MOST: Final = 64
"""Files kept open; further ones are opened for each request."""


class OpenFiles:
    """The files of one piece of work; to be closed with it (``contextlib.closing``). Safe in several threads.

    Opening costs a fifth of a millisecond on a local disk, as much as a tenth of the time of a request of 2 MiB.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[Store, str], Reader] = {}
        self._lock = threading.Lock()

    def get(self, store: Store, name: str) -> Reader:
        """Return the reader of a stored file. Raises ``StoreError``."""
        with self._lock:
            found = self._open.get((store, name))
            if found is None:
                if len(self._open) >= MOST:
                    return PlainReader(store, name)
                found = self._open[store, name] = open_reader(store, name)
            return found

    def read_into(self, store: Store, name: str, offset: int, destination: memoryview) -> None:
        """Fill ``destination`` from ``offset``, as ``Store.read_into`` does."""
        self.get(store, name).read_into(offset, destination)

    def over(self, store: Store) -> KeptOpen:
        """Return a reader of one store by names."""
        return KeptOpen(self, store)

    def close(self) -> None:
        """Close them; nothing is read after that."""
        for reader in self._open.values():
            reader.close()


class KeptOpen:
    """One store, whose files are opened once each."""

    def __init__(self, files: OpenFiles, store: Store) -> None:
        self._files, self._store = files, store

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """See ``Store.read_into``."""
        self._files.read_into(self._store, name, offset, destination)
