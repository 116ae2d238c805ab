"""Reading boxes of a committed checkpoint into live tensors; every byte that is used is verified first.

A wanted box is intersected with the saved boxes of the shards that can hold it. The unit of reading is the block:
one whose bytes go to one contiguous place is read straight into the tensor and hashed there, any other is read into
a scratch buffer, hashed, and scattered. Nothing is gathered, and no rank reads for another.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from distckpt.boxes import Box, flat_range_to_boxes, is_flat_range
from distckpt.dcp.leaves import byte_view, torch_dtype
from distckpt.dcp.parallel import run_all
from distckpt.errors import IncompatibleState, ShardError, StoreError
from distckpt.format import digest as digests
from distckpt.format.dtypes import itemsize
from distckpt.format.manifest import Manifest
from distckpt.format.runs import HINT
from distckpt.format.shard import StoredBox
from distckpt.format.shard_index import ShardIndex
from distckpt.storage.base import Store

REQUEST = 8 << 20
"""Bytes that one request reads at most; neighbouring blocks are joined up to this size."""
GAP = 256 << 10
"""Blocks of one file with at most this many unwanted bytes between them are read in one request."""


@dataclass(frozen=True, slots=True)
class Want:
    """A box of a saved tensor and the tensor (any device, any strides, of ``box.sizes``) to put it in."""

    fqn: str
    box: Box
    target: torch.Tensor


@dataclass(slots=True)
class ReadStats:
    """Counters of one read: bytes asked for, bytes read from storage, requests."""

    wanted_bytes: int = 0
    read_bytes: int = 0
    requests: int = 0
    mismatches: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _BlockRead:
    """One block of a stored box and what of it goes where. ``start`` is the offset in the file; ``first`` the element."""

    stored: StoredBox
    rank: int
    path: str
    start: int
    nbytes: int
    digest: str
    first: int
    wants: tuple[Want, ...]


class CheckpointReader:
    """Reads one committed checkpoint into live tensors. Headers are opened as they are needed and kept.

    ``folder`` is the step folder's name on the store. Safe to use from several threads.
    """

    def __init__(self, store: Store, manifest: Manifest, folder: str) -> None:
        self.store = store
        self.manifest = manifest
        self.folder = folder
        self.index = ShardIndex(store, manifest, folder)
        self.stats = ReadStats()
        self._lock = threading.Lock()

    def read(
        self,
        wants: Sequence[Want],
        *,
        threads: int = 4,
        compare: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> ReadStats:
        """Fill every want's target, or with ``compare`` only compare it with storage, bit for bit.

        Differences end up in ``stats.mismatches`` as texts that name FQN and box. Raises ``ShardError`` for
        damage (file, tensor, rank named) and ``IncompatibleState`` where the checkpoint lacks a part of a want.
        """
        by_file: dict[tuple[int, str], list[_BlockRead]] = defaultdict(list)
        for block in self._plan(wants):
            by_file[block.rank, block.path].append(block)
        requests = [(shard, group) for (shard, _), blocks in sorted(by_file.items()) for group in _coalesce(blocks)]

        def run(request: tuple[int, list[_BlockRead]]) -> None:
            nbytes = self._request(*request, compare=compare)
            if progress is not None:
                progress(nbytes)

        run_all(run, requests, threads, "read")
        return self.stats

    def _plan(self, wants: Sequence[Want]) -> Iterator[_BlockRead]:
        """Yield every block that holds a wanted element, once, with all the wants that it serves."""
        by_block: dict[tuple[int, str, int], tuple[StoredBox, list[Want]]] = {}
        for want in wants:
            if tuple(want.target.shape) != want.box.sizes:
                raise IncompatibleState(
                    f"{want.fqn}: target of shape {tuple(want.target.shape)} for box {want.box.sizes}"
                )
            if not want.box.numel:
                continue
            self.stats.wanted_bytes += want.box.numel * want.target.element_size()
            covered = 0
            for shard, stored in self.index.overlapping(want.fqn, want.box):
                common = want.box.intersect(stored.box)
                assert common is not None
                covered += common.numel
                block = self.index.header(shard).block
                for number in _touched_blocks(stored, common, block):
                    by_block.setdefault((shard, stored.key, number), (stored, []))[1].append(want)
            if covered != want.box.numel:
                raise IncompatibleState(
                    f"{want.fqn}: checkpoint at {self.folder} holds {covered} of the {want.box.numel} elements of box "
                    f"{want.box.offsets}+{want.box.sizes}"
                )
        for (shard, _, number), (stored, served) in by_block.items():
            block = self.index.header(shard).block
            path, start = self.index.place(shard, stored, number)
            nbytes = min(block, stored.nbytes - number * block)
            first = number * block // itemsize(stored.dtype)
            yield _BlockRead(stored, shard, path, start, nbytes, stored.digests[number], first, tuple(served))

    def _request(self, shard: int, blocks: list[_BlockRead], *, compare: bool) -> int:
        path, asked = blocks[0].path, ""
        if path != self.index.path(shard):
            asked = f"; {self.index.path(shard)} refers to it. If it is not there, {HINT}"
        start, stop = blocks[0].start, blocks[-1].start + blocks[-1].nbytes
        direct = None if compare else _direct_target(blocks, stop - start)
        buffer = direct if direct is not None else memoryview(bytearray(stop - start))
        try:
            self.store.read_into(path, start, buffer)
        except StoreError as error:
            raise ShardError(
                f"{path}: bytes {start}..{stop} of rank {shard}'s shard cannot be read: {error}{asked}"
            ) from error
        with self._lock:
            self.stats.read_bytes += stop - start
            self.stats.requests += 1
        for block in blocks:
            data = buffer[block.start - start : block.start - start + block.nbytes]
            if digests.digest(data) != block.digest:
                raise ShardError(
                    f"{path}: bytes {block.start}..{block.start + block.nbytes} of {block.stored.fqn} (written by rank "
                    f"{shard}) do not match their digest; the file is damaged: fall back to an older checkpoint{asked}"
                )
            if direct is None:
                self._scatter(block, data, compare)
        return stop - start

    def _scatter(self, block: _BlockRead, data: memoryview, compare: bool) -> None:
        stored = block.stored
        dtype = torch_dtype(stored.dtype)
        values = torch.frombuffer(data, dtype=torch.uint8).view(dtype)
        count = values.numel()
        at = 0
        for region in flat_range_to_boxes(stored.box.sizes, block.first, block.first + count):
            piece = values[at : at + region.numel].reshape(region.sizes)
            at += region.numel
            absolute = region.moved_by(stored.box.offsets)
            for want in block.wants:
                common = absolute.intersect(want.box)
                if common is None:
                    continue
                target = want.target[common.relative_to(want.box.offsets).slices]
                found = piece[common.relative_to(absolute.offsets).slices]
                if not compare:
                    target.copy_(found)
                elif not _same_bits(target, found):
                    with self._lock:
                        self.stats.mismatches.append(f"{want.fqn} box {common.offsets}+{common.sizes}")


def _same_bits(live: torch.Tensor, saved: torch.Tensor) -> bool:
    a, b = live.detach().cpu().contiguous().reshape(-1), saved.to(live.dtype).contiguous().reshape(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _touched_blocks(stored: StoredBox, common: Box, block: int) -> list[int]:
    """Return the numbers of the stored box's blocks that hold elements of ``common``, in order.

    ``common`` is a set of equal runs at equal strides; runs are walked along the slowest dimensions only, so a column
    cut of wide rows skips the blocks between its runs.
    """
    size = itemsize(stored.dtype)
    inner = common.relative_to(stored.box.offsets)
    flat = is_flat_range(inner, stored.box.sizes)
    if flat is not None:
        return list(range(flat[0] * size // block, (flat[1] * size - 1) // block + 1))
    row = stored.nbytes // stored.box.sizes[0]
    sub_shape, sub = stored.box.sizes[1:], Box(inner.offsets[1:], inner.sizes[1:])
    low, high = _span(sub, sub_shape)
    touched: list[int] = []
    for index in range(inner.offsets[0], inner.ends[0]):
        first = (index * row + low * size) // block
        last = (index * row + high * size - 1) // block
        if touched and first <= touched[-1]:
            first = touched[-1] + 1
        touched.extend(range(first, last + 1))
    return touched


def _span(box: Box, shape: Sequence[int]) -> tuple[int, int]:
    low = high = 0
    for offset, end, extent in zip(box.offsets, box.ends, shape, strict=True):
        low, high = low * extent + offset, high * extent + end - 1
    return low, high + 1


def _coalesce(blocks: list[_BlockRead]) -> Iterator[list[_BlockRead]]:
    """Join neighbouring blocks into requests; blocks that can be read in place are joined only with their like."""
    blocks.sort(key=lambda b: b.start)
    current: list[_BlockRead] = []
    for block in blocks:
        if current:
            last = current[-1]
            gap = block.start - (last.start + last.nbytes)
            long = block.start + block.nbytes - current[0].start > REQUEST
            if long or gap > GAP or (gap and _in_place(current)) or not _joinable(current, block):
                yield current
                current = []
        current.append(block)
    if current:
        yield current


def _joinable(current: list[_BlockRead], block: _BlockRead) -> bool:
    """Small blocks join anything; a large one that can go in place must continue the same stored box and want."""
    if block.nbytes < GAP and not (_in_place(current) and current[0].nbytes >= GAP):
        return True
    return current[0].stored is block.stored and current[0].wants == block.wants


def _in_place(blocks: list[_BlockRead]) -> bool:
    return _direct_target(blocks, blocks[-1].start + blocks[-1].nbytes - blocks[0].start) is not None


def _direct_target(blocks: list[_BlockRead], nbytes: int) -> memoryview | None:
    """Return the bytes of the target where a run of blocks of one stored box belongs as it is, or None."""
    first = blocks[0]
    stored = first.stored
    if len(first.wants) != 1 or any(b.stored is not stored or b.wants != first.wants for b in blocks[1:]):
        return None
    size = itemsize(stored.dtype)
    if any(b.start - first.start != (b.first - first.first) * size for b in blocks[1:]):
        return None  # neighbours in the file, but not in the box
    want = first.wants[0]
    target = want.target
    if target.device.type != "cpu" or not target.is_contiguous() or target.dtype != torch_dtype(stored.dtype):
        return None
    common = want.box.intersect(stored.box)
    assert common is not None
    source = is_flat_range(common.relative_to(stored.box.offsets), stored.box.sizes)
    place = is_flat_range(common.relative_to(want.box.offsets), want.box.sizes)
    if source is None or place is None or first.first < source[0] or first.first + nbytes // size > source[1]:
        return None
    begin = (place[0] + first.first - source[0]) * size
    return byte_view(target)[begin : begin + nbytes]
