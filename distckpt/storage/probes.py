"""What storage gives by itself: raw writes and reads at any depth and request size, and the time of small operations.

Through the store's own writer and reader, with nothing of the format in between. What is compared with these figures
is measured between two of them: where they differ, the machine has changed meanwhile (``differ``).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from distckpt import clock
from distckpt.storage.base import Store, open_reader
from distckpt.storage.direct import REQUEST, Residency, anonymous
from distckpt.storage.objects import ObjectStore

VOID: Final = 0.10
"""Most by which the probes before and after a measurement may differ, of the smaller one."""
MIN_PART: Final = 5 << 20
"""S3 takes no smaller parts."""
SMALL: Final = 4096
"""Bytes of the files that small operations work on: about a manifest."""

_T = TypeVar("_T")
_WARMING = bytearray(8 << 20)


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """Requests of ``request`` bytes, ``threads`` of them in flight."""

    threads: int = 8
    request: int = REQUEST


def best_point(measure: Callable[[Point], float], points: Sequence[Point]) -> Point:
    """Return the point at which a measure is highest: depth and request size decide what a disk gives."""
    return max(points, key=measure)


def differ(before: Mapping[str, float], after: Mapping[str, float], most: float = VOID) -> bool:
    """Whether the machine was not the same before and after: some rate differs by more than ``most`` of the smaller."""
    return any(abs(before[k] - after[k]) > most * min(before[k], after[k]) for k in before)


# ---------------------------------------------------------------- raw writes and reads


def tuned(store: Store, point: Point) -> Store:
    """Return the store with this many parts in flight and parts of this size, where it has such settings."""
    if not isinstance(store, ObjectStore):
        return store
    settings = store.bucket.settings
    return store.tuned(replace(settings, part_bytes=max(MIN_PART, point.request), in_flight=point.threads))


def raw_write(store: Store, name: str, nbytes: int, point: Point) -> float:
    """Write ``nbytes`` random bytes under a new name, durably, and return the seconds that took.

    Reserved space, requests in flight, fsync of file and folder, as a shard is written. Where offsets must rise, the
    requests are parts of an upload. After an error nothing is left. Raises ``StoreError``.
    """
    store = tuned(store, point)
    spans = _spans(nbytes, point.request)
    data = random_pages(min(point.request, nbytes))
    threads = point.threads if store.capabilities.random_write else 1
    with ThreadPoolExecutor(threads, thread_name_prefix="distckpt-probe") as pool:
        list(pool.map(lambda _: None, range(threads)))  # threads are started before the clock
        started = clock.monotonic()
        writer = store.open_writer(name, nbytes)
        try:
            _each(pool, lambda span: writer.write_at(span[0], data[: span[1]]), spans)
            writer.commit()
        except BaseException:
            writer.abort()
            raise
        store.sync_folder(name.rpartition("/")[0])
        return clock.monotonic() - started


def raw_read(store: Store, name: str, nbytes: int, point: Point) -> float:
    """Read a file of ``nbytes`` bytes into touched memory and return the seconds that took. Raises ``StoreError``."""
    store = tuned(store, point)
    spans = [(number, *span) for number, span in enumerate(_spans(nbytes, point.request))]
    buffers = [anonymous(point.request) for _ in range(point.threads)]
    for buffer in buffers:
        buffer[:: mmap.PAGESIZE] = bytes(-(-point.request // mmap.PAGESIZE))
    # A lane's requests follow each other in its own buffer; lanes run side by side.
    lanes = [spans[lane :: point.threads] for lane in range(min(point.threads, len(spans)))]
    with ThreadPoolExecutor(point.threads, thread_name_prefix="distckpt-probe") as pool:
        list(pool.map(lambda _: None, range(point.threads)))
        started = clock.monotonic()
        reader = open_reader(store, name)

        def read(lane: int) -> None:
            for _, offset, size in lanes[lane]:
                reader.read_into(offset, buffers[lane][:size])

        try:
            _each(pool, read, range(len(lanes)))
        finally:
            reader.close()
        return clock.monotonic() - started


def small_operations(store: Store, folder: str, count: int) -> dict[str, list[float]]:
    """Return the seconds of each of ``count`` small operations in a folder of its own, by kind; they leave nothing.

    ``commit`` stores 4 KiB under a new name, durably and only if it is absent; ``stat`` asks for a size; ``open and
    read`` fetches the 4 KiB; ``list`` names all of them (fewer times); ``delete`` removes one. Raises ``StoreError``.
    """
    found: dict[str, list[float]] = {"commit": [], "stat": [], "open and read": [], "list": [], "delete": []}

    def timed(kind: str, work: Callable[[], object]) -> None:
        started = clock.monotonic()
        work()
        found[kind].append(clock.monotonic() - started)

    names = [f"{folder}/small-{number:05}" for number in range(count)]
    for name in names:
        data = os.urandom(SMALL)
        timed("commit", lambda name=name, data=data: store.create(name, data))  # type: ignore[misc]
    for name in names:
        timed("stat", lambda name=name: store.size(name))  # type: ignore[misc]
        timed("open and read", lambda name=name: store.read(name, 0, SMALL))  # type: ignore[misc]
    for _ in range(max(1, count // 4)):
        timed("list", lambda: list(store.list(folder)))
    for name in names:
        timed("delete", lambda name=name: store.delete(name))  # type: ignore[misc]
    store.remove_folder(folder)
    return found


def _spans(nbytes: int, request: int) -> list[tuple[int, int]]:
    return [(at, min(request, nbytes - at)) for at in range(0, nbytes, request)]


def _each(pool: ThreadPoolExecutor, work: Callable[[_T], object], items: Iterable[_T]) -> None:
    """Do all of it; after the first error, or an interrupt, what was not begun is dropped."""
    jobs = [pool.submit(work, item) for item in items]
    try:
        for job in jobs:
            job.result()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def random_pages(nbytes: int) -> memoryview:
    """Return that much aligned memory, in huge pages where there are any, of bytes that repeat after 1 MiB."""
    view = anonymous(nbytes)
    block = os.urandom(min(nbytes, 1 << 20))
    for at in range(0, nbytes, len(block)):
        view[at : at + len(block)] = block[: nbytes - at]
    return view


# ---------------------------------------------------------------- the page cache


def cold(store: Store, names: Iterable[str]) -> bool | None:
    """Evict files from this machine's page cache; whether they are out of it, None where the store has no files."""
    path_of = getattr(store, "path_of", None)
    if path_of is None:
        return None
    return evict([Path(path_of(name)) for name in names]) == 0


def evict(paths: Iterable[Path]) -> int:
    """Evict durable files from the page cache; return how many of their pages are still resident (0: cold)."""
    resident = 0
    for path in paths:
        size = path.stat().st_size
        if size == 0:
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            resident += resident_pages(fd, size)
        finally:
            os.close(fd)
    return resident


def warm_caches(paths: Iterable[Path]) -> int:
    """Read files into the page cache; return how many of their pages are not resident (0: warm)."""
    absent = 0
    for path in paths:
        size = path.stat().st_size
        if size == 0:
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            at = 0
            while at < size:
                at += os.preadv(fd, [_WARMING], at) or size
            absent += -(-size // mmap.PAGESIZE) - resident_pages(fd, size)
        finally:
            os.close(fd)
    return absent


def resident_pages(fd: int, size: int) -> int:
    """Count the pages of an open file that are in the page cache. Raises ``OSError`` if nobody can tell."""
    with contextlib.closing(Residency(fd, size)) as residency:
        return residency.pages()
