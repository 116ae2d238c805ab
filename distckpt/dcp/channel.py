"""One rank's line to the c10d store, on which every operation has a time limit.

The store's own operations have none: while the process that hosts a ``TCPStore`` is stopped (SIGSTOP, a
frozen node), ``check``, ``get`` and even ``wait`` with a timeout block until it goes on (torch 2.13). So
they run on a daemon thread over a clone of the caller's store, and the caller gives up on the thread when
the time is over. That also keeps the training thread's store client free, and lets a signal interrupt the
caller in any wait. A wait is one server-side ``wait``, not a loop of short ones: each one that times out
makes torch print two warnings.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
RECONNECT_S = 4.0  # for a store whose connection broke: a TCPStore that died never comes back
PART = 4 << 20  # bytes a stored value may have: TCPStore closes the connection above 8 MiB


class StoreLost(Exception):
    """The store did not answer in time, or the connection to it is gone."""


class _Job(Generic[T]):
    __slots__ = ("done", "error", "op", "result")

    def __init__(self, op: Callable[[Store], T]) -> None:
        self.op = op
        self.done = threading.Event()
        self.result: T
        self.error: BaseException | None = None

    def run(self, store: Store) -> None:
        try:
            self.result = self.op(store)
        except BaseException as error:  # carried to the caller's thread
            self.error = error
        self.done.set()


class Channel:
    """Runs store operations for one thread at a time; ``threaded=False`` for a store that never makes one
    wait.
    """

    def __init__(self, store: Store, *, threaded: bool) -> None:
        self._store = store
        self._threaded = threaded
        self._jobs: queue.SimpleQueue[_Job[Any] | None] | None = None
        self._broken = False

    def call(self, what: str, op: Callable[[Store], T], limit_s: float) -> T:
        """Return ``op(store)``; ``what`` says it in words.

        Raises:
            StoreLost: no answer within ``limit_s`` seconds, or the store reported an error.
        """
        job = _Job(op)
        if self._threaded:
            # torch tries to connect for as long as the store's own timeout, which may be half an hour.
            self._submit(job, what, min(limit_s, RECONNECT_S) if self._broken else limit_s)
        else:
            job.run(self._store)
        if job.error is None:
            self._broken = False
            return job.result
        self._abandon()
        self._broken = isinstance(job.error, dist.DistNetworkError)
        if isinstance(job.error, (RuntimeError, OSError)):  # torch's DistError is a RuntimeError
            text = str(job.error).strip().split("\n")[0]
            raise StoreLost(f"the c10d store failed to {what}: {text}") from job.error
        raise job.error

    def wait(self, what: str, keys: list[str], timeout_s: float, limit_s: float) -> bool:
        """Return whether all keys were there within ``timeout_s`` seconds; ``limit_s`` is for the answer."""

        def op(store: Store) -> bool:
            if timeout_s >= 0.001:
                try:
                    store.wait(keys, timedelta(seconds=timeout_s))
                    return True
                except dist.DistNetworkError:
                    raise
                except RuntimeError:  # each store has its own idea of a timeout's type and text
                    pass
            return bool(store.check(keys))

        return self.call(what, op, limit_s)

    def close(self) -> None:
        """Let the thread end; a later call starts another."""
        self._abandon()

    def __del__(self) -> None:
        self._abandon()

    def _submit(self, job: _Job[T], what: str, limit_s: float) -> None:
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._store, self._jobs), name="distckpt-store", daemon=True).start()
        self._jobs.put(job)
        try:
            answered = job.done.wait(limit_s)
        except BaseException:  # a signal handler raised: the thread may be busy for long, leave it behind
            self._abandon()
            raise
        if not answered:
            self._abandon()
            raise StoreLost(f"the c10d store did not answer within {limit_s:.1f} s when asked to {what}")

    def _abandon(self) -> None:
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None


def _serve(source: Store, jobs: queue.SimpleQueue[_Job[Any] | None]) -> None:
    store: Store | None = None
    while (job := jobs.get()) is not None:
        if store is None:
            try:
                store = source.clone()  # type: ignore[attr-defined]
            except BaseException as error:  # carried to the caller's thread
                job.error = error
                job.done.set()
                continue
        job.run(store)


def put(store: Store, key: str, data: bytes) -> None:
    """Store a value of any size: small ones as ``S`` + bytes, large ones in parts with ``P`` + their
    number.
    """
    if len(data) <= PART:
        store.set(key, b"S" + data)  # type: ignore[arg-type]
        return
    parts = -(-len(data) // PART)
    for i in range(parts):
        store.set(f"{key}.{i}", data[i * PART : (i + 1) * PART])  # type: ignore[arg-type]
    store.set(key, f"P{parts}")


def get(store: Store, key: str) -> bytes | None:
    """Return a value that ``put`` stored, None when there is none."""
    return join(store, key, store.get(key)) if store.check([key]) else None


def join(store: Store, key: str, head: bytes) -> bytes:
    """Return the whole value whose head (what is under the key itself) was read already."""
    if head[:1] == b"S":
        return head[1:]
    return b"".join(store.multi_get([f"{key}.{i}" for i in range(int(head[1:]))]))


def drop(store: Store, key: str) -> None:
    """Delete a value that ``put`` stored, if it is there."""
    if store.check([key]):
        head = store.get(key)
        store.delete_key(key)
        for i in range(int(head[1:]) if head[:1] == b"P" else 0):
            store.delete_key(f"{key}.{i}")
