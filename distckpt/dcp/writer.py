"""Writing one rank's shard: pieces of live or staged tensors into one safetensors file, digests on the way.

The data region of the file is cut into requests of equal, aligned size, whatever tensors they hold, so that a
thousand small tensors cost no more than a large one. Several threads each fill a reused buffer, hash, and write; the
header, which holds the digests, comes last. An incremental save hashes everything first, and writes what changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from distckpt import failpoints
from distckpt.dcp.buffers import copy_bytes
from distckpt.dcp.parallel import run_all, turns
from distckpt.errors import AgreementError
from distckpt.format import digest as digests
from distckpt.format.placing import Piece, Placed, place
from distckpt.format.reuse import Base, reuse, used_files
from distckpt.format.runs import FileRef
from distckpt.format.shard import Extent, ShardPlan, plan_shard, render_header
from distckpt.heap import no_collections
from distckpt.storage.base import Store, Writer
from distckpt.storage.direct import ALIGNMENT, POOL, REQUEST, address

Source = Callable[[int], memoryview]
"""Piece index to its contiguous bytes; called from several threads."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Pieces copied into one region of memory that is the shard's data region, byte for byte; usable as a source."""

    views: tuple[memoryview, ...]
    image: memoryview

    def __call__(self, piece: int) -> memoryview:
        """Return a piece's bytes."""
        return self.views[piece]


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What a rank knows of its shard: file size, digest of its header, bytes of tensors, each piece's digests.

    ``references`` are the files of earlier checkpoints that it refers to, and how many bytes of each.
    """

    size: int
    header: str
    nbytes: int
    digests: tuple[tuple[str, ...], ...]
    plan: ShardPlan
    references: tuple[tuple[FileRef, int], ...]


class _Part(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``start:stop`` of one piece, which lie at byte ``at`` of a request."""

    piece: int
    start: int
    stop: int
    at: int


class _Request(msgspec.Struct, frozen=True):
    """Bytes ``offset:offset + size`` of the data region."""

    offset: int
    size: int
    parts: tuple[_Part, ...]


def write_shard(
    store: Store,
    name: str,
    pieces: Sequence[Piece] | Placed,
    source: Source,
    *,
    rank: int,
    world_size: int,
    save_id: str,
    objects: Mapping[str, Any],
    threads: int = 4,
    stopped: Callable[[], str | None] = lambda: None,
    block: int = digests.BLOCK,
    base: Base | None = None,
) -> WrittenShard:
    """Write a shard durably and return its receipt; the name must be new.

    A ``Staged`` source is written from its image without another copy. ``stopped`` is asked before every request: a
    text means that a peer has failed, and ends the writing with ``AgreementError``. ``block`` is the number of bytes of
    each digest. With ``base`` blocks that are in its files already are referred to, not written; the source is asked
    for every piece twice then. Storage errors come out as they are (``OSError``); the file is then removed where
    possible.
    """
    placed = place(pieces)
    hashing = _Hashing(placed, source, block, stopped)
    known = None
    if base is not None and base.block == block:
        run_all(hashing, list(_requests(hashing.extents())), threads, "hash")
        known = reuse(base, placed.pieces, hashing.found)
        failpoints.hit("shard.compared", name)
    plan = plan_shard(
        placed, rank=rank, world_size=world_size, save_id=save_id, objects=dict(objects), block=block, reuse=known
    )
    writer = store.open_writer(name, plan.size)
    job = _Job(writer, plan, hashing, source, hashed=base is not None and base.block == block)
    try:
        with no_collections():
            requests = list(_requests(plan.extents))
        if store.capabilities.random_write:
            run_all(job.hash_and_write, requests, threads, "write")
            failpoints.hit("shard.before_header", name)
            writer.write_at(0, memoryview(job.header()))
        else:  # strictly rising offsets: hash everything first
            if not job.hashed:
                run_all(hashing, requests, threads, "write")
                job.hashed = True
            failpoints.hit("shard.before_header", name)
            writer.write_at(0, memoryview(job.header()))
            for request in requests:
                job.hash_and_write(request)
        writer.commit()
    except BaseException:
        writer.abort()
        raise
    failpoints.hit("shard.written", name)
    return WrittenShard(
        plan.size,
        digests.digest(job.header()),
        sum(plan.nbytes),
        tuple(map(tuple, hashing.found)),
        plan,
        tuple(used_files(known, plan.nbytes, block)) if known is not None else (),
    )


class _Hashing:
    """Digests of all blocks of a rank's pieces; called on several threads, each request on one."""

    @no_collections()
    def __init__(self, placed: Placed, source: Source, block: int, stopped: Callable[[], str | None]) -> None:
        self._source, self._block, self._stopped = source, block, stopped
        self._placed = placed
        self.turn = turns(sum(placed.nbytes), len(placed.pieces))
        self.found: list[list[str]] = [[""] * digests.block_count(nbytes, block) for nbytes in placed.nbytes]

    def extents(self) -> list[Extent]:
        """Return all pieces, as they would follow each other in a file that has them whole."""
        return [Extent(i, 0, self._placed.nbytes[i]) for i in self._placed.order]

    def views(self, request: _Request) -> list[memoryview]:
        """Return the whole pieces that have a part in the request, each asked for once."""
        return [self._source(part.piece) for part in request.parts]

    def __call__(self, request: _Request) -> None:
        """Digest a request that is not written (now)."""
        self.check()
        with self.turn:
            self.hash(request, self.views(request))

    def check(self) -> None:
        """Raise ``AgreementError`` if a peer has failed meanwhile."""
        reason = self._stopped()
        if reason is not None:
            raise AgreementError(f"writing stopped because another rank failed: {reason}")

    def hash(self, request: _Request, views: Sequence[memoryview]) -> None:
        """Digest every block that begins in this request (it may end in the next)."""
        block = self._block
        for part, view in zip(request.parts, views, strict=True):
            first, last = -(-part.start // block), -(-part.stop // block)
            if first < last:
                self.found[part.piece][first:last] = digests.block_digests(view[first * block : last * block], block)


class _Job:
    """One shard being written, by several threads, each request on one."""

    def __init__(self, writer: Writer, plan: ShardPlan, hashing: _Hashing, source: Source, *, hashed: bool) -> None:
        self._writer, self._plan, self._hashing, self.hashed = writer, plan, hashing, hashed
        self._image = source.image if isinstance(source, Staged) and not plan.files else None
        self._header = b""

    def hash_and_write(self, request: _Request) -> None:
        """Do both while the bytes are in the processor's cache; few threads hash and copy at a time, all may write."""
        self._hashing.check()
        with contextlib.ExitStack() as lent:
            with self._hashing.turn:
                views = self._hashing.views(request)
                if not self.hashed:
                    self._hashing.hash(request, views)
                data = self._gathered(request, views, lent)
            self._writer.write_at(self._plan.data_start + request.offset, data)

    def _gathered(self, request: _Request, views: Sequence[memoryview], lent: contextlib.ExitStack) -> memoryview:
        """Return the bytes of a request: of the image, of the tensor itself, or of a buffer that is lent and filled here."""
        if self._image is not None:
            return self._image[request.offset : request.offset + request.size]
        first = views[0][request.parts[0].start : request.parts[0].stop]
        if len(views) == 1 and address(first) % ALIGNMENT == 0:
            return first
        buffer = lent.enter_context(POOL.lend())
        for part, view in zip(request.parts, views, strict=True):
            copy_bytes(buffer[part.at : part.at + part.stop - part.start], view[part.start : part.stop])
        return buffer[: request.size]

    def header(self) -> bytes:
        """Return the file's first bytes; all blocks must be hashed."""
        if not self._header:
            self._header = render_header(self._plan, self._hashing.found)
        return self._header


def _requests(extents: Iterable[Extent]) -> Iterator[_Request]:
    """Cut extents that follow each other into requests of ``REQUEST`` bytes, the last one shorter."""
    offset, filled, parts = 0, 0, []
    for extent in extents:
        start = extent.start
        while start < extent.stop:
            stop = min(extent.stop, start + REQUEST - filled)
            parts.append(_Part(extent.piece, start, stop, filled))
            filled += stop - start
            start = stop
            if filled == REQUEST:
                yield _Request(offset, filled, tuple(parts))
                offset, filled, parts = offset + filled, 0, []
    if parts:
        yield _Request(offset, filled, tuple(parts))
