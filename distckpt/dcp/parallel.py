"""Running I/O requests on a few threads, and how many of them this machine is good for: the first error ends the rest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

T = TypeVar("T")


def run_all(work: Callable[[T], object], requests: Sequence[T], threads: int, name: str) -> None:
    """Call ``work`` with every request, on at most ``threads`` threads named after ``name``; they begin in order.

    With one thread or one request it runs on the caller's own. The first failed request's error is raised once those
    under way have ended; requests not yet begun are dropped.
    """
    left = iter(requests)  # threads take from it one at a time: next() of a sequence's iterator is atomic
    failed = threading.Event()

    def run() -> None:
        try:
            for request in left:
                if failed.is_set():
                    return
                work(request)
        except BaseException:
            failed.set()
            raise

    count = min(threads, len(requests))
    if count <= 1:
        run()
        return
    with ThreadPoolExecutor(count, thread_name_prefix=f"distckpt-{name}") as pool:
        running = [pool.submit(run) for _ in range(count)]
        try:
            for future in as_completed(running):
                future.result()
        finally:
            failed.set()  # also when the caller is interrupted


def local_ranks() -> int:
    """Return how many ranks this machine runs, as torchrun and DeepSpeed's launcher tell; 1 where nobody does."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return int(told) if told.isdecimal() and int(told) else 1


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_PIECE = 32 << 10
"""Bytes that are hashed and copied about as fast as Python gets to the next piece."""


def turns(nbytes: int, pieces: int) -> threading.Semaphore:
    """Return what lets in as many threads at a time as are good for hashing and copying so many pieces.

    One for each processor of a rank, and fewer for small pieces: for these a thread needs the interpreter lock more often
    than not, and twelve that want it at once took three times as long as two (18,867 tensors of 93 KB). The other threads
    wait here or for storage, so that requests are under way all the time.
    """
    most = max(1, processors() // local_ranks())
    return threading.Semaphore(min(most, 1 + nbytes // max(1, pieces) // _PIECE))


def asked_by_one(ask: Callable[[], str | None]) -> Callable[[], str | None]:
    """Return a check that several threads may call: one of them asks, the others meanwhile hear of nothing and go on."""
    lock = threading.Lock()

    def check() -> str | None:
        if not lock.acquire(blocking=False):
            return None
        try:
            return ask()
        finally:
            lock.release()

    return check
