"""Requests to one bucket by key, through obstore: ranged reads, listing, uploads, and the conditional put.

Every error comes out as a ``StoreError`` that names the URL.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from distckpt import clock
from distckpt.clock import Deadline
from distckpt.config import ObjectStoreConfig
from distckpt.errors import AlreadyExists, ConfigError, NotFound, StoreError
from distckpt.storage.objects_client import (
    SERVICES,
    Clients,
    check_process,
    is_hopeless,
    is_past_the_end,
    object_error,
    open_clients,
    refuses_conditions,
)
from distckpt.storage.paths import check_range

if TYPE_CHECKING:
    from obstore import WritableFile

log = logging.getLogger("distckpt")

_PAGE = 1000
_T = TypeVar("_T")

_honouring: set[str] = set()
"""Buckets that were seen to honour if-none-match; asked once per process."""


class Bucket:
    """Thread-safe. Nothing is sent before the first call; then a request ends within ``settings.deadline_s``."""

    def __init__(self, scheme: str, name: str, settings: ObjectStoreConfig) -> None:
        self.url = f"{scheme}://{name}"
        self.service = SERVICES[scheme][0]
        self.settings = settings
        self._scheme, self._name = scheme, name
        self._lock, self._probing = threading.Lock(), threading.Lock()
        self._opened: Clients | None = None

    def where(self, key: str) -> str:
        """Return the URL of a key, for messages."""
        return f"{self.url}/{key}" if key else self.url

    def tuned(self, settings: ObjectStoreConfig) -> Bucket:
        """Return the same bucket with other parts, over the same connections (and so with the same deadline)."""
        made = Bucket(self._scheme, self._name, settings)
        made._opened = self._clients()
        return made

    def error(self, error: BaseException, operation: str, key: str) -> StoreError:
        """Return the ``StoreError`` for what obstore raised."""
        return object_error(error, operation, self.where(key), self._scheme)

    # -- reading

    def head(self, key: str) -> Any:
        """Return obstore's facts about an object (``size``, ``last_modified``, ...), None where there is none."""

        def ask() -> Any:
            import obstore

            return obstore.head(self._clients().steady, key)

        try:
            return self._asked("look at", key, ask)
        except NotFound:
            return None

    def size(self, key: str) -> int:
        """Return the size of an object in bytes; ``NotFound``."""
        found = self.head(key)
        if found is None:
            raise NotFound(errno.ENOENT, "look at: no such object", self.where(key))
        return int(found["size"])

    def get(self, key: str, offset: int, size: int | None) -> memoryview:
        """Return ``size`` bytes (None: all) from ``offset``; a range that reaches past the end is a ``StoreError``."""
        if offset < 0 or (size is not None and size <= 0):  # ranges that no service takes
            check_range(self.where(key), offset, size, self.size(key))
            return memoryview(b"")
        options: dict[str, Any] = {}
        if size is not None:
            options["range"] = (offset, offset + size)
        elif offset:
            options["range"] = {"offset": offset}

        def ask() -> memoryview:
            import obstore

            found = obstore.get(self._clients().steady, key, options=options or None)  # type: ignore[arg-type]
            check_range(self.where(key), offset, size, found.meta["size"])
            return memoryview(found.bytes())

        try:
            return self._asked("read", key, ask)
        except StoreError as error:
            if error.__cause__ is None or not is_past_the_end(error.__cause__):
                raise
            check_range(self.where(key), offset, size, self.size(key))
            return memoryview(b"")  # all of the rest, from the very end

    def fill(self, key: str, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; a large one by ranged reads of one part each, ``in_flight`` at a time."""
        step = self.settings.part_bytes

        def fetch(start: int) -> None:
            part = view[start : start + step]
            part[:] = self.get(key, offset + start, len(part))

        if len(view) <= step:
            fetch(0)
            return
        # Not obstore.get_ranges: it joins ranges that touch into one request.
        pool = ThreadPoolExecutor(self.settings.in_flight, thread_name_prefix="distckpt-ranges")
        try:
            for done in [pool.submit(fetch, start) for start in range(0, len(view), step)]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def walk(self, folder: str, *, at_most: int | None = None, flat: bool = False) -> list[Any]:
        """Return obstore's facts about all objects below a folder, sorted by key.

        ``flat``: only those directly in it. ``at_most``: stop after the page that has this many.
        """

        def ask() -> list[Any]:
            import obstore

            client = self._clients().steady
            found: list[Any] = []
            if flat:
                return list(obstore.list_with_delimiter(client, folder or None)["objects"])
            for page in obstore.list(client, folder or None, chunk_size=_PAGE):
                found += page
                if at_most is not None and len(found) >= at_most:
                    break
            return found

        return sorted(self._asked("list", folder, ask), key=lambda meta: str(meta["path"]))[:at_most]

    def folders(self, folder: str) -> list[str]:
        """Return the last components of what is directly below a folder and has keys of its own, sorted."""

        def ask() -> list[str]:
            import obstore

            found = obstore.list_with_delimiter(self._clients().steady, folder or None)
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

        return self._asked("list", folder, ask)

    # -- writing

    def put(self, key: str, data: bytes) -> None:
        """Store an object, whatever was there before."""

        def ask() -> None:
            import obstore

            obstore.put(self._clients().steady, key, data, use_multipart=False)

        self._asked("write", key, ask)

    def open_file(self, key: str, part: int) -> WritableFile:
        """Begin an upload in parts of ``part`` bytes; nothing is sent before the first part is full."""
        import obstore

        return obstore.open_writer(
            self._clients().steady, key, buffer_size=part, max_concurrency=self.settings.in_flight
        )

    def delete(self, key: str) -> None:
        """Remove an object; absent is fine."""

        def ask() -> None:
            import obstore

            obstore.delete(self._clients().steady, key)

        with contextlib.suppress(NotFound):
            self._asked("delete", key, ask)

    # -- the conditional put

    def put_new(self, key: str, data: bytes) -> None:
        """Store an object under a key that was free, or find our own bytes there; ``AlreadyExists`` for other bytes.

        ``StoreError`` where neither was reached within the deadline.
        """
        import obstore

        client = self._clients().once
        deadline, pause = Deadline.after(self.settings.deadline_s), 0.05
        while True:
            try:
                obstore.put(client, key, data, mode="create", use_multipart=False)
                return
            except Exception as error:
                failure = error
            if refuses_conditions(failure):
                raise self._unconditional() from failure
            # Not even obstore's AlreadyExistsError is an answer: it also comes for a put of ours whose reply was lost
            # and for a 409 after which nothing is stored (apache/arrow-rs-object-store PR 852).
            found = self._holds(key, data)
            if found is True:
                log.info("%s: stored, though the store reported %s", self.where(key), type(failure).__name__)
                return
            if found is False:
                what = "create: the name holds other bytes (names on a store are never replaced)"
                raise AlreadyExists(errno.EEXIST, what, self.where(key)) from failure
            # A put and a read take at most half of the deadline: no round is begun that could end after it.
            if is_hopeless(failure) or deadline.left_s <= self.settings.deadline_s / 2:
                raise self.error(failure, "create", key) from failure
            clock.sleep(pause)
            pause = min(2 * pause, 5.0)

    def check_conditional(self, probe: str) -> None:
        """Find out, once per bucket and process, whether if-none-match is honoured; ``probe`` is a key to try it on.

        ``StoreError`` (EOPNOTSUPP) if it is not: two jobs could then each believe that they committed.
        """
        with self._probing:
            if self.url in _honouring:
                return
            try:
                self.put_new(probe, b"first")
                try:
                    self.put_new(probe, b"second")
                except AlreadyExists:
                    _honouring.add(self.url)
                    return
            finally:
                with contextlib.suppress(StoreError):  # then it stays until gc sweeps it
                    self.delete(probe)
            raise self._unconditional()

    def _holds(self, key: str, data: bytes) -> bool | None:
        """Whether an object has exactly these bytes; None if there is none, or the store did not answer."""
        import obstore

        try:
            found = obstore.get(self._clients().once, key)
            return found.meta["size"] == len(data) and bytes(found.bytes()) == data
        except Exception as error:
            log.debug("%s: reading back: %s", self.where(key), error)
            return None

    def _unconditional(self) -> StoreError:
        return StoreError(
            errno.EOPNOTSUPP,
            "create: this store ignores if-none-match, so two jobs could each believe that they committed; use a service "
            "or a version that has conditional puts (docs/storage.md), or save to a file system",
            self.url,
        )

    # -- inside

    def _clients(self) -> Clients:
        check_process(self.url)
        with self._lock:
            if self._opened is None:
                self._opened = open_clients(self._scheme, self._name, self.settings, self.url)
            return self._opened

    def _asked(self, operation: str, key: str, ask: Callable[[], _T]) -> _T:
        """Return what ``ask`` returns; what obstore raises in it becomes a ``StoreError``."""
        try:
            return ask()
        except (StoreError, ConfigError):
            raise
        except Exception as error:
            raise self.error(error, operation, key) from error
