"""Memory that the ranks of one host have in common: each fills its own part, all look at it. A link as fast as memory.

Sockets between ranks of one host copy each byte several times, with a processor that is then missing elsewhere. A
memfd (memfd_create(2)) is opened by the others under /proc/PID/fd: it has no name that could be left behind, and no
limit such as that of /dev/shm in containers.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec
import torch
import torch.distributed as dist

_ROOM = 512
"""Bytes of what one rank tells the others."""


Buffers: TypeAlias = Sequence[Sequence[memoryview]]
"""``[member][number]``: some buffers of every member of a group."""


def common_memory(group: dist.ProcessGroup, nbytes: int, count: int) -> Buffers | None:
    """Return ``count`` buffers of ``nbytes`` (a multiple of the page size) of each rank, or None where that cannot be.

    A rank writes to its own only. Collective: all ranks of the gloo group call it alike and get the same kind of
    answer. None: ranks on several hosts or in several containers, no memfd, no room.
    """
    own, fd = _made(nbytes * count)
    told = msgspec.json.encode([_here() if own is not None else f"alone {group.rank()}", os.getpid(), fd])
    maps: list[mmap.mmap] | None = None
    with contextlib.suppress(OSError, ValueError):
        maps = _opened(_told_by_all(group, told), group.rank(), own, nbytes * count)
    worst = torch.tensor([int(maps is not None)])
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]
    group.allreduce([worst], options).wait()
    if fd >= 0:
        os.close(fd)  # everybody who needs it has opened it by now
    if maps is None or not int(worst):
        return None
    whole = [memoryview(found) for found in maps]
    return [[w[i * nbytes : (i + 1) * nbytes] for i in range(count)] for w in whole]


def _here() -> str:
    """Return a text that is the same for processes that see each other under /proc (a boot, and in it a PID namespace)."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _made(nbytes: int) -> tuple[mmap.mmap | None, int]:
    fd = -1
    try:
        fd = os.memfd_create("distckpt")
        os.posix_fallocate(fd, 0, nbytes)  # no room is an error now, not a SIGBUS later
        return mmap.mmap(fd, nbytes), fd
    except (OSError, ValueError, AttributeError):
        if fd >= 0:
            os.close(fd)
        return None, -1


def _told_by_all(group: dist.ProcessGroup, told: bytes) -> list[list[object]]:
    mine = torch.zeros(_ROOM, dtype=torch.uint8)
    mine[: len(told)] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
    theirs = [torch.zeros_like(mine) for _ in range(group.size())]
    group.allgather([theirs], [mine]).wait()
    return [msgspec.json.decode(bytes(found.tolist()).rstrip(b"\0")) for found in theirs]


def _opened(told: Sequence[Sequence[object]], me: int, own: mmap.mmap | None, nbytes: int) -> list[mmap.mmap] | None:
    if own is None or not told[me][0] or any(host != told[me][0] for host, _, _ in told):
        return None
    maps = []
    for member, (_, pid, number) in enumerate(told):
        if member == me:
            maps.append(own)
            continue
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        try:
            maps.append(mmap.mmap(fd, nbytes))
        finally:
            os.close(fd)
    return maps
