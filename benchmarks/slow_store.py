"""A store behind a slow network, on top of any other: latency, one shared link, stragglers, errors.

What an object store or a busy parallel file system does to a checkpoint, on one machine: the workload ``slow-store`` of
the suite, and tests that count requests and how many were under way at once instead of measuring time.
"""

from __future__ import annotations

import errno
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from distckpt import clock
from distckpt.errors import StoreError
from distckpt.storage.base import Entry, Store, Writer

_Entries = Iterable[Entry]


@dataclass(frozen=True, slots=True)
class Slowness:
    """What each request costs. ``bytes_per_s`` is shared by all; shares are probabilities between 0 and 1."""

    latency_s: tuple[float, float] = (0.005, 0.05)
    bytes_per_s: float = 100e6
    stragglers: float = 0.01
    straggler_factor: float = 10.0
    errors: float = 0.0


class SlowStore:
    """Implements ``storage.base.Store``. Every call of it, or of a writer's, is one request to the service behind.

    ``counters`` are the inner store's; ``requests``, ``most_in_flight``, ``stragglers`` and ``errors`` are in ``seen``.
    """

    def __init__(self, inner: Store, slowness: Slowness = Slowness(), seed: int = 0) -> None:
        self.inner, self.slowness = inner, slowness
        self.url, self.capabilities, self.counters = inner.url, inner.capabilities, inner.counters
        self.seen: Counter[str] = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._in_flight, self._link_free_at = 0, 0.0

    @contextmanager
    def request(self, nbytes: int = 0) -> Iterator[None]:
        """Take the time of one request, then do it; an error comes before, as of a service that refused."""
        with self._lock:
            self.seen["requests"] += 1
            self._in_flight += 1
            self.seen["most_in_flight"] = max(self.seen["most_in_flight"], self._in_flight)
            wait = self._random.uniform(*self.slowness.latency_s)
            if self._random.random() < self.slowness.stragglers:
                self.seen["stragglers"] += 1
                wait *= self.slowness.straggler_factor
            fails = self._random.random() < self.slowness.errors
        try:
            clock.sleep(wait)
            self.transfer(nbytes)
            if fails:
                with self._lock:
                    self.seen["errors"] += 1
                raise StoreError(errno.EIO, "injected by the slow store", self.url)
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def transfer(self, nbytes: int) -> None:
        """Wait for a place on the shared link and until these bytes are through."""
        with self._lock:
            now = clock.monotonic()
            self._link_free_at = max(self._link_free_at, now) + nbytes / self.slowness.bytes_per_s
            wait = self._link_free_at - now if nbytes else 0.0
        clock.sleep(wait)

    def create(self, name: str, data: bytes) -> None:
        """See ``Store.create``."""
        with self.request(len(data)):
            self.inner.create(name, data)

    def open_writer(self, name: str, size: int) -> Writer:
        """See ``Store.open_writer``."""
        with self.request():
            return _SlowWriter(self, self.inner.open_writer(name, size))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """See ``Store.read``."""
        with self.request():
            content = self.inner.read(name, offset, size)
            self.transfer(len(content))
            return content

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """See ``Store.read_into``."""
        with self.request(destination.nbytes):
            self.inner.read_into(name, offset, destination)

    def list(self, prefix: str = "") -> _Entries:
        """See ``Store.list``."""
        with self.request():
            return self.inner.list(prefix)

    def list_folders(self, prefix: str = "") -> Sequence[str]:
        """See ``Store.list_folders``."""
        with self.request():
            return self.inner.list_folders(prefix)

    def size(self, name: str) -> int:
        """See ``Store.size``."""
        with self.request():
            return self.inner.size(name)

    def delete(self, name: str) -> None:
        """See ``Store.delete``."""
        with self.request():
            self.inner.delete(name)

    def make_folder(self, name: str, *, exclusive: bool = False) -> None:
        """See ``Store.make_folder``."""
        with self.request():
            self.inner.make_folder(name, exclusive=exclusive)

    def remove_folder(self, name: str) -> None:
        """See ``Store.remove_folder``."""
        with self.request():
            self.inner.remove_folder(name)

    def sync_folder(self, name: str) -> None:
        """See ``Store.sync_folder``."""
        with self.request():
            self.inner.sync_folder(name)

    def replace(self, name: str, data: bytes) -> None:
        """See ``Store.replace``."""
        with self.request(len(data)):
            self.inner.replace(name, data)


class _SlowWriter:
    def __init__(self, store: SlowStore, inner: Writer) -> None:
        self._store, self._inner = store, inner

    def write_at(self, offset: int, data: memoryview) -> None:
        with self._store.request(data.nbytes):
            self._inner.write_at(offset, data)

    def commit(self) -> None:
        with self._store.request():
            self._inner.commit()

    def abort(self) -> None:
        self._inner.abort()
