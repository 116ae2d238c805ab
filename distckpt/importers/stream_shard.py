"""Writing one shard from streams: every byte is read once, digested and written, a few requests at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distckpt import failpoints
from distckpt.boxes import Box
from distckpt.dcp.parallel import run_all
from distckpt.errors import AgreementError
from distckpt.export.stream import CHUNK, Progress, Stream
from distckpt.format import digest as digests
from distckpt.format.placing import Piece
from distckpt.format.shard import ShardPlan, plan_shard, render_header
from distckpt.storage.base import Store, Writer
from distckpt.storage.direct import ALIGNMENT, POOL

Fill = Callable[[int, int, int, memoryview], None]
"""(piece, start, stop, view): put bytes [start, stop) of that piece's elements into ``view``; called from threads."""


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
    """Write whole tensors as one durable shard of a new name; see ``write_pieces``."""
    pieces = [Piece(fqn, s.dtype, s.shape, Box.whole(s.shape)) for fqn, s in streams.items()]
    plan = plan_shard(pieces, rank=rank, world_size=world_size, save_id=save_id, objects=objects)
    sources = list(streams.values())

    def fill(piece: int, start: int, stop: int, view: memoryview) -> None:
        sources[piece].fill(pieces[piece].box, start, stop, view)

    return write_pieces(store, name, plan, fill, threads=threads, request=CHUNK, progress=progress)


def write_pieces(
    store: Store,
    name: str,
    plan: ShardPlan,
    fill: Fill,
    *,
    threads: int,
    request: int,
    progress: Progress = lambda nbytes: None,
    stopped: Callable[[], str | None] = lambda: None,
    making: int | None = None,
) -> WrittenShard:
    """Write a planned shard durably from pieces whose bytes are made on demand, ``request`` (at most 7 MiB) at a time.

    At most ``making`` of the threads (all, if None) make and digest bytes at a time, so that the others can write.
    Memory: ``threads`` buffers of 8 MiB, reused, as far as they are filled. ``stopped`` is asked before every request:
    a text means that a peer has failed, and ends the writing with ``AgreementError``. A store that takes only rising
    offsets has everything made twice: the header, which has the digests, comes first.
    """
    turn = threading.Semaphore(max(1, making or threads))
    found = [[""] * digests.block_count(nbytes, plan.block) for nbytes in plan.nbytes]
    room = (POOL.nbytes - ALIGNMENT) // plan.block * plan.block  # a request may begin anywhere in a page
    requests = list(_requests(plan, min(request, room)))
    writer = store.open_writer(name, plan.size)

    def work(left: Iterator[list[_Part]], *, hashing: bool, writing: bool) -> None:
        reason = stopped()
        if reason is not None:
            raise AgreementError(f"writing stopped because another rank failed: {reason}")
        with POOL.lend() as buffer:
            with turn:
                parts = next(left)  # not before: what reads ahead counts on requests that begin in the file's order
                # The bytes lie in the buffer as they will in the file's pages, so that whole pages can be written directly.
                offset = plan.starts[parts[0].piece] + parts[0].start
                at = first = offset % ALIGNMENT
                for part in parts:
                    view = buffer[at : at + part.stop - part.start]
                    fill(part.piece, part.start, part.stop, view)
                    if hashing:
                        number = part.start // plan.block
                        blocks = digests.block_digests(view, plan.block)
                        found[part.piece][number : number + len(blocks)] = blocks
                    at += len(view)
            if writing:
                _write(writer, offset, buffer[first:at])
                progress(at - first)

    def every(threads: int, *, hashing: bool, writing: bool) -> None:
        left = iter(requests)  # threads take from it: next() of a list's iterator is atomic
        run_all(lambda _: work(left, hashing=hashing, writing=writing), range(len(requests)), threads, "convert")

    try:
        direct = store.capabilities.random_write
        every(threads, hashing=True, writing=direct)
        failpoints.hit("shard.before_header", name)
        writer.write_at(0, memoryview(render_header(plan, found)))
        if not direct:
            every(1, hashing=False, writing=True)
        writer.commit()
    except BaseException:
        writer.abort()
        raise
    return WrittenShard(plan.size, digests.digest(render_header(plan, found)), tuple(map(tuple, found)))


def _requests(plan: ShardPlan, most: int) -> Iterator[list[_Part]]:
    """Cut the data, in file order, into runs of at most ``most`` bytes whose parts begin at block boundaries.

    What does not fit into a run begins the next one, as in what reads ahead: so a request uses up what was fetched for it.
    """
    most = max(most // plan.block, 1) * plan.block
    current: list[_Part] = []
    filled = 0
    for index in plan.order:
        nbytes = plan.nbytes[index]
        if current and filled + nbytes > most:
            yield current
            current, filled = [], 0
        for start in range(0, nbytes, most):
            if start:
                yield current
                current, filled = [], 0
            stop = min(nbytes, start + most)
            current.append(_Part(index, start, stop))
            filled += stop - start
    if current:
        yield current


def _write(writer: Writer, offset: int, view: memoryview) -> None:
    """Write bytes in two steps where they begin within a page: its rest, then whole pages."""
    head = min(len(view), -offset % ALIGNMENT)
    if head:
        writer.write_at(offset, view[:head])
    if len(view) > head:
        writer.write_at(offset + head, view[head:])
