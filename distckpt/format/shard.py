"""One shard file: what it holds, where each box goes, and the header that says so (shard_header.py reads it).

A shard is a safetensors file. Its JSON header is padded with spaces so that data starts on a 4096-byte
boundary. Its ``__metadata__`` carries ``DCP_SHARDING_INFO`` as torch's ``HuggingFaceStorageWriter`` writes it
(torch/distributed/checkpoint/filesystem.py), and ``distckpt``: FQN, global shape, offsets, logical dtype and
block digests of every box, and this rank's objects. Of a box that is partly in earlier checkpoints only the changed
blocks are in the file, packed into one U8 entry at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from distckpt.boxes import Box
from distckpt.errors import SaveFailed, UnserializableState
from distckpt.format.digest import BLOCK, block_count
from distckpt.format.limits import MAX_WORLD, shown
from distckpt.format.placing import Piece, Placed, offsets_of, place
from distckpt.format.plain_json import canonical, strict_loads
from distckpt.format.runs import FileRef, Run, run_bytes
from distckpt.format.shard_json import header_json, header_length
from distckpt.heap import no_collections

ALIGNMENT: Final = 4096
"""Data starts at a multiple of this, for direct I/O."""
MAX_HEADER: Final = 100_000_000
"""Longest JSON header in bytes, the safetensors library's own limit."""
MAX_SAVE_ID: Final = 256
MIN_BLOCK: Final = 4096
MAX_BLOCK: Final = 8 << 20
PACKED: Final = "distckpt.blocks"
"""Key of the entry that holds the changed blocks of partly reused boxes (a number follows where a tensor has it)."""


class StoredBox(msgspec.Struct, frozen=True, gc=False):
    """One box in a shard: ``nbytes`` bytes from absolute file offset ``start``, a digest per block.

    A box that is not in one piece in this file has ``runs`` instead, which say where its blocks are, and ``start`` -1.
    """

    key: str
    fqn: str
    dtype: str
    global_shape: tuple[int, ...]
    box: Box
    start: int
    nbytes: int
    digests: tuple[str, ...]
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """A parsed header; ``boxes`` in file order, then those with blocks elsewhere.

    ``size`` is the whole file's in bytes, ``nbytes`` the header's with its 8 length bytes: data starts there.
    ``files`` are the files of earlier checkpoints that hold blocks of its boxes.
    """

    rank: int
    world_size: int
    save_id: str
    block: int
    boxes: tuple[StoredBox, ...]
    objects: dict[str, Any]
    size: int
    nbytes: int
    files: tuple[FileRef, ...] = ()


@dataclass(frozen=True, slots=True)
class Reuse:
    """What of a shard's pieces is not written because it lies in ``files`` already.

    ``runs`` run parallel to the pieces: none for a piece that is written whole, else where its blocks are or (file None)
    that they are written.
    """

    runs: tuple[tuple[Run, ...], ...]
    files: tuple[FileRef, ...]


class Extent(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``start:stop`` of one piece that follow each other in the file."""

    piece: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Where everything goes in a shard that is not written yet.

    ``pieces``, ``keys``, ``starts`` (absolute file offsets), ``nbytes`` and ``runs`` run parallel, in the order in
    which the pieces were given; a piece with runs has start -1. ``order`` lists the others' indices as they follow each
    other in the file, ``extents`` all that is written, back to back from ``data_start``.
    """

    placed: Placed
    starts: tuple[int, ...]
    order: tuple[int, ...]
    data_start: int
    size: int
    block: int
    rank: int
    world_size: int
    save_id: str
    objects: bytes
    """Canonical JSON, so that what the caller changes later does not change the header's length."""
    runs: tuple[tuple[Run, ...], ...] = ()
    files: tuple[FileRef, ...] = ()
    extents: tuple[Extent, ...] = ()
    packed: tuple[str, int] | None = None
    """Key and bytes of the entry that holds the extents of pieces with runs; it is the last in the file."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The boxes that are written."""
        return self.placed.pieces

    @property
    def keys(self) -> tuple[str, ...]:
        """Their names in the file."""
        return self.placed.keys

    @property
    def nbytes(self) -> tuple[int, ...]:
        """Their bytes."""
        return self.placed.nbytes


@no_collections()
def plan_shard(
    pieces: Sequence[Piece] | Placed,
    *,
    rank: int,
    world_size: int,
    save_id: str,
    objects: Mapping[str, Any],
    block: int = BLOCK,
    reuse: Reuse | None = None,
) -> ShardPlan:
    """Lay out a shard; a pure function of its arguments, so equal input gives equal offsets on any rank.

    ``objects`` are plain JSON (``typed_json.encode``); ``block`` is the number of bytes per digest, a multiple of 16 in
    [4096, 8 MiB]. ``reuse`` says what lies in earlier checkpoints and is left out.

    Raises as ``place`` does, and ``UnserializableState`` (object that can't be stored), ``SaveFailed`` (header over
    100 MB), ``ValueError`` (bad rank or block).
    """
    check_block(block)
    if not 0 <= rank < world_size <= MAX_WORLD:
        raise ValueError(f"rank {rank} of {world_size} (at most {MAX_WORLD} ranks)")
    if not len(save_id) <= MAX_SAVE_ID or not save_id.isascii():
        raise ValueError(f"save id {shown(save_id)}: at most {MAX_SAVE_ID} ASCII characters")
    placed = place(pieces)
    keys, nbytes, order, relative = placed.keys, placed.nbytes, placed.order, placed.offsets
    runs = reuse.runs if reuse is not None else ((),) * len(keys)
    if reuse is not None:
        order = tuple(i for i in order if not runs[i])
        relative = offsets_of(order, nbytes)
    whole = sum(nbytes[i] for i in order)
    own = [
        Extent(i, run.first * block, run.first * block + run_bytes(run, nbytes[i], block))
        for i, parts in enumerate(runs)
        for run in parts
        if run.path is None
    ]
    packed = sum(extent.stop - extent.start for extent in own)
    end = whole + packed
    draft = ShardPlan(
        placed=placed,
        starts=relative,
        order=order,
        data_start=0,
        size=end,
        block=block,
        rank=rank,
        world_size=world_size,
        save_id=save_id,
        objects=_objects_json(objects),
        runs=tuple(runs),
        files=reuse.files if reuse is not None else (),
        extents=(*(Extent(i, 0, nbytes[i]) for i in order if nbytes[i]), *own),
        packed=(_free_key(PACKED, keys), packed) if packed else None,
    )
    data_start = -(-(8 + header_length(draft)) // ALIGNMENT) * ALIGNMENT
    if data_start - 8 > MAX_HEADER:
        raise SaveFailed(
            f"rank {rank}: header of {data_start} bytes for {len(keys)} boxes, "
            f"{sum(block_count(size, block) for size in nbytes)} digests and {len(draft.objects)} bytes of objects; "
            f"safetensors allows {MAX_HEADER}. "
            f"Use larger blocks than {block} bytes (up to {MAX_BLOCK}) or store large objects as tensors"
        )
    starts = tuple(data_start + at if at >= 0 else -1 for at in relative)
    own_runs = _placed_runs(runs, nbytes, data_start + whole, block)
    return replace(draft, starts=starts, runs=own_runs, data_start=data_start, size=data_start + end)


def _placed_runs(
    runs: Sequence[Sequence[Run]], nbytes: Sequence[int], start: int, block: int
) -> tuple[tuple[Run, ...], ...]:
    """Give the shard's own runs their bytes in the file, back to back from ``start``."""
    placed = []
    for parts, size in zip(runs, nbytes, strict=True):
        found = []
        for run in parts:
            if run.path is None:
                found.append(Run(run.first, run.count, None, start))
                start += run_bytes(run, size, block)
            else:
                found.append(run)
        placed.append(tuple(found))
    return tuple(placed)


def stored_boxes(plan: ShardPlan, digests: Sequence[Sequence[str]]) -> tuple[StoredBox, ...]:
    """Return what a reader of the planned shard finds, in the order of the pieces."""
    return tuple(
        StoredBox(key, piece.fqn, piece.dtype, piece.global_shape, piece.box, start, size, tuple(found), runs)
        for key, piece, start, size, found, runs in zip(
            plan.keys, plan.pieces, plan.starts, plan.nbytes, digests, plan.runs, strict=True
        )
    )


@no_collections()
def render_header(plan: ShardPlan, digests: Sequence[Sequence[str]]) -> bytes:
    """Return the file's first ``plan.data_start`` bytes. ``digests[i]`` belongs to ``plan.pieces[i]``.

    Raises ``ValueError`` if a piece has another number of digests than blocks, or one isn't 32 digits long.
    """
    for piece, size, found in zip(plan.pieces, plan.nbytes, digests, strict=True):
        wanted = block_count(size, plan.block)
        if len(found) != wanted:
            raise ValueError(f"{shown(piece.fqn)}: {len(found)} digests for {wanted} blocks")
    text = header_json(plan, digests)
    length = plan.data_start - 8
    if not length - ALIGNMENT < len(text) <= length:
        raise ValueError(f"header of {len(text)} bytes where {length} were planned: digests are 32 hex digits")
    return length.to_bytes(8, "little") + text.ljust(length, b" ")


def _objects_json(objects: Mapping[str, Any]) -> bytes:
    text = canonical(dict(objects))
    # Parsed as a reader will (nesting, long integers), one level down as in the header.
    wrapped = b'{"objects":' + text + b"}"
    strict_loads(wrapped, where="objects", max_bytes=len(wrapped), error=UnserializableState)
    return text


def check_block(block: int) -> None:
    """Raise ``ValueError`` unless ``block`` can be a digest's number of bytes."""
    if not MIN_BLOCK <= block <= MAX_BLOCK or block % 16:
        raise ValueError(f"block of {block} bytes: must be a multiple of 16 in [{MIN_BLOCK}, {MAX_BLOCK}]")


def _free_key(key: str, taken: Sequence[str]) -> str:
    """Return the key, or with a number after it that makes it differ from those taken."""
    every, found, number = set(taken), key, 0
    while found in every:
        number += 1
        found = f"{key}#{number}"
    return found
