"""From wanted boxes to read requests: which bytes of which shard, and where they go. Nothing is read but headers.

The unit of verification is the block, the unit of work a run: blocks of one stored box that follow each other. Runs are
packed into requests of up to ``SPAN`` in file order, whatever tensors they belong to, so that a thousand small
tensors cost no more requests than a large one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from operator import attrgetter, itemgetter

import msgspec
import torch

from distckpt.boxes import Box, is_flat_range
from distckpt.dcp.buffers import is_plain_memory
from distckpt.dcp.leaves import torch_dtype
from distckpt.errors import IncompatibleState
from distckpt.format.dtypes import itemsize
from distckpt.format.runs import cut, run_bytes
from distckpt.format.shard import StoredBox
from distckpt.format.shard_index import ShardIndex

SPAN = 4 << 20
"""Bytes from a request's first to its last, unless one block is longer.

Four to six direct reads of 4 MiB at a time were a few percent faster than of 2 MiB on the devices tried, and cost less of the
processor; of 8 MiB what was read is no more in its cache when it is hashed and copied on.
"""
WHOLE, PART, CUT = range(3)
"""What a rank wants of a tensor: all of it, elements of a stored box that lie together, or a part of each of its rows."""
KINDS = (WHOLE, PART, CUT)
GAP = 64 << 10
"""Runs of one file with at most this many unwanted bytes between them are read in one request, if kinds are not apart:
then others may want them."""


class Want(msgspec.Struct, frozen=True, eq=False):
    """A box of a saved tensor and the tensor (any device, any strides, of ``box.sizes``) to put it in."""

    fqn: str
    box: Box
    target: torch.Tensor


class Use(msgspec.Struct, eq=False):
    """What one want takes of a stored box: ``common``, in the tensor's coordinates.

    Bytes ``[begin, end)`` of the stored box where they lie together there, else ``end`` is 0. They go to memory at
    ``address`` as they are, or it is 0: they lie apart in the target, or it has another dtype or is not plain memory.
    """

    want: Want
    common: Box
    begin: int = 0
    end: int = 0
    address: int = 0

    def target_of(self, byte: int) -> int:
        """Return the address of this byte of the stored box, which goes to memory as it is."""
        return self.address + byte - self.begin


class Run(msgspec.Struct, eq=False):
    """Blocks ``first`` up to ``last`` of a stored box: ``nbytes`` bytes from ``start`` of ``path``, and who takes them."""

    path: str
    stored: StoredBox
    uses: list[Use]
    first: int
    last: int
    start: int
    nbytes: int
    block: int

    @property
    def in_place(self) -> bool:
        """Whether all of it goes to one place in memory, as it is."""
        use, begin = self.uses[0], self.first * self.block
        return len(self.uses) == 1 and use.address != 0 and use.begin <= begin and begin + self.nbytes <= use.end


class Request(msgspec.Struct, eq=False):
    """Runs of one file that one shard's boxes need, in file order, read at once."""

    shard: int
    runs: list[Run]
    kind: int = WHOLE

    @property
    def path(self) -> str:
        """Name of the file on the store."""
        return self.runs[0].path

    @property
    def start(self) -> int:
        """File offset of the first byte."""
        return self.runs[0].start

    @property
    def stop(self) -> int:
        """File offset past the last byte."""
        return self.runs[-1].start + self.runs[-1].nbytes

    @property
    def in_place(self) -> bool:
        """Whether every byte from start to stop goes to its place in memory as it is."""
        return all(run.in_place for run in self.runs) and sum(r.nbytes for r in self.runs) == self.stop - self.start


def plan_requests(index: ShardIndex, wants: Sequence[Want], *, apart: bool = False) -> list[Request]:
    """Return the requests that fill every want; each block is in one of them, however many wants it serves.

    ``apart``: a request is of one kind, so that ranks can read together what they want alike, whatever else each
    wants: weights that all hold beside optimizer state that is partitioned, columns of matrices beside parts of
    vectors. Else all are ``WHOLE``. Opens the headers of the shards that can hold a wanted box, no others. Raises
    ``IncompatibleState`` where the checkpoint lacks a part of a want or the target has another shape.
    """
    found: dict[tuple[int, int, str], tuple[StoredBox, list[Use]]] = {}
    for want in wants:
        box = want.box
        if want.target.shape != box.sizes:
            raise IncompatibleState(f"{want.fqn}: target of shape {tuple(want.target.shape)} for box {want.box.sizes}")
        covered = 0
        for shard, stored in index.overlapping(want.fqn, box):
            use = _use(want, stored)
            covered += use.common.numel
            key = (shard, stored.start, stored.key)
            if key in found:
                found[key][1].append(use)
            else:
                found[key] = (stored, [use])
        if covered != box.numel:
            raise IncompatibleState(
                f"{want.fqn}: checkpoint at {index.folder} holds {covered} of the {want.box.numel} elements of box "
                f"{want.box.offsets}+{want.box.sizes}"
            )
    by_file: dict[tuple[int, int, str], list[Run]] = {}
    shards = {shard: (index.header(shard).block, index.path(shard)) for shard, _, _ in found}
    for (shard, _, _), (stored, uses) in sorted(found.items(), key=itemgetter(0)):
        kind = min(map(_kind, uses, itertools.repeat(stored))) if apart else WHOLE
        for run in _runs(stored, uses, kind, *shards[shard]):
            by_file.setdefault((kind, shard, run.path), []).append(run)
    for every in by_file.values():
        every.sort(key=attrgetter("start"))
    gap = 0 if apart else GAP
    return [
        Request(shard, runs, kind) for (kind, shard, _), every in by_file.items() for runs in _packed(every, SPAN, gap)
    ]


def _use(want: Want, stored: StoredBox) -> Use:
    target = want.target
    plain = target.dtype == torch_dtype(stored.dtype) and is_plain_memory(target)
    if want.box == stored.box:
        return Use(want, want.box, 0, stored.nbytes, target.data_ptr() if plain else 0)
    size = itemsize(stored.dtype)
    common = want.box.intersect(stored.box)
    assert common is not None
    source = is_flat_range(common.relative_to(stored.box.offsets), stored.box.sizes)
    place = is_flat_range(common.relative_to(want.box.offsets), want.box.sizes)
    if source is None:
        return Use(want, common)
    address = target.data_ptr() + place[0] * size if plain and place is not None else 0
    return Use(want, common, source[0] * size, source[1] * size, address)


def _kind(use: Use, stored: StoredBox) -> int:
    if use.want.box.sizes == stored.global_shape:
        return WHOLE
    return PART if use.end else CUT


def _runs(stored: StoredBox, uses: list[Use], kind: int, block: int, shard: str) -> Iterator[Run]:
    """Yield the runs of a stored box's blocks that hold wanted elements, in order; ``shard`` is the file that lists it."""
    spans = _union([span for use in uses for span in _touched(stored, use, block)])
    if kind == CUT:
        spans = _widened(spans, -(-stored.nbytes // block))
    for first, last in spans:
        if not stored.runs:
            nbytes = min(last * block, stored.nbytes) - first * block
            yield Run(shard, stored, uses, first, last, stored.start + first * block, nbytes, block)
        for part in cut(stored.runs, first, last, block):
            nbytes = run_bytes(part, stored.nbytes, block)
            yield Run(part.path or shard, stored, uses, part.first, part.first + part.count, part.start, nbytes, block)


def _widened(spans: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Return all ``count`` blocks where one at each end at most is missing; ``spans`` are in order and apart.

    Ranks with other columns of the same rows miss another one; with it they want the same and can read together.
    """
    if len(spans) == 1 and spans[0][0] <= 1 and spans[0][1] >= count - 1:
        return [(0, count)]
    return spans


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge half-open spans that touch or overlap."""
    if len(spans) == 1:
        return spans
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def _touched(stored: StoredBox, use: Use, block: int) -> list[tuple[int, int]]:
    """Return the spans of the stored box's blocks that hold elements of the use, in order.

    A box is a set of equal runs of elements at equal strides; they are walked along the slowest dimension only, so a
    column cut of wide rows skips the blocks between its runs.
    """
    if use.end:
        return [(use.begin // block, (use.end - 1) // block + 1)]
    size = itemsize(stored.dtype)
    inner = use.common.relative_to(stored.box.offsets)
    row = stored.nbytes // stored.box.sizes[0]
    low, high = _span(Box(inner.offsets[1:], inner.sizes[1:]), stored.box.sizes[1:])
    if row - (high - low) * size < block:  # no room for a block between one row's elements and the next's
        start, end = inner.offsets[0] * row + low * size, (inner.ends[0] - 1) * row + high * size
        return [(start // block, (end - 1) // block + 1)]
    return _union(
        [
            ((index * row + low * size) // block, (index * row + high * size - 1) // block + 1)
            for index in range(inner.offsets[0], inner.ends[0])
        ]
    )


def _span(box: Box, shape: Sequence[int]) -> tuple[int, int]:
    low = high = 0
    for offset, end, extent in zip(box.offsets, box.ends, shape, strict=True):
        low, high = low * extent + offset, high * extent + end - 1
    return low, high + 1


def _packed(runs: Sequence[Run], most: int, most_gap: int) -> Iterator[list[Run]]:
    """Pack runs of one file, in file order, into requests; long runs are cut between blocks."""
    request: list[Run] = []
    for run in runs:
        rest: Run | None = run
        while rest is not None:
            begin = request[0].start if request else rest.start
            gap = rest.start - (request[-1].start + request[-1].nbytes) if request else 0
            if request and (gap > most_gap or begin + most - rest.start < min(rest.nbytes, rest.block)):
                yield request
                request = []
                continue
            head, rest = _cut(rest, begin + most - rest.start)
            request.append(head)
    if request:
        yield request


def _cut(run: Run, room: int) -> tuple[Run, Run | None]:
    """Cut a run where its blocks no longer fit into ``room`` bytes; one block is never cut."""
    if run.nbytes <= max(room, run.block):
        return run, None
    count = max(1, room // run.block)
    nbytes = count * run.block
    head = Run(run.path, run.stored, run.uses, run.first, run.first + count, run.start, nbytes, run.block)
    start, left = run.start + nbytes, run.nbytes - nbytes
    return head, Run(run.path, run.stored, run.uses, head.last, run.last, start, left, run.block)
