"""Verified reading of a run of a box's elements into memory that the caller owns; nothing of its size is allocated.

Streamed work (averages, conversions) walks a box from its first element to its last in requests of a few MiB. Where a
stored box is laid out like the wanted one (the same box, or both whole rows), the bytes are one run of the file and are
read where they belong; any other layout is put together from regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distckpt.boxes import Box, flat_range_to_boxes, is_flat_range
from distckpt.errors import StoreError
from distckpt.format.box_reader import (
    Reader,
    Source,
    blocks_of,
    damaged,
    fill,
    read_checked,
    run_nbytes,
    runs,
    unreadable,
)
from distckpt.format.digest import block_digests
from distckpt.format.dtypes import itemsize
from distckpt.format.read_ahead import ReadThrough
from distckpt.storage.direct import POOL


def rows_around(box: Box, first: int, last: int) -> Box:
    """Return the rows of ``box`` that hold its row-major elements [first, last)."""
    if not box.ndim or not box.numel or first >= last:
        return box
    row = box.numel // box.sizes[0]
    return box.rows(first // row, -(-last // row))


@dataclass(frozen=True, slots=True)
class Share:
    """What a source holds of a wanted box: its row-major bytes [start, stop), from byte ``at`` of the stored box on.

    ``flat`` is False where they are not one run of both; nothing else then means anything.
    """

    source: Source
    flat: bool
    start: int = 0
    stop: int = 0
    at: int = 0


def shares_of(sources: Sequence[Source], box: Box) -> list[Share]:
    """Return what each source holds of ``box``; to be kept where the box is read in many requests."""
    return [_share(source, box) for source in sources]


def _share(source: Source, box: Box) -> Share:
    stored = source.stored.box
    common = box.intersect(stored)
    if common is None:
        return Share(source, flat=True)
    ours = is_flat_range(common.relative_to(box.offsets), box.sizes)
    theirs = is_flat_range(common.relative_to(stored.offsets), stored.sizes)
    if ours is None or theirs is None:
        return Share(source, flat=False)
    size = itemsize(source.stored.dtype)
    return Share(source, True, ours[0] * size, ours[1] * size, theirs[0] * size)


def fill_flat(store: Reader, shares: Sequence[Share], box: Box, start: int, stop: int, view: memoryview) -> None:
    """Put bytes [start, stop) of the row-major elements of ``box`` into ``view`` (flat, writable, of that length).

    ``start`` and ``stop`` lie between elements. ``shares`` of ``box`` tile it, or at least the rows that are read; only
    blocks that hold a wanted element are read, and each is verified. Raises ``ShardError`` naming file, tensor and rank.
    """
    if not all(share.flat for share in shares):
        size = itemsize(shares[0].source.stored.dtype)
        sources, at = [share.source for share in shares], 0
        for region in flat_range_to_boxes(box.sizes, start // size, stop // size):
            nbytes = region.numel * size
            fill(store, sources, region.moved_by(box.offsets), view[at : at + nbytes], threads=1)
            at += nbytes
        return
    for share in shares:
        low, high = max(start, share.start), min(stop, share.stop)
        if low < high:
            _copy(store, share.source, share.at + low - share.start, view[low - start : high - start])


def lend_flat(
    store: Reader, shares: Sequence[Share], box: Box, start: int, stop: int, spare: memoryview
) -> Iterator[tuple[int, memoryview]]:
    """Yield (place, bytes) of what ``fill_flat`` puts into ``spare``, each to be used until the next is asked for.

    Whole blocks of one stored box that were read ahead are verified where they lie; all else is put into ``spare``.
    """
    found = _whole_blocks(shares, start, stop) if isinstance(store, ReadThrough) else None
    if found is None:
        fill_flat(store, shares, box, start, stop, spare)
        yield 0, spare
        return
    assert isinstance(store, ReadThrough)
    source, first = found
    stored, block, at = source.stored, source.block, 0
    try:
        for view in store.lend(source.path, stored.start + first, spare, block):
            number = (first + at) // block
            digests = block_digests(view, block)
            promised = stored.digests[number : number + len(digests)]
            if digests != list(promised):
                wrong = next(i for i, pair in enumerate(zip(digests, promised, strict=True)) if pair[0] != pair[1])
                raise damaged(source, next(blocks_of(stored, block, source.path, [number + wrong])))
            yield at, view
            at += len(view)
    except StoreError as error:
        raise unreadable(source, source.path, error) from error


def _whole_blocks(shares: Sequence[Share], start: int, stop: int) -> tuple[Source, int] | None:
    """Return the source that has all of the bytes [start, stop) as whole blocks of its own, and at which of its bytes."""
    for share in shares:
        source = share.source
        if share.flat and share.start <= start < stop <= share.stop and not source.stored.runs:
            first = share.at + start - share.start
            last = first + stop - start
            whole = first % source.block == 0 and (last % source.block == 0 or last == source.stored.nbytes)
            return (source, first) if whole else None
    return None


def _copy(store: Reader, source: Source, first: int, target: memoryview) -> None:
    """Put a stored box's bytes from ``first`` on into ``target``; blocks that are wanted in part go through a buffer."""
    block, last = source.block, first + len(target)
    numbers = range(first // block, -(-last // block))
    for run in runs(blocks_of(source.stored, block, source.path, numbers)):
        begin = run[0].number * block
        end = begin + run_nbytes(run)
        if first <= begin and end <= last:
            read_checked(store, source, run, target[begin - first : end - first])
            continue
        with POOL.lend() as buffer:
            read_checked(store, source, run, buffer)
            low, high = max(begin, first), min(end, last)
            target[low - first : high - first] = buffer[low - begin : high - begin]
