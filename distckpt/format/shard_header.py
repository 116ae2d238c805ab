"""Strict reading of a shard's header: everything is checked before anything is allocated or believed.

The safetensors library accepts repeated names, sizes that overflow, and names that are paths, and checks no
content; so headers are parsed here. The digest in the manifest comes first, but a header must also be safe to
parse when someone wrote both.
"""

from __future__ import annotations

from typing import Any

import msgspec

from distckpt.errors import NotFound, ShardError
from distckpt.format.digest import digest
from distckpt.format.header_checks import checked_header
from distckpt.format.limits import (
    MAX_TENSORS,
    Count,
    check_version,
)
from distckpt.format.plain_json import has_keys_once, strict_loads
from distckpt.format.shard import MAX_HEADER, ShardHeader
from distckpt.storage.base import Store

FIRST_READ = 64 << 10
"""Bytes of the first read of a header; most headers need no second."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One key of the safetensors header."""

    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """One stored box, as our own metadata describe it."""

    fqn: str
    shape: list[Count]
    offsets: list[Count]
    sizes: list[Count]
    dtype: str
    digests: list[str]


class Reused(Tensor, frozen=True, gc=False):
    """One box with blocks elsewhere; a run is [blocks] in this file, or [blocks, file, byte]."""

    key: str
    runs: list[list[Count]]


class Meta(msgspec.Struct, frozen=True):
    """Our own metadata; the last three fields only in shards that refer to other files."""

    rank: Count
    world_size: Count
    save_id: str
    block: Count
    tensors: dict[str, Tensor]
    objects: dict[str, Any]
    version: tuple[int, int]
    reused: list[Reused] = []
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


_FIRST = b'{"__metadata__":'
_NOTHING = b'{"dtype":"","shape":[],"data_offsets":[0,0]}'

# Looked into here once, on the importing thread: see manifest.py.
for _type in (Entry, Meta, _Raw, dict[str, Entry]):
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
    data = _read(store, path, 0, nbytes) if nbytes > len(data) else data[:nbytes]  # once more is faster than joined
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
    return checked_header(entries, meta, nbytes, file_size, where)


def _parse_strictly(text: bytes, where: str, at: str) -> tuple[dict[str, Entry], Meta]:
    outer = strict_loads(text, where=where, max_bytes=MAX_HEADER, error=ShardError)
    inner = outer.pop("__metadata__")["distckpt"].encode()
    plain = strict_loads(inner, where=at, max_bytes=MAX_HEADER, error=ShardError)
    if not isinstance(plain, dict):
        raise ShardError(f"{at} is not an object; it is damaged")
    check_version(plain.get("version"), where=at, error=ShardError)
    meta = _convert(plain, Meta, f"{where}: in __metadata__.distckpt")
    return _convert(outer, dict[str, Entry], where), meta


def _parse_quickly(
    text: bytes, metadata: bytes, found: dict[str, str], at: str
) -> tuple[dict[str, Entry], Meta] | None:
    """Return what ``_parse_strictly`` would, a tenth of the time later, or None where that is not certain.

    The two lists of tensors go straight into their types; that no key stands twice is proved by counting.
    """
    inner = found["distckpt"].encode()
    try:
        raw = msgspec.json.decode(inner, type=_Raw)
        if text[: len(_FIRST)] != _FIRST or text[len(_FIRST) : len(_FIRST) + len(metadata)] != metadata:
            return None  # somewhere else than where we write it
        outer = b"".join((_FIRST, _NOTHING, text[len(_FIRST) + len(metadata) :].rstrip(b" ")))
        rest = inner.replace(b'"objects":' + bytes(raw.objects), b'"objects":{}', 1)
        entries = msgspec.json.decode(outer, type=dict[str, Entry])
        meta = msgspec.json.decode(rest, type=Meta)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    tensor, entry = len(Tensor.__struct_fields__), len(Entry.__struct_fields__)
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
