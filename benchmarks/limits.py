"""Raw limits of this machine, probed with the same bytes and in the same run as what is compared with them."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from distckpt.dcp.parallel import processors
from distckpt.format.digest import block_digests
from distckpt.storage import probes
from distckpt.storage.direct import REQUEST, anonymous, copy_memory
from distckpt.storage.probes import Point

QUICK_POINTS = tuple(Point(threads, request << 20) for threads in (4, 12) for request in (4, 8))
ALL_POINTS = tuple(Point(threads, request << 20) for threads in (1, 2, 4, 8, 12, 16) for request in (1, 4, 8, 16))


def disk_write(folder: Path, nbytes: int, *, threads: int = 8, request: int = REQUEST) -> float:
    """Return bytes a second of durable direct writes: preallocated file, aligned requests, fsync of file and folder."""
    buffer, size = probes.random_pages(request), max(1, nbytes // request) * request

    def write(fd: int, pool: ThreadPoolExecutor) -> None:
        list(pool.map(lambda at: os.pwrite(fd, buffer, at), range(0, size, request)))

    return _durable_write(folder, size, threads, write)


def write_file(path: Path, nbytes: int) -> None:
    """Write a file of random bytes for reading probes; durable, and not in the page cache afterwards."""
    with path.open("wb") as file:
        for _ in range(max(1, nbytes // REQUEST)):
            file.write(probes.random_pages(REQUEST))
        os.fsync(file.fileno())
    drop_caches([path])


def disk_read(paths: list[Path], *, threads: int = 8, request: int = REQUEST) -> float:
    """Return bytes a second of direct reads of these files into aligned buffers.

    Of huge pages: into scattered small ones the same reads ran at 0.8 or at 1.9 GB/s, as memory happened to lie.
    """
    jobs = []
    fds = []
    for path in paths:
        fd = _open_direct(path, os.O_RDONLY | os.O_DIRECT)
        fds.append(fd)
        jobs += [(fd, at) for at in range(0, path.stat().st_size, request)]
    buffers = _touched_buffers(threads, request)

    def read(job: tuple[int, int, int]) -> int:
        index, fd, at = job
        return os.preadv(fd, [buffers[index % threads]], at)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, [(i, *job) for i, job in enumerate(jobs)]))
    seconds = time.perf_counter() - started
    for fd in fds:
        os.close(fd)
    return total / seconds


def cached_read(paths: list[Path], memory: np.ndarray, *, request: int) -> float:
    """Return bytes a second of reading files that the page cache holds into ``memory``, and hashing every byte.

    ``memory`` (uint8) was touched before and has a request's room for each begun one of each file: all that is read, so
    that no cache keeps it.

    One thread a processor, blocks and hash as in a load: what a verified load from the page cache can reach. The
    kernel's own copy (copy_to_user) is slower than a large memcpy, which writes past the caches.
    """
    threads = processors()
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    jobs = [(fd, at) for fd, path in zip(fds, paths, strict=True) for at in range(0, path.stat().st_size, request)]
    room = memoryview(memory)

    def read(number: int) -> int:
        fd, at = jobs[number]
        view = room[number * request : (number + 1) * request]
        got = os.preadv(fd, [view], at)
        block_digests(view[:got])
        return got

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # threads are started before the clock
        started = time.perf_counter()
        total = sum(pool.map(read, range(len(jobs))))
        seconds = time.perf_counter() - started
    for fd in fds:
        os.close(fd)
    return total / seconds


def verified_write(folder: Path, source: np.ndarray, nbytes: int, *, threads: int, request: int) -> float:
    """Return bytes a second of ``disk_write`` where every byte is hashed and copied to its aligned buffer first.

    As many threads do that at a time as there are processors: more of them slow each other down by a tenth and more.
    ``source`` (uint8, touched before, at least ``nbytes`` and one request) lies in one piece, and each thread keeps its buffer:
    what a save of ordinary memory with checksums can reach. Busy processors slow some disks down, virtual ones above all.
    """
    room, buffers = memoryview(source), _touched_buffers(threads, request)
    size = max(1, nbytes // request) * request
    starts, turn = iter(range(0, size, request)), threading.Semaphore(processors())

    def write(fd: int, pool: ThreadPoolExecutor) -> None:
        def fill_and_write(buffer: memoryview) -> None:
            for at in starts:
                view = room[at : at + request]
                with turn:
                    block_digests(view)
                    copy_memory(buffer, view)
                os.pwrite(fd, buffer, at)

        list(pool.map(fill_and_write, buffers))

    return _durable_write(folder, size, threads, write)


def verified_read(
    paths: list[Path], memory: np.ndarray, *, threads: int, request: int, hashed: bool = True
) -> float:
    """Return bytes a second of ``disk_read`` where every byte is ``hashed`` and copied into ``memory`` afterwards.

    ``memory`` is like that of ``cached_read``: what a cold load with checksums, or without, can reach, tensors being where
    no direct read can put them. Empty: nothing is copied, bytes are hashed where they were read, as for an average.
    """
    fds = [_open_direct(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
    sizes = [(fd, path.stat().st_size) for fd, path in zip(fds, paths, strict=True)]
    jobs = iter(list(enumerate((fd, at) for fd, size in sizes for at in range(0, size, request))))
    room, turn = memoryview(memory) if memory.size else None, threading.Semaphore(processors())

    def read(buffer: memoryview) -> int:
        total = 0
        for number, (fd, at) in jobs:
            got = os.preadv(fd, [buffer], at)
            with turn:  # as in verified_write
                if hashed:
                    block_digests(buffer[:got])
                if room is not None:
                    copy_memory(room[number * request : number * request + got], buffer[:got])
            total += got
        return total

    buffers = _touched_buffers(threads, request)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, buffers))
    seconds = time.perf_counter() - started
    for fd in fds:
        os.close(fd)
    return total / seconds


def memory_copy(nbytes: int) -> float:
    """Return bytes a second of copying between two buffers that were touched before."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    np.copyto(target, source)
    started = time.perf_counter()
    np.copyto(target, source)
    return nbytes / (time.perf_counter() - started)


def copy_rate(source: np.ndarray, scratch: np.ndarray, *, threads: int = 1) -> float:
    """Return bytes a second of copying all of ``source`` (uint8) into ``scratch``, again and again where it is smaller.

    Both must have been touched before. With several threads, each copies its part.
    """

    def copy(part: int) -> None:
        room = scratch[part * scratch.size // threads : (part + 1) * scratch.size // threads]
        low, high = part * source.size // threads, (part + 1) * source.size // threads
        for at in range(low, high, room.size):
            piece = source[at : min(high, at + room.size)]
            np.copyto(room[: piece.size], piece)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # threads are started before the clock
        started = time.perf_counter()
        list(pool.map(copy, range(threads)))
        return source.size / (time.perf_counter() - started)


def drop_caches(paths: list[Path]) -> int:
    """Evict these files from the page cache, durable or not; return how many of their pages are still resident."""
    os.sync()
    return probes.evict(paths)


def _durable_write(folder: Path, size: int, threads: int, write: Callable[[int, ThreadPoolExecutor], None]) -> float:
    """Return bytes a second of ``write`` (descriptor, threads) filling a preallocated file; fsync of file and folder."""
    path = folder / f"raw-{os.getpid()}"
    fd = _open_direct(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL | os.O_DIRECT)
    try:
        started = time.perf_counter()
        os.posix_fallocate(fd, 0, size)
        with ThreadPoolExecutor(threads) as pool:
            write(fd, pool)
        os.fsync(fd)
        _sync_folder(folder)
        seconds = time.perf_counter() - started
    finally:
        os.close(fd)
        path.unlink()
    return size / seconds


def _touched_buffers(count: int, nbytes: int) -> list[memoryview]:
    """Return aligned buffers of huge pages whose first touch is over."""
    buffers = [anonymous(nbytes) for _ in range(count)]
    for buffer in buffers:
        buffer[:: mmap.PAGESIZE] = bytes(-(-nbytes // mmap.PAGESIZE))
    return buffers


def _open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags, 0o644)
    except OSError:
        return os.open(path, flags & ~os.O_DIRECT, 0o644)  # the file system refuses: buffered + fsync is its limit


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
