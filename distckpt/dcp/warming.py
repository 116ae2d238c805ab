"""Fetching ahead: the disk works while a rank still matches names and plans what it reads.

Between the manifest and the first read lie headers, the live state's structure and the plan: a second of Python where
there are tens of thousands of tensors. A rank that resumes in its own layout will want its whole shard, so the kernel
is asked to bring the shard's front into the page cache meanwhile (posix_fadvise(2), POSIX_FADV_WILLNEED).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Sequence
from contextlib import closing
from typing import Final

from distckpt.dcp.read_plan import Request
from distckpt.format.dtypes import itemsize
from distckpt.format.manifest import Manifest
from distckpt.storage.base import Store, open_reader

STEP: Final = 4 << 20
"""Bytes that are asked for at a time."""
AHEAD: Final = 32 << 20
"""Bytes under way at a time: enough for a device's full speed, and all that may still be on its way when reading begins."""
LEAST: Final = 64 << 20
"""Bytes of files for which a thread pays."""
MOST: Final = 1 << 30
"""Bytes of a rank at most: they take memory that the kernel had other uses for."""
_END_S: Final = 5.0


class Warming:
    """Has memory filled with the fronts of files, one after the other, from now until ``stop``. Use it as a context.

    ``files``: names on the store and their bytes, in the order of reading. Errors are left to who reads.
    """

    def __init__(self, store: Store, files: Sequence[tuple[str, int]]) -> None:
        self._store, self._files = store, files
        self._stopped = threading.Event()
        self._reached: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="distckpt-warming", daemon=True)
        if sum(size for _, size in files) >= LEAST:
            self._thread.start()

    def stop(self) -> None:
        """Ask for no more bytes; those under way arrive by themselves."""
        self._stopped.set()

    def spread(self, requests: Sequence[Request]) -> list[Request]:
        """Return requests with those that memory can answer evenly between the others: disk and processors are busy both."""
        parts: tuple[list[Request], list[Request]] = ([], [])
        for request in requests:
            parts[request.stop <= self._reached.get(request.path, 0)].append(request)
        places = [((at + 0.5) / len(part), at, request) for part in parts for at, request in enumerate(part)]
        return [request for _, _, request in sorted(places, key=lambda place: place[0])]

    def _run(self) -> None:
        left, byte = MOST, memoryview(bytearray(1))
        for name, size in self._files:
            with contextlib.suppress(OSError), closing(open_reader(self._store, name)) as reader:
                for at in range(0, min(size, left), STEP):
                    if self._stopped.is_set() or not reader.fetch_ahead(at, min(STEP, size - at)):
                        return
                    self._reached[name] = min(at + STEP, size)
                    if at >= AHEAD:
                        reader.read_into(at - AHEAD, byte)  # waits until it is there
            left -= size

    def __enter__(self) -> Warming:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        if self._thread.ident is not None:
            self._thread.join(_END_S)


def files_of(manifest: Manifest, folder: str, rank: int, world_size: int) -> list[tuple[str, int]]:
    """Return the files that a rank will want the whole of, as far as that can be told from the manifest: (name, bytes).

    On one rank all shards; on as many as have saved its own, unless ranks held the same: others may read that for it.
    """
    shards = [(f"{folder}/{shard.path}", shard.size) for shard in manifest.shards]
    if world_size == 1:
        return shards
    if len(shards) != world_size:
        return []
    same = [entry for entry in manifest.tensors.values() if "R" in entry.placements]
    alike = sum(math.prod(entry.shape) * itemsize(entry.dtype) for entry in same)
    return [] if alike > manifest.nbytes // 100 else [shards[rank]]
