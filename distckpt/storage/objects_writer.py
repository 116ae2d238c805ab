"""Uploading one shard: parts of a multipart upload in flight while the next ones are handed over.

Nothing is visible under the name before ``commit``, which completes the upload. One that is given up is aborted; of
one whose process dies the parts stay with the service, invisible, until the bucket's lifecycle rule removes them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from distckpt import failpoints
from distckpt.config import ObjectStoreConfig
from distckpt.errors import StoreError
from distckpt.storage.objects_bucket import Bucket
from distckpt.storage.objects_client import reason_of
from distckpt.storage.paths import flat_bytes

if TYPE_CHECKING:
    from obstore import WritableFile

log = logging.getLogger("distckpt")

MAX_PARTS = 9_000
"""S3 takes 10,000 parts of equal size; larger shards get larger parts."""
_MIB = 1 << 20


def part_bytes(size: int, settings: ObjectStoreConfig) -> int:
    """Return the size of the parts of an object of ``size`` bytes."""
    return max(settings.part_bytes, -(-size // MAX_PARTS // _MIB) * _MIB)


class ObjectWriter:
    """Streams one object of a known size; offsets must rise without a gap. Memory: the parts in flight.

    States: open, dead, committed. After any error it is dead and the upload aborted, as far as the service answers.
    """

    def __init__(self, bucket: Bucket, key: str, size: int, *, name: str, count: Callable[[str, int], None]) -> None:
        """``name`` is the name on the store, for failpoints."""
        self._bucket, self._key, self._size, self._name, self._count = bucket, key, size, name, count
        self._part = part_bytes(size, bucket.settings)
        self._file: WritableFile | None = bucket.open_file(key, self._part)
        self._written = 0
        self._state = "open"
        self._lock = threading.Lock()

    def write_at(self, offset: int, data: memoryview) -> None:
        """See ``Writer.write_at``: takes a copy, and waits only while enough parts are in flight."""
        with self._lock:
            self._check_open("write")
            self._state = "dead"  # until this call has worked
            try:
                view = flat_bytes(memoryview(data))
                end = offset + len(view)
                if offset < 0 or end > self._size:
                    self._fail("write", f"[{offset}, {end}) is outside an object of {self._size} bytes")
                if offset != self._written:
                    self._fail("write", f"offset {offset}, but an upload goes on at {self._written}: offsets must rise")
                failpoints.hit("writer.chunk", self._name)
                self._send(view)
            except BaseException:
                self._discard()
                raise
            self._written = end
            self._count("bytes_written", len(view))
            self._state = "open"

    def commit(self) -> None:
        """See ``Writer.commit``: complete the upload, and look at what the service has stored."""
        with self._lock:
            self._check_open("commit")
            self._state = "dead"
            try:
                if self._written < self._size:
                    self._fail("commit", f"only {self._written} of {self._size} bytes were written")
                failpoints.hit("writer.before_fsync", self._name)
                self._complete()
            except BaseException:
                self._discard()
                raise
            self._file = None
            self._count("creates", 1)
            self._count("fsyncs", 1)
            self._state = "committed"
            failpoints.hit("writer.synced", self._name)

    def abort(self) -> None:
        """See ``Writer.abort``; after ``commit`` or a failure there is nothing left to do."""
        with self._lock:
            if self._state != "committed":
                self._state = "dead"
                self._discard()

    def _send(self, view: memoryview) -> None:
        assert self._file is not None
        try:
            # One part at a time: the wait for a free place among those in flight comes before each.
            for start in range(0, len(view), self._part):
                self._file.write(bytes(view[start : start + self._part]))
        except Exception as error:
            raise self._bucket.error(error, "upload", self._key) from error

    def _complete(self) -> None:
        """Complete; where the reply is an error or lost, what is stored under the name decides, as it is ours alone."""
        assert self._file is not None
        failure: Exception | None = None
        try:
            self._file.close()
        except Exception as error:
            failure = error
        facts = self._bucket.head(self._key)
        found = -1 if facts is None else int(facts["size"])
        if found != self._size:
            if failure is not None:
                raise self._bucket.error(failure, "complete the upload", self._key) from failure
            what = "nothing is" if found < 0 else f"{found} bytes are"
            self._fail("complete the upload", f"{what} stored, not {self._size}; the store lost data", errno.EIO)
        if failure is not None:
            log.warning(
                "%s: uploaded, though the store reported: %s", self._bucket.where(self._key), reason_of(failure)
            )

    def _discard(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            with contextlib.suppress(OSError):  # it is closed already: completing failed, and aborted it
                file.__exit__(StoreError, None, None)
        except Exception as error:
            log.warning(
                "%s: the upload could not be aborted (%s); its parts stay until the bucket's lifecycle rule for incomplete "
                "uploads removes them",
                self._bucket.where(self._key),
                reason_of(error),
            )

    def _check_open(self, operation: str) -> None:
        if self._state != "open":
            self._fail(operation, f"this object is {self._state}, write a new one", errno.EBADF)

    def _fail(self, operation: str, reason: str, code: int = errno.EINVAL) -> None:
        raise StoreError(code, f"{operation}: {reason}", self._bucket.where(self._key))
