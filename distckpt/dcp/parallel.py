"""Running I/O requests on a few threads, and how many of them this machine is good for: the first error ends the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_all(work: Callable[[T], object], requests: Sequence[T], threads: int, name: str) -> None:
    """Call ``work`` with every request, on at most ``threads`` threads named after ``name``.

    With one thread or one request it runs in order on the caller's own. The first failed request's error is raised once
    those under way have ended; requests not yet begun are dropped.
    """
    if threads <= 1 or len(requests) <= 1:
        for request in requests:
            work(request)
        return
    with ThreadPoolExecutor(min(threads, len(requests)), thread_name_prefix=f"distckpt-{name}") as pool:
        futures = [pool.submit(work, request) for request in requests]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


def local_ranks() -> int:
    """Return how many ranks this machine runs, as torchrun and DeepSpeed's launcher tell; 1 where nobody does."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return int(told) if told.isdecimal() and int(told) else 1


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
