"""Writing one shard from streams: every byte is read once, digested and written, a few requests at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt.boxes import Box
from distckpt.dcp.parallel import run_all
from distckpt.export.stream import CHUNK, Progress, Stream
from distckpt.format import digest as digests
from distckpt.format.shard import Piece, ShardPlan, plan_shard, render_header
from distckpt.storage.base import Store, Writer


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """File size, digest of the header, and each piece's digests in the order given."""

    size: int
    header: str
    digests: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes [start, stop) of one piece; ``start`` is the beginning of a block."""

    piece: int
    start: int
    stop: int


def write_streams(
    store: Store,
    name: str,
    streams: Mapping[str, Stream],
    *,
    rank: int,
    world_size: int,
    save_id: str,
    objects: Mapping[str, Any],
    threads: int,
    progress: Progress,
) -> WrittenShard:
    """Write whole tensors as one durable shard of a new name. Memory: ``threads`` requests of at most ``CHUNK`` bytes.

    Raises as ``write_boxes``.
    """
    pieces = [Piece(fqn, s.dtype, s.shape, Box.whole(s.shape)) for fqn, s in streams.items()]
    plan = plan_shard(pieces, rank=rank, world_size=world_size, save_id=save_id, objects=objects)
    return write_boxes(store, name, plan, list(streams.values()), threads=threads, progress=progress)


def write_boxes(
    store: Store, name: str, plan: ShardPlan, sources: Sequence[Stream], *, threads: int, progress: Progress
) -> WrittenShard:
    """Write a planned shard, durably, from one stream for each of its pieces.

    A store that takes only rising offsets has everything read twice: the header, which has the digests, comes first.
    """
    found = [[""] * digests.block_count(nbytes, plan.block) for nbytes in plan.nbytes]
    writer = store.open_writer(name, plan.size)
    try:
        if not store.capabilities.random_write:
            for request in _requests(plan):
                _hash(request, _read(request, sources), found, plan.block)
            writer.write_at(0, memoryview(render_header(plan, found)))
            for request in _requests(plan):
                _write(writer, plan, request, _read(request, sources), progress)
        else:

            def work(request: list[_Part]) -> None:
                views = _read(request, sources)
                _hash(request, views, found, plan.block)
                _write(writer, plan, request, views, progress)

            run_all(work, list(_requests(plan)), threads, "convert")
            writer.write_at(0, memoryview(render_header(plan, found)))
        writer.commit()
    except BaseException:
        writer.abort()
        raise
    return WrittenShard(plan.size, digests.digest(render_header(plan, found)), tuple(map(tuple, found)))


def _requests(plan: ShardPlan) -> Iterator[list[_Part]]:
    """Cut the data, in file order, into runs of about ``CHUNK`` bytes whose parts begin at block boundaries."""
    current: list[_Part] = []
    filled = 0
    for index in plan.order:
        nbytes, at = plan.nbytes[index], 0
        while at < nbytes:
            stop = min(nbytes, at + max(plan.block, (CHUNK - filled) // plan.block * plan.block))
            current.append(_Part(index, at, stop))
            filled += stop - at
            at = stop
            if filled >= CHUNK:
                yield current
                current, filled = [], 0
    if current:
        yield current


def _read(request: list[_Part], sources: Sequence[Stream]) -> list[memoryview]:
    return [memoryview(sources[part.piece].read(part.start, part.stop)).cast("B") for part in request]


def _hash(request: list[_Part], views: Sequence[memoryview], found: list[list[str]], block: int) -> None:
    for part, view in zip(request, views, strict=True):
        blocks = digests.block_digests(view, block)
        found[part.piece][part.start // block : part.start // block + len(blocks)] = blocks


def _write(
    writer: Writer, plan: ShardPlan, request: list[_Part], views: Sequence[memoryview], progress: Progress
) -> None:
    data = views[0] if len(views) == 1 else memoryview(b"".join(views))
    writer.write_at(plan.starts[request[0].piece] + request[0].start, data)
    progress(len(data))
