"""What a shard's header must mean, after its types are right: boxes that fill the file, names, sizes, references.

Nothing here allocates by what a number claims: every loop runs over what stands in the header.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from distckpt.boxes import Box
from distckpt.errors import ShardError
from distckpt.format.digest import are_digests, block_count, is_digest
from distckpt.format.dtypes import ITEMSIZES, stored_form
from distckpt.format.limits import MAX_WORLD, name_problem, shape_problem, shown
from distckpt.format.runs import MAX_FILES, FileRef, Run, file_problem, overlap, run_bytes
from distckpt.format.shard import MAX_SAVE_ID, ShardHeader, StoredBox, check_block

if TYPE_CHECKING:
    from distckpt.format.shard_header import Entry, Meta, Reused, Tensor


def checked_header(entries: dict[str, Entry], meta: Meta, nbytes: int, file_size: int, where: str) -> ShardHeader:
    """Return the header whose two lists these are; ``nbytes`` is its length, ``where`` names the file in errors.

    Raises ``ShardError`` naming the field for what can't be true.
    """
    at = f"{where}: $.__metadata__.distckpt"
    _check_meta(meta, at)
    files = _files(meta, at)
    described = {*meta.tensors} if meta.packed is None else {*meta.tensors, meta.packed}
    if entries.keys() != described or meta.packed in meta.tensors:
        odd = min(entries.keys() ^ described, default=meta.packed or "")
        raise ShardError(f"{where}: $[{shown(odd)}]: the tensor is in one of the header's two lists only")
    boxes, packed = _boxes(entries, meta, nbytes, file_size, where)
    reused = _reused(meta, files, packed, where)
    return ShardHeader(
        meta.rank, meta.world_size, meta.save_id, meta.block, (*boxes, *reused), meta.objects, file_size, nbytes, files
    )


def _check_meta(meta: Meta, at: str) -> None:
    if not meta.rank < meta.world_size <= MAX_WORLD:
        raise ShardError(f"{at}: rank {meta.rank} of {meta.world_size} ranks (at most {MAX_WORLD})")
    if len(meta.save_id) > MAX_SAVE_ID:
        raise ShardError(f"{at}.save_id has {len(meta.save_id)} characters (at most {MAX_SAVE_ID})")
    try:
        check_block(meta.block)
    except ValueError as cause:
        raise ShardError(f"{at}.block: {cause}") from cause


def _boxes(
    entries: dict[str, Entry], meta: Meta, nbytes: int, file_size: int, where: str
) -> tuple[list[StoredBox], tuple[int, int]]:
    """Return the boxes by file offset, and (first byte, past the last) of the packed blocks.

    They were checked to fill the file from the header to its end.
    """
    end, packed = 0, (nbytes, nbytes)
    boxes: list[StoredBox] = []
    whole: dict[str, tuple[str, tuple[int, ...]]] = {}
    alike: dict[object, Box] = {}
    for key, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end or stop < start:
            what = "overlap the tensor before" if start < end else "leave a hole" if start > end else "run back"
            at = f"{where}: $[{shown(key)}].data_offsets"
            raise ShardError(f"{at} [{start}, {stop}] {what} at byte {end} of the data")
        end = stop
        if key == meta.packed:
            if (entry.dtype, entry.shape) != ("U8", [stop - start]):
                raise ShardError(f"{where}: $[{shown(key)}]: packed blocks are {stop - start} elements of 'U8'")
            packed = (nbytes + start, nbytes + stop)
            continue
        box = _box(key, entry, meta.tensors[key], meta.block, nbytes, where, alike)
        form = (box.dtype, box.global_shape)
        if whole.setdefault(box.fqn, form) != form:
            raise ShardError(f"{where}: the boxes of {shown(box.fqn)} disagree on its dtype or global shape")
        boxes.append(box)
    if nbytes + end != file_size:
        raise ShardError(f"{where}: header and data make {nbytes + end} bytes, the file has {file_size}; it is damaged")
    return boxes, packed


def _box(
    key: str, entry: Entry, tensor: Tensor, block: int, nbytes: int, where: str, alike: dict[object, Box]
) -> StoredBox:
    """Return one checked box. ``alike`` are those of other names found fine: many tensors differ in nothing else."""
    start, stop = entry.data_offsets
    shape, digests = tuple(tensor.shape), tuple(tensor.digests)
    offsets, sizes = tuple(tensor.offsets), tuple(tensor.sizes)
    form = (tensor.dtype, shape, offsets, sizes, entry.dtype, tuple(entry.shape), stop - start, len(digests))
    box = alike.get(form)
    problem = _own_problem(key, tensor)
    if box is None and problem is None:
        problem = _problem(tensor) or _form_problem(entry, tensor) or _count_problem(tensor, stop - start, block)
    if problem is not None:
        raise ShardError(f"{where}: $[{shown(key)}]: {problem}; the header is damaged or hostile")
    if box is None:
        box = alike[form] = Box(offsets, sizes)
    return StoredBox(key, tensor.fqn, tensor.dtype, shape, box, nbytes + start, stop - start, digests)


def _files(meta: Meta, at: str) -> tuple[FileRef, ...]:
    """Return the files that blocks are reused from; each must be a shard of some step, named once."""
    if meta.version[0] < 2 and (meta.reused or meta.files or meta.packed is not None):
        raise ShardError(f"{at}: refers to other files, which format {meta.version} does not do")
    if len(meta.files) > MAX_FILES:
        raise ShardError(f"{at}.files: refers to {len(meta.files)} files (at most {MAX_FILES})")
    files = tuple(FileRef(*file) for file in meta.files)
    for file in files:
        problem = file_problem(file.path)
        if problem is None and not is_digest(file.header):
            problem = f"{file.path}: its header is not a digest"
        if problem is not None:
            raise ShardError(f"{at}.files: {problem}; the header is damaged or hostile")
    if len({file.path for file in files}) != len(files):
        raise ShardError(f"{at}.files: names a file twice")
    return files


def _reused(meta: Meta, files: tuple[FileRef, ...], packed: tuple[int, int], where: str) -> list[StoredBox]:
    """Return the boxes with blocks in other files, having checked that their own blocks fill the packed bytes."""
    found: list[StoredBox] = []
    seen = {*meta.tensors}
    whole = {tensor.fqn: (tensor.dtype, tensor.shape) for tensor in meta.tensors.values()}
    at = packed[0]
    for tensor in meta.reused:
        problem = "the key stands twice" if tensor.key in seen else _own_problem(tensor.key, tensor)
        problem = problem or _problem(tensor)
        nbytes = 0 if problem else math.prod(tensor.sizes) * ITEMSIZES[tensor.dtype]
        problem = problem or _count_problem(tensor, nbytes, meta.block) or _runs_problem(tensor, nbytes, meta, files)
        if problem is None and whole.setdefault(tensor.fqn, (tensor.dtype, tensor.shape)) != (
            tensor.dtype,
            tensor.shape,
        ):
            problem = "the boxes of this tensor disagree on its dtype or global shape"
        if problem is not None:
            raise ShardError(f"{where}: reused {shown(tensor.key)}: {problem}; the header is damaged or hostile")
        seen.add(tensor.key)
        runs = tuple(_placed(tensor, files, at, nbytes, meta.block))
        at += sum(run_bytes(run, nbytes, meta.block) for run in runs if run.path is None)
        box, digests = Box(tuple(tensor.offsets), tuple(tensor.sizes)), tuple(tensor.digests)
        form = tensor.key, tensor.fqn, tensor.dtype, tuple(tensor.shape)
        found.append(StoredBox(*form, box, -1, nbytes, digests, runs))
    if at != packed[1]:
        raise ShardError(f"{where}: {packed[1] - packed[0]} bytes of packed blocks, boxes use {at - packed[0]}")
    others = [
        (run, run_bytes(run, box.nbytes, meta.block)) for box in found for run in box.runs if run.path is not None
    ]
    problem = overlap(others)
    unused = {file.path for file in files} - {run.path for run, _ in others}
    if problem is None and unused:
        problem = f"{min(unused)} is named but holds nothing"
    if problem is not None:
        raise ShardError(f"{where}: reused: {problem}; the header is damaged or hostile")
    return found


def _placed(tensor: Reused, files: tuple[FileRef, ...], at: int, nbytes: int, block: int) -> Iterator[Run]:
    first = 0
    for count, *there in tensor.runs:
        run = Run(first, count, files[there[0]].path, there[1]) if there else Run(first, count, None, at)
        if not there:
            at += run_bytes(run, nbytes, block)
        first += count
        yield run


def _runs_problem(tensor: Reused, nbytes: int, meta: Meta, files: tuple[FileRef, ...]) -> str | None:
    """Say why runs can't be those of a box, or return None."""
    if any(len(run) not in (1, 3) or not run[0] for run in tensor.runs):
        return "a run is not [blocks] or [blocks, file, byte]"
    if sum(run[0] for run in tensor.runs) != len(tensor.digests):
        return f"its runs have {sum(run[0] for run in tensor.runs)} blocks, its digests {len(tensor.digests)}"
    if all(len(run) == 1 for run in tensor.runs):
        return "none of its blocks lies in another file"
    first = 0
    for count, *there in tensor.runs:
        if there:
            number, start = there
            if number >= len(files):
                return f"there is no file {number}"
            end = start + run_bytes(Run(first, count, None, start), nbytes, meta.block)
            if start < 8 or end > files[number].size:
                return f"bytes [{start}, {end}) are outside {files[number].path} of {files[number].size} bytes"
        first += count
    return None


def _count_problem(tensor: Tensor, nbytes: int, block: int) -> str | None:
    if len(tensor.digests) != block_count(nbytes, block):
        return f"{len(tensor.digests)} digests for {nbytes} bytes in blocks of {block}"
    return None


def _own_problem(key: str, tensor: Tensor) -> str | None:
    """Say what is wrong with what no other tensor shares, its names and digests, or return None."""
    wrong = name_problem(key) or (name_problem(tensor.fqn) if tensor.fqn != key else None)
    if wrong is not None:
        return f"the name {wrong}"
    if key != tensor.fqn and not _is_suffixed(key, tensor.fqn):
        return f"this can't be the key of a box of {shown(tensor.fqn)}"
    return None if are_digests(tensor.digests) else "a digest is not 32 lowercase hex digits of xxh3-128"


def _problem(tensor: Tensor) -> str | None:
    """Say what is wrong with one tensor's shape, dtype or box, or return None."""
    size = ITEMSIZES.get(tensor.dtype)
    if size is None:
        return f"unknown dtype {shown(tensor.dtype)}"
    wrong = shape_problem(tensor.shape, size)
    if wrong is not None:
        return f"shape {wrong}"
    if not len(tensor.shape) == len(tensor.offsets) == len(tensor.sizes):
        return f"box of {len(tensor.offsets)}+{len(tensor.sizes)} numbers in {len(tensor.shape)} dimensions"
    for offset, length, extent in zip(tensor.offsets, tensor.sizes, tensor.shape, strict=True):
        if offset + length > extent:
            return f"box {tensor.offsets}+{tensor.sizes} reaches outside shape {tensor.shape}"
    return None


def _form_problem(entry: Entry, tensor: Tensor) -> str | None:
    """Say why a box can't be stored in this form, or return None."""
    tag, shape = stored_form(tensor.dtype, tuple(tensor.sizes))
    if entry.dtype != tag or entry.shape != list(shape):
        found = f"{entry.dtype[:20]!r} {str(entry.shape)[:200]}"
        return f"stored as {found}, but a {tensor.dtype} box of {tensor.sizes} is {tag!r} {list(shape)}"
    begin, end = entry.data_offsets
    if math.prod(tensor.sizes) * ITEMSIZES[tensor.dtype] != end - begin:
        return f"{end - begin} bytes for {math.prod(tensor.sizes)} elements of {tensor.dtype}"
    return None


def _is_suffixed(key: str, fqn: str) -> bool:
    suffix = key[len(fqn) + 1 :]
    return key.startswith(f"{fqn}#") and suffix.isascii() and suffix.isdecimal()
