"""Verified reading of stored boxes into plain memory, block by block; no byte is handed out unverified.

Used by offline reading and by ``verify``. Everything here is bytes: an element is ``itemsize`` bytes,
whatever its dtype, so no tensor library is needed to cut, verify and assemble tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from distckpt.boxes import Box, flat_range_to_boxes, is_flat_range, tiling_error
from distckpt.errors import NotFound, ShardError, StoreError
from distckpt.format.digest import digest
from distckpt.format.dtypes import itemsize
from distckpt.format.limits import shown
from distckpt.format.manifest import Manifest
from distckpt.format.runs import HINT, place, run_bytes
from distckpt.format.shard import ShardHeader, StoredBox
from distckpt.format.shard_header import read_header
from distckpt.storage.base import Store

REQUEST: Final = 8 << 20
"""Most bytes that one request reads; memory stays within this times the number of threads."""


class Reader(Protocol):
    """A store, or what reads ahead of one (``format/read_ahead.py``)."""

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """See ``Store.read_into``."""


@dataclass(frozen=True, slots=True)
class Block:
    """One digested run of bytes of a stored box: ``nbytes`` bytes from absolute file offset ``start`` of ``path``."""

    stored: StoredBox
    number: int
    path: str
    start: int
    nbytes: int

    @property
    def digest(self) -> str:
        """The digest that the shard's header promises."""
        return self.stored.digests[self.number]


@dataclass(frozen=True, slots=True)
class Source:
    """A stored box and the shard that lists it: its name on the store, its rank, bytes per digest."""

    path: str
    rank: int
    block: int
    stored: StoredBox


def open_shard(store: Store, manifest: Manifest, folder: str, index: int) -> ShardHeader:
    """Check one shard of a checkpoint (there, size, header digest, whose it is) and return its header.

    ``folder`` is the step folder. Raises ``ShardError`` naming the file and the rank.
    """
    entry, path = manifest.shards[index], f"{folder}/{manifest.shards[index].path}"
    wrong = size_problem(store, path, entry.size)
    if wrong is not None:
        raise ShardError(f"{path}: shard of rank {index} {wrong}; load an older checkpoint")
    header = read_header(store, path, file_size=entry.size, expect_digest=entry.header)
    if header.save_id != manifest.save_id or header.rank != index:
        raise ShardError(
            f"{path}: this is rank {header.rank}'s shard of save {shown(header.save_id)}, not rank "
            f"{index}'s of {shown(manifest.save_id)}; shards were mixed up"
        )
    for file in header.files:
        if not any(reference.names(file.path) for reference in manifest.references):
            raise ShardError(
                f"{path}: refers to {file.path}, which the manifest does not name; it is damaged or hostile"
            )
    return header


def missing_references(store: Store, manifest: Manifest) -> dict[str, str]:
    """Return what is wrong, by size alone, with the files of earlier steps that a checkpoint needs: name to words.

    The manifest has the size of an attempt's files together: where it is another, all of them are to blame.
    """
    found: dict[str, str] = {}
    for reference in manifest.references:
        said = f"step {manifest.step} refers to it"
        sizes: list[int] = []
        with ThreadPoolExecutor(16, thread_name_prefix="distckpt-check") as pool:
            for path, size in zip(
                reference.paths, pool.map(partial(size_or_words, store), reference.paths), strict=True
            ):
                if isinstance(size, str):
                    found[path] = f"{said}, but it {size}; {HINT}"
                else:
                    sizes.append(size)
        if len(sizes) == len(reference.paths) and sum(sizes) != reference.size:
            what = f"the files here have {sum(sizes)} bytes together, the manifest says {reference.size}"
            found[reference.attempt if len(sizes) > 1 else reference.paths[0]] = f"{said}: {what}; {HINT}"
    return found


def size_or_words(store: Store, path: str) -> int | str:
    """Return a file's size, or why it has none."""
    try:
        return store.size(path)
    except NotFound:
        return "is missing or not a regular file"
    except StoreError as error:
        return f"cannot be read: {error}"


def size_problem(store: Store, path: str, size: int) -> str | None:
    """Say why a shard, by its size alone, cannot be the committed file; None if it can."""
    found = size_or_words(store, path)
    if isinstance(found, str):
        return found
    return None if found == size else f"has {found} bytes, the manifest says {size}"


def blocks_of(stored: StoredBox, block: int, shard: str, numbers: Iterable[int] | None = None) -> Iterator[Block]:
    """Yield the blocks of a stored box (only those numbered) in order, wherever they lie.

    ``block`` is the header's block size, ``shard`` the name on the store of the shard that lists the box.
    """
    for number in range(len(stored.digests)) if numbers is None else numbers:
        at = number * block
        path, start = place(stored.runs, number, block) if stored.runs else (None, stored.start + at)
        yield Block(stored, number, shard if path is None else path, start, min(block, stored.nbytes - at))


def extents_of(source: Source) -> list[tuple[str, int, int]]:
    """Return where a stored box lies: (name on the store, first byte, bytes) of each file's part, in the box's order."""
    stored = source.stored
    if not stored.runs:
        return [(source.path, stored.start, stored.nbytes)]
    return [(run.path or source.path, run.start, run_bytes(run, stored.nbytes, source.block)) for run in stored.runs]


def runs(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Join blocks that follow each other without a gap, in the file and in their box, into requests of at most 8 MiB."""
    run: list[Block] = []
    total = 0
    for block in blocks:
        if run and (not _follows(run[-1], block) or total + block.nbytes > REQUEST):
            yield run
            run, total = [], 0
        run.append(block)
        total += block.nbytes
    if run:
        yield run


def _follows(last: Block, block: Block) -> bool:
    if block.path != last.path or block.start != last.start + last.nbytes:
        return False
    return block.stored is not last.stored or block.number == last.number + 1


def read_run(store: Reader, run: Sequence[Block], buffer: memoryview) -> list[Block]:
    """Read a run into the start of ``buffer`` and return its damaged blocks; may raise ``StoreError``."""
    start, stop = run[0].start, run[-1].start + run[-1].nbytes
    view = buffer[: stop - start]
    store.read_into(run[0].path, start, view)
    return [b for b in run if digest(view[b.start - start : b.start - start + b.nbytes]) != b.digest]


def run_nbytes(run: Sequence[Block]) -> int:
    """Return how many bytes a run spans."""
    return run[-1].start + run[-1].nbytes - run[0].start


def sources_tile(fqn: str, sources: Sequence[Source], box: Box, folder: str) -> None:
    """Raise ``ShardError`` unless the sources hold every element of ``box`` exactly once."""
    parts = [part.relative_to(box.offsets) for s in sources if (part := s.stored.box.intersect(box)) is not None]
    wrong = tiling_error(box.sizes, parts)
    if wrong is not None:
        raise ShardError(f"{folder}: the shards do not hold tensor {shown(fqn)} exactly once: {wrong}; it is damaged")


def fill(store: Reader, sources: Sequence[Source], box: Box, destination: memoryview, *, threads: int = 4) -> None:
    """Fill ``destination`` (flat writable bytes of a row-major tensor of ``box.sizes``) from the sources.

    Only blocks that hold elements of ``box`` are read, each is verified, at most 8 MiB a thread are held
    besides. The sources must tile the box (``sources_tile``). Raises ``ShardError`` naming file, tensor and
    rank; what is in ``destination`` then is not to be used.
    """
    work = [(source, run) for source in sources for run in wanted_runs(source, box)]
    if threads <= 1 or len(work) <= 1:
        for source, run in work:
            _fill_run(store, source, run, box, destination)
        return
    with ThreadPoolExecutor(min(threads, len(work)), thread_name_prefix="distckpt-read") as pool:
        futures = [pool.submit(_fill_run, store, source, run, box, destination) for source, run in work]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


def wanted_runs(source: Source, box: Box) -> Iterator[list[Block]]:
    """Yield the runs of blocks of a source that hold elements of ``box``."""
    stored, common = source.stored, source.stored.box.intersect(box)
    if common is None:
        return
    local, size = common.relative_to(stored.box.offsets), itemsize(stored.dtype)
    flat = is_flat_range(local, stored.box.sizes)
    if flat is not None:
        numbers: Iterable[int] = range(flat[0] * size // source.block, (flat[1] * size - 1) // source.block + 1)
    else:
        numbers = (
            number
            for number in range(len(stored.digests))
            if any(region.intersect(local) for _, region in _regions(source, number))
        )
    yield from runs(blocks_of(stored, source.block, source.path, numbers))


def _regions(source: Source, number: int) -> Iterator[tuple[int, Box]]:
    """Cut a block into (byte offset in the block, box relative to the stored box)."""
    stored, size = source.stored, itemsize(source.stored.dtype)
    first = number * source.block // size
    last = min((number + 1) * source.block, stored.nbytes) // size
    at = 0
    for region in flat_range_to_boxes(stored.box.sizes, first, last):
        yield at, region
        at += region.numel * size


def _fill_run(store: Reader, source: Source, run: list[Block], box: Box, destination: memoryview) -> None:
    place = _place_of_run(source, run, box)
    nbytes = run_nbytes(run)
    view = memoryview(bytearray(nbytes)) if place is None else destination[place : place + nbytes]
    read_checked(store, source, run, view)
    if place is None:
        _scatter(source, run, box, view, destination)


def read_checked(store: Reader, source: Source, run: Sequence[Block], view: memoryview) -> None:
    """Read a run of a source's blocks into the start of ``view``; ``ShardError`` if it cannot be, or is damaged."""
    try:
        bad = read_run(store, run, view)
    except StoreError as error:
        raise unreadable(source, run[0].path, error) from error
    if bad:
        raise damaged(source, bad[0])


def unreadable(source: Source, path: str, error: StoreError) -> ShardError:
    """Return the error that bytes of a source, which lie in ``path``, cannot be read."""
    return ShardError(
        f"{path}: tensor {shown(source.stored.fqn)} of rank {source.rank} cannot be read: {error}{_referrer(source, path)}"
    )


def damaged(source: Source, block: Block) -> ShardError:
    """Return the error that a block of a source is not what was written."""
    return ShardError(
        f"{block.path}: bytes [{block.start}, {block.start + block.nbytes}) of {shown(block.stored.fqn)}, written by "
        f"rank {source.rank}, do not match their digest; the file is damaged{_referrer(source, block.path)}"
    )


def _referrer(source: Source, path: str) -> str:
    """Say which shard wanted bytes of another file."""
    return "" if path == source.path else f"; {source.path} refers to it. If it is not there, {HINT}"


def _place_of_run(source: Source, run: list[Block], box: Box) -> int | None:
    """Return the destination's byte where the whole run belongs as it is; None if it must be scattered."""
    stored, common = source.stored, source.stored.box.intersect(box)
    assert common is not None
    inner = is_flat_range(common.relative_to(stored.box.offsets), stored.box.sizes)
    outer = is_flat_range(common.relative_to(box.offsets), box.sizes)
    if inner is None or outer is None:
        return None
    size = itemsize(stored.dtype)
    begin = run[0].number * source.block
    if begin < inner[0] * size or begin + run_nbytes(run) > inner[1] * size:
        return None
    return begin + (outer[0] - inner[0]) * size


def _scatter(source: Source, run: list[Block], box: Box, data: memoryview, destination: memoryview) -> None:
    import numpy as np

    stored, size = source.stored, itemsize(source.stored.dtype)
    target = np.frombuffer(destination, np.uint8).reshape(*box.sizes, size)
    for block in run:
        begin = block.start - run[0].start
        for at, region in _regions(source, block.number):
            absolute = region.moved_by(stored.box.offsets)
            common = absolute.intersect(box)
            if common is None:
                continue
            octets = np.frombuffer(data, np.uint8, region.numel * size, begin + at).reshape(*region.sizes, size)
            target[common.relative_to(box.offsets).slices] = octets[common.relative_to(absolute.offsets).slices]
