"""Verified reading of a run of a box's elements into memory that the caller owns; nothing of its size is allocated.

Streamed work (averages, conversions) walks a box from its first element to its last in requests of a few MiB. Where a
stored box is laid out like the wanted one (the same box, or both whole rows), the bytes are one run of the file and are
read where they belong; any other layout is put together from regions.
"""

from __future__ import annotations

from collections.abc import Sequence

from distckpt.boxes import Box, flat_range_to_boxes, is_flat_range
from distckpt.format.box_reader import Reader, Source, blocks_of, fill, read_checked, run_nbytes, runs
from distckpt.format.dtypes import itemsize
from distckpt.storage.direct import POOL


def rows_around(box: Box, first: int, last: int) -> Box:
    """Return the rows of ``box`` that hold its row-major elements [first, last)."""
    if not box.ndim or not box.numel or first >= last:
        return box
    row = box.numel // box.sizes[0]
    return box.rows(first // row, -(-last // row))


def fill_flat(store: Reader, sources: Sequence[Source], box: Box, start: int, stop: int, view: memoryview) -> None:
    """Put bytes [start, stop) of the row-major elements of ``box`` into ``view`` (flat, writable, of that length).

    ``start`` and ``stop`` lie between elements. ``sources`` tile ``box``, or at least the rows that are read; only
    blocks that hold a wanted element are read, and each is verified. Raises ``ShardError`` naming file, tensor and rank.
    """
    found = [(source, _run(source.stored.box, box)) for source in sources]
    if any(run is None for _, run in found):
        size = itemsize(sources[0].stored.dtype)
        at = 0
        for region in flat_range_to_boxes(box.sizes, start // size, stop // size):
            nbytes = region.numel * size
            fill(store, sources, region.moved_by(box.offsets), view[at : at + nbytes], threads=1)
            at += nbytes
        return
    for source, run in found:
        assert run is not None
        size = itemsize(source.stored.dtype)
        ours, theirs, count = (number * size for number in run)
        low, high = max(start, ours), min(stop, ours + count)
        if low < high:
            _copy(store, source, theirs + low - ours, view[low - start : high - start])


def _run(stored: Box, wanted: Box) -> tuple[int, int, int] | None:
    """Return (element of ``wanted``, element of ``stored``, count) of the run that is all they share; None if none is."""
    common = wanted.intersect(stored)
    if common is None:
        return (0, 0, 0)
    ours = is_flat_range(common.relative_to(wanted.offsets), wanted.sizes)
    theirs = is_flat_range(common.relative_to(stored.offsets), stored.sizes)
    return None if ours is None or theirs is None else (ours[0], theirs[0], common.numel)


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
