"""Reading before the plan is made: while a rank matches names and plans, its disk has nothing to do.

Planning costs some tens of microseconds a tensor. Where that adds up, a rank that resumes in a job of the same size asks
the operating system for its own shard meanwhile; what has arrived when reading begins is taken from memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from distckpt.dcp.reader import CheckpointReader
from distckpt.storage.base import open_reader

MANY = 4096
"""Tensors of a checkpoint from which on its plan takes long enough."""


@contextlib.contextmanager
def reading_early(reader: CheckpointReader, rank: int, world_size: int) -> Iterator[Callable[[], None]]:
    """Bring the shard that ``rank`` will read first into memory until what is yielded is called, or the block ends.

    Nothing is promised, and an error is nobody's: whoever reads the shard will meet it.
    """
    stop = threading.Event()
    manifest = reader.manifest
    worth_it = manifest.world_size == world_size and len(manifest.tensors) >= MANY

    def run() -> None:
        with contextlib.suppress(OSError), contextlib.closing(open_reader(reader.store, reader.index.path(rank))) as file:
            file.read_early(stop)

    thread = threading.Thread(target=run, name="distckpt-early", daemon=True) if worth_it else None

    def end() -> None:
        stop.set()
        if thread is not None:
            thread.join()

    if thread is not None:
        thread.start()
    try:
        yield end
    finally:
        end()
