"""Tensors whose bytes are read on demand, and the folder or file that appears only when it is complete."""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from distckpt.boxes import Box, flat_range_to_boxes, is_flat_range
from distckpt.dcp.buffers import copy_bytes
from distckpt.errors import ConfigError
from distckpt.format import digest as digests
from distckpt.format.dtypes import itemsize

CHUNK: Final = 8 << 20
"""Most bytes that are read at once."""

Buffer = memoryview | bytes | bytearray
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """One tensor: ``read(start, stop)`` returns these bytes of its row-major elements; safe to call from threads.

    ``into``, where there is one, reads the same of any box, into memory that is there (see ``fill``); ``lent`` gives it
    where it lies (see ``lend``).
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], Buffer]
    into: Callable[[Box, int, int, memoryview], None] | None = None
    lent: Callable[[Box, int, int, memoryview], Iterator[tuple[int, memoryview]]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)

    def chunks(self) -> Iterator[Buffer]:
        """Yield the bytes in order, at most ``CHUNK`` at a time."""
        for start in range(0, self.nbytes, CHUNK):
            yield self.read(start, min(start + CHUNK, self.nbytes))

    def fill(self, box: Box, start: int, stop: int, view: memoryview) -> None:
        """Put bytes [start, stop) of the row-major elements of a box of the tensor into ``view``, which is as long.

        ``start`` and ``stop`` lie between elements.
        """
        if self.into is not None:
            self.into(box, start, stop, view)
            return
        size, at = itemsize(self.dtype), 0
        for region in flat_range_to_boxes(box.sizes, start // size, stop // size):
            part = region.moved_by(box.offsets)
            flat = is_flat_range(part, self.shape)
            if flat is not None:
                copy_bytes(view[at : at + part.numel * size], self._bytes(flat[0] * size, flat[1] * size))
            else:
                self._gather(part, view[at : at + part.numel * size])
            at += part.numel * size

    def lend(self, box: Box, start: int, stop: int, spare: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield what ``fill`` puts into ``spare`` as (place, bytes), each to be used until the next is asked for."""
        if self.lent is not None:
            yield from self.lent(box, start, stop, spare)
            return
        self.fill(box, start, stop, spare)
        yield 0, spare

    def _bytes(self, start: int, stop: int) -> memoryview:
        return memoryview(self.read(start, stop)).cast("B")

    def _gather(self, box: Box, view: memoryview) -> None:
        """Copy a box that is no run of the tensor: whole rows are read, a few at a time, and cut."""
        import numpy as np

        size = itemsize(self.dtype)
        row = math.prod(self.shape[1:]) * size
        target = np.frombuffer(view, np.uint8).reshape(*box.sizes, size)
        inner = Box(box.offsets[1:], box.sizes[1:]).slices
        several = max(1, CHUNK // row)
        for first in range(0, box.sizes[0], several):
            last = min(first + several, box.sizes[0])
            data = self._bytes((box.offsets[0] + first) * row, (box.offsets[0] + last) * row)
            rows = np.frombuffer(data, np.uint8).reshape(last - first, *self.shape[1:], size)
            target[first:last] = rows[(slice(None), *inner)]


@dataclass(slots=True)
class Offer:
    """What is there to write: tensors by full name, further names of tied ones, plain values with ``Ref`` to tensors."""

    tensors: Mapping[str, Stream]
    aliases: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)
    config: Any = None


def fingerprint(dtype: str, shape: Sequence[int], blocks: Iterable[str]) -> str:
    """Return one digest of a tensor, from those of its bytes in blocks of ``digest.BLOCK``."""
    return digests.digest(f"{dtype} {list(shape)} {' '.join(blocks)}".encode())


def stream_fingerprint(stream: Stream, progress: Progress = lambda nbytes: None) -> str:
    """Read a whole tensor and return its fingerprint."""
    blocks: list[str] = []
    for chunk in stream.chunks():
        blocks += digests.block_digests(memoryview(chunk).cast("B"), digests.BLOCK)
        progress(len(chunk))
    return fingerprint(stream.dtype, stream.shape, blocks)


class Recorder:
    """Streams that remember the digests of what was read through them."""

    def __init__(self, tensors: Mapping[str, Stream]) -> None:
        self._blocks: dict[int, list[str]] = {}
        self.streams = {name: self._recorded(stream) for name, stream in tensors.items()}

    def _recorded(self, stream: Stream) -> Stream:
        count = digests.block_count(stream.nbytes, digests.BLOCK)
        blocks = [""] * count

        def read(start: int, stop: int) -> Buffer:
            data = stream.read(start, stop)
            found = digests.block_digests(memoryview(data).cast("B"), digests.BLOCK)
            blocks[start // digests.BLOCK : start // digests.BLOCK + len(found)] = found
            return data

        recorded = Stream(stream.dtype, stream.shape, read)
        self._blocks[id(recorded)] = blocks
        return recorded

    def fingerprint(self, stream: Stream) -> str:
        """Return the fingerprint of one of ``streams``, once all of it was read."""
        return fingerprint(stream.dtype, stream.shape, self._blocks[id(stream)])


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``target`` if the block ends well, and is removed if not.

    Raises ``ConfigError`` if the target exists and is not an empty folder.
    """
    final = Path(target)
    if os.path.lexists(final) and not (final.is_dir() and not final.is_symlink() and not any(final.iterdir())):
        raise ConfigError(f"{final}: is there already; name a new folder, nothing is overwritten")
    with draft_folder(final) as draft:
        yield draft
        for path in (*draft.iterdir(), draft):
            _sync(path)
        os.rename(draft, final)  # replaces an empty folder, nothing else
        _sync(final.parent)


@contextlib.contextmanager
def draft_folder(final: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside ``final``; what is still in it when the block ends is removed."""
    draft = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    draft.mkdir(parents=True)
    try:
        yield draft
    finally:
        if draft.exists():
            discard(draft)


def publish(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename drafts to their final names, in this order: all of them, or (after an error) none.

    What stands at a final name is set aside until the last one is in place, then removed; after an error it is back.
    """
    done: list[tuple[Path, Path, Path | None]] = []
    for draft, _ in moves:
        for path in (*draft.iterdir(), draft) if draft.is_dir() else (draft,):
            _sync(path)
    try:
        for draft, final in moves:
            aside = None
            if os.path.lexists(final):
                aside = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.old")
                os.rename(final, aside)
            done.append((draft, final, aside))
            os.rename(draft, final)
    except BaseException:
        for draft, final, aside in reversed(done):
            if os.path.lexists(final):
                os.rename(final, draft)
            if aside is not None:
                os.rename(aside, final)
        raise
    _sync(moves[-1][1].parent)
    for _, _, aside in done:
        if aside is not None:
            discard(aside)


@contextlib.contextmanager
def new_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the name of a temporary file that becomes ``target`` if the block ends well, and is removed if not."""
    final = Path(target)
    if os.path.lexists(final):
        raise ConfigError(f"{final}: is there already; name a new file, nothing is overwritten")
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield draft
        _sync(draft)
        os.link(draft, final)
        _sync(final.parent)
    finally:
        draft.unlink(missing_ok=True)


def discard(path: str | os.PathLike[str]) -> None:
    """Remove a file, or a folder and the files in it: what was written a moment ago and is not to stay."""
    target = Path(path)
    if target.is_dir() and not target.is_symlink():
        for file in target.iterdir():
            file.unlink()
        target.rmdir()
    else:
        target.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
