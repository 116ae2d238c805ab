"""Strict reading of a shard's header: everything is checked before anything is allocated or believed.

The safetensors library accepts repeated names, sizes that overflow, and names that are paths, and checks no
content; so headers are parsed here. The digest in the manifest comes first, but a header must also be safe to
parse when someone wrote both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec

from distckpt.boxes import Box
from distckpt.errors import NotFound, ShardError
from distckpt.format.digest import block_count, digest, is_digest
from distckpt.format.dtypes import ITEMSIZES, stored_form
from distckpt.format.limits import (
    MAX_TENSORS,
    MAX_WORLD,
    Count,
    check_version,
    name_problem,
    shape_problem,
    shown,
)
from distckpt.format.plain_json import has_keys_once, strict_loads
from distckpt.format.runs import MAX_FILES, FileRef, Run, overlap, reference_problem, run_bytes
from distckpt.format.shard import MAX_HEADER, MAX_SAVE_ID, ShardHeader, StoredBox, check_block
from distckpt.storage.base import Store

FIRST_READ = 64 << 10
"""Bytes of the first read of a header; most headers need no second."""


class _Entry(msgspec.Struct, frozen=True, gc=False):
    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


class _Tensor(msgspec.Struct, frozen=True, gc=False):
    fqn: str
    shape: list[Count]
    offsets: list[Count]
    sizes: list[Count]
    dtype: str
    digests: list[str]


class _Reused(_Tensor, frozen=True, gc=False):
    key: str
    runs: list[list[Count]]


class _Meta(msgspec.Struct, frozen=True):
    rank: Count
    world_size: Count
    save_id: str
    block: Count
    tensors: dict[str, _Tensor]
    objects: dict[str, Any]
    version: tuple[int, int]
    reused: list[_Reused] = []
    files: list[tuple[str, Count, str]] = []
    packed: str | None = None


class _Raw(msgspec.Struct, frozen=True):
    """Every field that we always write, so that they can be counted."""

    version: Any
    rank: msgspec.Raw
    world_size: msgspec.Raw
    save_id: msgspec.Raw
    block: msgspec.Raw
    tensors: msgspec.Raw
    objects: msgspec.Raw
    reused: msgspec.Raw


_NOTHING = b'{"dtype":"","shape":[],"data_offsets":[0,0]}'

# Looked into here once, on the importing thread: see manifest.py.
for _type in (_Entry, _Meta, _Raw, dict[str, _Entry]):
    msgspec.json.Decoder(_type)


def header_length(prefix: bytes | memoryview, *, file_size: int, where: str) -> int:
    """Return a header's bytes, its 8 length bytes included, from the first 8; ``ShardError`` if absurd."""
    if len(prefix) < 8 or file_size < 8:
        raise ShardError(f"{where}: {min(len(prefix), file_size)} bytes are no shard; it was truncated")
    length = int.from_bytes(prefix[:8], "little")
    if not 2 <= length <= MAX_HEADER:
        raise ShardError(f"{where}: header length {length} is outside [2, {MAX_HEADER}]; damaged or no shard")
    if 8 + length > file_size:
        raise ShardError(f"{where}: header of {length} bytes in a file of {file_size}; it was truncated")
    return 8 + length


def read_header(store: Store, path: str, *, file_size: int, expect_digest: str | None) -> ShardHeader:
    """Read and check the header of the shard ``path``, a file of ``file_size`` bytes as its manifest says.

    The header's bytes must have the digest ``expect_digest`` (None: not checked) before they are parsed.
    Raises ``ShardError`` naming the file: missing, unreadable, short, damaged or hostile.
    """
    data = _read(store, path, 0, min(FIRST_READ, file_size))
    nbytes = header_length(data, file_size=file_size, where=path)
    if nbytes > len(data):
        data += _read(store, path, len(data), nbytes - len(data))
    data = data[:nbytes]
    if expect_digest is not None and digest(data) != expect_digest:
        raise ShardError(
            f"{path}: header digest is {digest(data)}, its manifest says {expect_digest}; "
            "the shard is damaged, swapped, or of another save: load an older checkpoint"
        )
    return parse_header(data, file_size=file_size, where=path)


def _read(store: Store, path: str, offset: int, size: int) -> bytes:
    try:
        data = store.read(path, offset, size)
    except NotFound as cause:
        raise ShardError(f"{path}: the shard is missing; load an older checkpoint") from cause
    except OSError as cause:
        raise ShardError(f"{path}: bytes [{offset}, {offset + size}) can't be read: {cause}") from cause
    if len(data) != size:
        raise ShardError(f"{path}: {len(data)} of {size} bytes at {offset}; the shard was truncated")
    return data


def parse_header(data: bytes | memoryview, *, file_size: int, where: str) -> ShardHeader:
    """Parse and check a shard's header. ``data`` are the file's first bytes: the whole header, or more.

    Memory stays proportional to the header's length, whatever it claims. Unknown fields are ignored.
    Raises ``ShardError`` naming the file (``where``) and the field, ``UnsupportedVersion`` (newer major).
    """
    nbytes = header_length(data, file_size=file_size, where=where)
    if len(data) < nbytes:
        raise ShardError(f"{where}: {len(data)} of the header's {nbytes} bytes; the file was truncated")
    text = bytes(data[8:nbytes])
    found = _peek(text, where)
    at = f"{where}: $.__metadata__.distckpt"
    entries, meta = _parse_quickly(text, *found, at) or _parse_strictly(text, where, at)
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


def _parse_strictly(text: bytes, where: str, at: str) -> tuple[dict[str, _Entry], _Meta]:
    outer = strict_loads(text, where=where, max_bytes=MAX_HEADER, error=ShardError)
    inner = outer.pop("__metadata__")["distckpt"].encode()
    plain = strict_loads(inner, where=at, max_bytes=MAX_HEADER, error=ShardError)
    if not isinstance(plain, dict):
        raise ShardError(f"{at} is not an object; it is damaged")
    check_version(plain.get("version"), where=at, error=ShardError)
    meta = _convert(plain, _Meta, f"{where}: in __metadata__.distckpt")
    return _convert(outer, dict[str, _Entry], where), meta


def _parse_quickly(
    text: bytes, metadata: bytes, found: dict[str, str], at: str
) -> tuple[dict[str, _Entry], _Meta] | None:
    """Return what ``_parse_strictly`` would, a tenth of the time later, or None where that is not certain.

    The two lists of tensors go straight into their types; that no key stands twice is proved by counting.
    """
    inner = found["distckpt"].encode()
    try:
        raw = msgspec.json.decode(inner, type=_Raw)
        outer = text.replace(metadata, _NOTHING, 1).rstrip(b" ")
        rest = inner.replace(b'"objects":' + bytes(raw.objects), b'"objects":{}', 1)
        entries = msgspec.json.decode(outer, type=dict[str, _Entry])
        meta = msgspec.json.decode(rest, type=_Meta)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    tensor, entry = len(_Tensor.__struct_fields__), len(_Entry.__struct_fields__)
    fields = len(_Raw.__struct_fields__) + bool(meta.files) + (meta.packed is not None)
    if (
        msgspec.json.encode(found) != metadata
        or meta.objects
        or not has_keys_once(outer, len(entries) * (1 + entry))
        or not has_keys_once(rest, fields + len(meta.tensors) * (1 + tensor) + len(meta.reused) * (2 + tensor))
    ):
        return None
    check_version(raw.version, where=at, error=ShardError)
    objects = strict_loads(bytes(raw.objects), where=f"{at}.objects", max_bytes=MAX_HEADER, error=ShardError)
    del entries["__metadata__"]
    return entries, msgspec.structs.replace(meta, objects=objects)


def _peek(text: bytes, where: str) -> tuple[bytes, dict[str, str]]:
    """Refuse, before Python objects are made for everything in it, what is no header of ours.

    A foreign header of many small entries would cost ten times its length in memory. Returns ``__metadata__`` as it
    stands and parsed.
    """
    if text[:1] != b"{":
        raise ShardError(f"{where}: $: the header is not a JSON object, or something stands before it")
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        if len(raw) > MAX_TENSORS + 1:
            raise ShardError(f"{where}: {len(raw)} tensors in one shard (at most {MAX_TENSORS})")
        metadata = raw.get("__metadata__")
        found = {} if metadata is None else msgspec.json.decode(metadata, type=dict[str, str])
    except RecursionError as cause:
        raise ShardError(f"{where}: JSON nested too deeply; damaged or hostile") from cause
    except msgspec.ValidationError as cause:
        raise ShardError(f"{where}: {cause}; the header is damaged") from cause
    except (msgspec.DecodeError, UnicodeError) as cause:
        raise ShardError(f"{where}: the header is not JSON: {cause}; it is damaged") from cause
    if "distckpt" not in found:
        raise ShardError(f"{where}: $.__metadata__.distckpt is missing: a safetensors file that distckpt did not write")
    return bytes(metadata or b""), found


def _convert(plain: Any, wanted: Any, where: str) -> Any:
    try:
        return msgspec.convert(plain, type=wanted, strict=True)
    except msgspec.ValidationError as cause:
        raise ShardError(f"{where}: {cause}; the header is damaged") from cause


def _check_meta(meta: _Meta, at: str) -> None:
    if not meta.rank < meta.world_size <= MAX_WORLD:
        raise ShardError(f"{at}: rank {meta.rank} of {meta.world_size} ranks (at most {MAX_WORLD})")
    if len(meta.save_id) > MAX_SAVE_ID:
        raise ShardError(f"{at}.save_id has {len(meta.save_id)} characters (at most {MAX_SAVE_ID})")
    try:
        check_block(meta.block)
    except ValueError as cause:
        raise ShardError(f"{at}.block: {cause}") from cause


def _boxes(
    entries: dict[str, _Entry], meta: _Meta, nbytes: int, file_size: int, where: str
) -> tuple[list[StoredBox], tuple[int, int]]:
    """Return the boxes by file offset, and (first byte, past the last) of the packed blocks.

    They were checked to fill the file from the header to its end.
    """
    end, packed = 0, (nbytes, nbytes)
    boxes: list[StoredBox] = []
    whole: dict[str, tuple[str, tuple[int, ...]]] = {}
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
        box = _box(key, entry, meta.tensors[key], meta.block, nbytes, where)
        if whole.setdefault(box.fqn, (box.dtype, box.global_shape)) != (box.dtype, box.global_shape):
            raise ShardError(f"{where}: the boxes of {shown(box.fqn)} disagree on its dtype or global shape")
        boxes.append(box)
    if nbytes + end != file_size:
        raise ShardError(f"{where}: header and data make {nbytes + end} bytes, the file has {file_size}; it is damaged")
    return boxes, packed


def _box(key: str, entry: _Entry, tensor: _Tensor, block: int, nbytes: int, where: str) -> StoredBox:
    start, stop = entry.data_offsets
    problem = _problem(key, tensor) or _form_problem(entry, tensor) or _digest_problem(tensor, stop - start, block)
    if problem is not None:
        raise ShardError(f"{where}: $[{shown(key)}]: {problem}; the header is damaged or hostile")
    return _stored(key, tensor, nbytes + start, stop - start, ())


def _stored(key: str, tensor: _Tensor, start: int, nbytes: int, runs: tuple[Run, ...]) -> StoredBox:
    box = Box(tuple(tensor.offsets), tuple(tensor.sizes))
    digests = tuple(tensor.digests)
    return StoredBox(key, tensor.fqn, tensor.dtype, tuple(tensor.shape), box, start, nbytes, digests, runs)


def _files(meta: _Meta, at: str) -> tuple[FileRef, ...]:
    """Return the files that blocks are reused from; each must be a shard of some step, named once."""
    if meta.version[0] < 2 and (meta.reused or meta.files or meta.packed is not None):
        raise ShardError(f"{at}: refers to other files, which format {meta.version} does not do")
    if len(meta.files) > MAX_FILES:
        raise ShardError(f"{at}.files: refers to {len(meta.files)} files (at most {MAX_FILES})")
    files = tuple(FileRef(*file) for file in meta.files)
    for file in files:
        problem = reference_problem(file)
        if problem is None and not is_digest(file.header):
            problem = f"{file.path}: its header is not a digest"
        if problem is not None:
            raise ShardError(f"{at}.files: {problem}; the header is damaged or hostile")
    if len({file.path for file in files}) != len(files):
        raise ShardError(f"{at}.files: names a file twice")
    return files


def _reused(meta: _Meta, files: tuple[FileRef, ...], packed: tuple[int, int], where: str) -> list[StoredBox]:
    """Return the boxes with blocks in other files, having checked that their own blocks fill the packed bytes."""
    found: list[StoredBox] = []
    seen = {*meta.tensors}
    whole = {tensor.fqn: (tensor.dtype, tensor.shape) for tensor in meta.tensors.values()}
    at = packed[0]
    for tensor in meta.reused:
        problem = "the key stands twice" if tensor.key in seen else _problem(tensor.key, tensor)
        nbytes = 0 if problem else math.prod(tensor.sizes) * ITEMSIZES[tensor.dtype]
        problem = problem or _digest_problem(tensor, nbytes, meta.block) or _runs_problem(tensor, nbytes, meta, files)
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
        found.append(_stored(tensor.key, tensor, -1, nbytes, runs))
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


def _placed(tensor: _Reused, files: tuple[FileRef, ...], at: int, nbytes: int, block: int) -> Iterator[Run]:
    first = 0
    for count, *there in tensor.runs:
        run = Run(first, count, files[there[0]].path, there[1]) if there else Run(first, count, None, at)
        if not there:
            at += run_bytes(run, nbytes, block)
        first += count
        yield run


def _runs_problem(tensor: _Reused, nbytes: int, meta: _Meta, files: tuple[FileRef, ...]) -> str | None:
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


def _digest_problem(tensor: _Tensor, nbytes: int, block: int) -> str | None:
    if len(tensor.digests) != block_count(nbytes, block):
        return f"{len(tensor.digests)} digests for {nbytes} bytes in blocks of {block}"
    return None if all(map(is_digest, tensor.digests)) else "a digest is not 32 lowercase hex digits of xxh3-128"


def _problem(key: str, tensor: _Tensor) -> str | None:
    """Say what is wrong with one tensor's name, shape, dtype or box, or return None."""
    wrong = name_problem(key) or (name_problem(tensor.fqn) if tensor.fqn != key else None)
    if wrong is not None:
        return f"the name {wrong}"
    if key != tensor.fqn and not _is_suffixed(key, tensor.fqn):
        return f"this can't be the key of a box of {shown(tensor.fqn)}"
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


def _form_problem(entry: _Entry, tensor: _Tensor) -> str | None:
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
