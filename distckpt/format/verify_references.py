"""Does what a checkpoint refers to hold what it should? Checked by headers alone: the other file, and ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distckpt.errors import ShardError, UnsupportedVersion
from distckpt.format.box_reader import Block, blocks_of, size_or_words, size_problem
from distckpt.format.manifest import Manifest
from distckpt.format.runs import HINT, FileRef
from distckpt.format.shard import ShardHeader
from distckpt.format.shard_header import read_header
from distckpt.storage.base import Store

Finding = tuple[str, str | None, int | None, str]
"""File, tensor, rank, what is wrong."""
_Written = dict[int, tuple[Block, int]]
"""Byte in a file to the block that it has written there, and the file's bytes in a block."""


def check_references(
    store: Store, folder: str, manifest: Manifest, headers: Sequence[ShardHeader | None]
) -> Iterator[Finding]:
    """Yield what is wrong with the files of earlier steps that the shards of a checkpoint refer to.

    Each must be there with its size and header, and must itself hold (not refer to) the same blocks of the same boxes:
    references are one level deep. ``folder`` is the step folder; ``headers[i]`` is None where it cannot be read.
    """
    written: dict[str, _Written] = {}
    files = {file: rank for rank, header in enumerate(headers) if header is not None for file in header.files}
    for file, rank in sorted(files.items()):
        try:
            written[file.path] = _written(store, file)
        except (ShardError, UnsupportedVersion) as error:
            what = str(error).removeprefix(f"{file.path}: ")
            yield file.path, None, rank, f"step {manifest.step} refers to it, but {what}; {HINT}"
    unread = {path for reference in manifest.references for path in reference.paths} - {file.path for file in files}
    for path in sorted(unread) if None in headers else ():  # what the unreadable headers need
        found = size_or_words(store, path)
        if isinstance(found, str):
            yield path, None, None, f"step {manifest.step} refers to it, but it {found}; {HINT}"
    for rank, header in enumerate(headers):
        if header is None or not header.files:
            continue
        shard = f"{folder}/{manifest.shards[rank].path}"
        for stored in header.boxes:
            for block in blocks_of(stored, header.block, shard) if stored.runs else ():
                if block.path != shard and block.path in written:
                    wrong = _wrong(block, header.block, written[block.path])
                    if wrong is not None:
                        yield shard, stored.fqn, rank, f"refers to bytes from {block.start} of {block.path}: {wrong}"
                        break


def _written(store: Store, file: FileRef) -> _Written:
    wrong = size_problem(store, file.path, file.size)
    if wrong is not None:
        raise ShardError(f"{file.path}: it {wrong}")
    header = read_header(store, file.path, file_size=file.size, expect_digest=file.header)
    found: _Written = {}
    for stored in header.boxes:
        for block in blocks_of(stored, header.block, file.path):
            if block.path == file.path:
                found[block.start] = block, header.block
    return found


def _wrong(block: Block, size: int, written: _Written) -> str | None:
    """Say why a block can't be what lies where it points."""
    there, its_size = written.get(block.start, (None, 0))
    if there is None:
        return "no block of that file begins there"
    ours, theirs = block.stored, there.stored
    if (ours.fqn, ours.dtype, ours.global_shape, ours.box) != (
        theirs.fqn,
        theirs.dtype,
        theirs.global_shape,
        theirs.box,
    ):
        return f"a box of {theirs.fqn!r} lies there"
    if (size, block.number, block.digest) != (its_size, there.number, there.digest):
        return "another block, or other bytes, lie there"
    return None
