"""Writing one rank's shard: pieces of live or staged tensors into one safetensors file, digests on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from distckpt import failpoints
from distckpt.errors import SaveFailed
from distckpt.format import digest as digests
from distckpt.format.shard import Piece, ShardPlan, plan_shard, render_header
from distckpt.storage.base import Store, Writer

SEGMENT = 8 << 20
"""Bytes that one request writes: neighbouring small tensors are joined up to this size."""

Source = Callable[[int], memoryview]
"""Piece index to its contiguous bytes; called from several threads, at most once per piece at a time."""


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What a rank knows of its shard: file size in bytes, digest of its header, bytes of tensors, each piece's digests."""

    size: int
    header: str
    nbytes: int
    digests: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class _Slice:
    """Blocks of one piece: bytes ``start:stop`` of it, whose first block has number ``block``."""

    piece: int
    start: int
    stop: int
    block: int


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

    ``stopped`` is asked before every request: a text means that a peer has failed, and ends the writing with
    ``SaveFailed``. Storage errors come out as they are (``OSError``); the file is then removed where possible.
    """
    plan = plan_shard(list(pieces), rank=rank, world_size=world_size, save_id=save_id, objects=dict(objects))
    writer = store.open_writer(name, plan.size)
    try:
        found = _write_data(writer, plan, source, threads, stopped, store.capabilities.random_write)
        header = render_header(plan, found)
        failpoints.hit("shard.before_header", name)
        writer.write_at(0, memoryview(header))
        if not store.capabilities.random_write:
            for segment in _segments(plan):
                parts = [source(part.piece)[part.start : part.stop] for part in segment]
                _write_segment(writer, plan, segment, parts, stopped)
        writer.commit()
    except BaseException:
        writer.abort()
        raise
    failpoints.hit("shard.written", name)
    return WrittenShard(plan.size, digests.digest(header), sum(plan.nbytes), tuple(map(tuple, found)))


def _write_data(
    writer: Writer,
    plan: ShardPlan,
    source: Source,
    threads: int,
    stopped: Callable[[], str | None],
    random_write: bool,
) -> list[list[str]]:
    """Digest all blocks, and write them too where the header can come last."""
    found: list[list[str]] = [[""] * digests.block_count(nbytes, plan.block) for nbytes in plan.nbytes]

    def run(segment: list[_Slice]) -> None:
        parts = [source(part.piece)[part.start : part.stop] for part in segment]
        for part, data in zip(segment, parts, strict=True):
            blocks = digests.block_digests(data, plan.block)
            found[part.piece][part.block : part.block + len(blocks)] = blocks
        if random_write:
            _write_segment(writer, plan, segment, parts, stopped)

    segments = list(_segments(plan))
    if threads <= 1 or len(segments) <= 1:
        for segment in segments:
            run(segment)
        return found
    with ThreadPoolExecutor(min(threads, len(segments)), thread_name_prefix="distckpt-write") as pool:
        futures = [pool.submit(run, segment) for segment in segments]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
    return found


def _write_segment(
    writer: Writer,
    plan: ShardPlan,
    segment: list[_Slice],
    parts: list[memoryview],
    stopped: Callable[[], str | None],
) -> None:
    reason = stopped()
    if reason is not None:
        raise SaveFailed(f"writing stopped because another rank failed: {reason}")
    first = segment[0]
    data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
    writer.write_at(plan.starts[first.piece] + first.start, data)


def _segments(plan: ShardPlan) -> Iterator[list[_Slice]]:
    """Cut the file's data into runs of about ``SEGMENT`` bytes that begin and end at block boundaries."""
    current: list[_Slice] = []
    filled = 0
    for index in plan.order:
        nbytes, at = plan.nbytes[index], 0
        while at < nbytes:
            room = max(plan.block, (SEGMENT - filled) // plan.block * plan.block)
            stop = min(nbytes, at + room)
            current.append(_Slice(index, at, stop, at // plan.block))
            filled += stop - at
            at = stop
            if filled >= SEGMENT:
                yield current
                current, filled = [], 0
    if current:
        yield current
