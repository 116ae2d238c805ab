"""Writing one rank's shard: pieces of live or staged tensors into one safetensors file, digests on the way.

The data region of the file is cut into requests of equal, aligned size, whatever tensors they hold, so that a
thousand small tensors cost no more than a large one. Several threads each fill a reused buffer, hash, and write; the
header, which holds the digests, comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt import failpoints
from distckpt.dcp.buffers import copy_bytes
from distckpt.dcp.parallel import run_all
from distckpt.errors import AgreementError
from distckpt.format import digest as digests
from distckpt.format.shard import Piece, ShardPlan, plan_shard, render_header
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
    """What a rank knows of its shard: file size, digest of its header, bytes of tensors, each piece's digests."""

    size: int
    header: str
    nbytes: int
    digests: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes ``start:stop`` of one piece, which lie at byte ``at`` of a request."""

    piece: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class _Request:
    """Bytes ``offset:offset + size`` of the data region."""

    offset: int
    size: int
    parts: tuple[_Part, ...]


def write_shard(
    store: Store,
    name: str,
    pieces: Sequence[Piece],
    source: Source,
    *,
    rank: int,
    world_size: int,
    save_id: str,
    objects: Mapping[str, Any],
    threads: int = 4,
    stopped: Callable[[], str | None] = lambda: None,
) -> WrittenShard:
    """Write a shard durably and return its receipt; the name must be new.

    A ``Staged`` source is written from its image without another copy. ``stopped`` is asked before every request: a
    text means that a peer has failed, and ends the writing with ``AgreementError``. Storage errors come out as they are
    (``OSError``); the file is then removed where possible.
    """
    plan = plan_shard(list(pieces), rank=rank, world_size=world_size, save_id=save_id, objects=dict(objects))
    writer = store.open_writer(name, plan.size)
    job = _Job(writer, plan, source, stopped)
    try:
        requests = list(_requests(plan))
        if store.capabilities.random_write:
            run_all(job.hash_and_write, requests, threads, "write")
            failpoints.hit("shard.before_header", name)
            writer.write_at(0, memoryview(job.header()))
        else:  # strictly rising offsets: hash everything first
            run_all(lambda request: job.hash(request, job.views(request)), requests, threads, "write")
            failpoints.hit("shard.before_header", name)
            writer.write_at(0, memoryview(job.header()))
            for request in requests:
                job.write(request, job.views(request))
        writer.commit()
    except BaseException:
        writer.abort()
        raise
    failpoints.hit("shard.written", name)
    return WrittenShard(plan.size, digests.digest(job.header()), sum(plan.nbytes), tuple(map(tuple, job.found)))


class _Job:
    """One shard being written; ``hash`` and ``write`` run on several threads, each request on one."""

    def __init__(
        self,
        writer: Writer,
        plan: ShardPlan,
        source: Source,
        stopped: Callable[[], str | None],
    ) -> None:
        self._writer, self._plan, self._source, self._stopped = writer, plan, source, stopped
        self._image = source.image if isinstance(source, Staged) else None
        self.found: list[list[str]] = [[""] * digests.block_count(nbytes, plan.block) for nbytes in plan.nbytes]
        self._header = b""

    def views(self, request: _Request) -> list[memoryview]:
        """Return the whole pieces that have a part in the request, each asked for once."""
        return [self._source(part.piece) for part in request.parts]

    def hash_and_write(self, request: _Request) -> None:
        """Do both while the bytes are in the processor's cache."""
        views = self.views(request)
        self.hash(request, views)
        self.write(request, views)

    def hash(self, request: _Request, views: Sequence[memoryview]) -> None:
        """Digest every block that begins in this request (it may end in the next)."""
        block = self._plan.block
        for part, view in zip(request.parts, views, strict=True):
            first, last = -(-part.start // block), -(-part.stop // block)
            if first < last:
                self.found[part.piece][first:last] = digests.block_digests(view[first * block : last * block], block)

    def write(self, request: _Request, views: Sequence[memoryview]) -> None:
        """Write one request: from the image, from the tensor itself, or from a buffer filled here."""
        reason = self._stopped()
        if reason is not None:
            raise AgreementError(f"writing stopped because another rank failed: {reason}")
        offset = self._plan.data_start + request.offset
        if self._image is not None:
            self._writer.write_at(offset, self._image[request.offset : request.offset + request.size])
            return
        first = views[0][request.parts[0].start : request.parts[0].stop]
        if len(views) == 1 and address(first) % ALIGNMENT == 0:
            self._writer.write_at(offset, first)
            return
        with POOL.lend() as buffer:
            for part, view in zip(request.parts, views, strict=True):
                copy_bytes(buffer[part.at : part.at + part.stop - part.start], view[part.start : part.stop])
            self._writer.write_at(offset, buffer[: request.size])

    def header(self) -> bytes:
        """Return the file's first bytes; all blocks must be hashed."""
        if not self._header:
            self._header = render_header(self._plan, self.found)
        return self._header


def _requests(plan: ShardPlan) -> Iterator[_Request]:
    """Cut the data region into requests of ``REQUEST`` bytes, the last one shorter."""
    offset, filled, parts = 0, 0, []
    for index in plan.order:
        start = 0
        while start < plan.nbytes[index]:
            stop = min(plan.nbytes[index], start + REQUEST - filled)
            parts.append(_Part(index, start, stop, filled))
            filled += stop - start
            start = stop
            if filled == REQUEST:
                yield _Request(offset, filled, tuple(parts))
                offset, filled, parts = offset + filled, 0, []
    if parts:
        yield _Request(offset, filled, tuple(parts))
