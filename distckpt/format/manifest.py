"""The manifest: the one file that makes a checkpoint exist, and what it says about every tensor and shard.

On storage it is ``{"digest":"xxh3-128:<32 hex>","body":<body>}`` and a line feed; the digest covers exactly
the bytes of the body, canonical JSON, so that any language checks it by slicing. What a body must mean is in
manifest_checks.py.
"""

from __future__ import annotations

import json
import threading
from typing import Any, Final, TypeVar

import msgspec

from distckpt.errors import ManifestError, UnserializableState
from distckpt.format.digest import digest
from distckpt.format.limits import REUSING, VERSION, Count, check_version
from distckpt.format.manifest_checks import check_manifest
from distckpt.format.names import parse_shard_name, shard_name
from distckpt.format.plain_json import canonical, has_keys_once, strict_loads
from distckpt.heap import no_collections

FORMAT: Final = "distckpt"
MAX_MANIFEST: Final = 256 << 20
"""Longest manifest in bytes, so a damaged length never decides how much is read."""

_HEAD: Final = b'{"digest":"xxh3-128:'
_MIDDLE: Final = b'","body":'
_NO_TABLE: Final = b'"tensors":{}'
_TAIL: Final = b"}\n"
_FRAME: Final = len(_HEAD) + 32 + len(_MIDDLE)
_REMEMBERED: Final = 4
_parsed: dict[str, Manifest] = {}
"""Manifests by the digest of their body, the last few; nobody changes one."""
_tables: dict[str, tuple[list[MeshEntry], dict[str, TensorEntry]]] = {}
"""Tensors by the digest of their JSON, and the meshes that they were found right for: a run's manifests have the same."""
_lock = threading.Lock()
_T = TypeVar("_T")
_MAX_BODY: Final = MAX_MANIFEST - _FRAME - len(_TAIL)


class MeshEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks in an n-dimensional grid. ``ranks`` are runs [start, stop) that flatten it row-major."""

    shape: list[Count]
    ranks: list[list[Count]]


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor: ``mesh`` indexes the manifest's meshes; placements as in layout.py, one per mesh dimension.

    With placements ``["E"]``, ``boxes[i]`` are the boxes [[offsets], [sizes]] of the mesh's i-th rank.
    """

    dtype: str
    shape: list[Count]
    mesh: Count
    placements: list[str]
    boxes: list[list[list[list[Count]]]] | None = None


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file: path below the step folder, size in bytes, digest of its header with the 8 length bytes."""

    path: str
    size: Count
    header: str


class PlanEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a job that goes on from here needs besides ``tensors`` to have its plan at once.

    ``id`` stands for the tables of all ranks; ``objects`` are kinds by name, ``sources`` the ranks that send an object,
    ``shared`` numbers that are equal for objects which the same ranks have.
    """

    id: str
    objects: dict[str, str]
    sources: dict[str, list[Count]]
    shared: dict[str, Count]


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """Shards of an earlier attempt that hold a part of this checkpoint.

    ``attempt`` is the attempt's folder, from the root, which has ``shards`` shards; those of ``ranks`` (runs
    [start, stop), rising) are referred to. Together they have ``size`` bytes, of which ``used`` belong to this checkpoint.
    """

    attempt: str
    shards: Count
    ranks: list[list[Count]]
    size: Count
    used: Count

    @property
    def paths(self) -> list[str]:
        """The files, from the root."""
        return [
            f"{self.attempt}/{shard_name(r, self.shards)}" for start, stop in self.ranks for r in range(start, stop)
        ]

    def names(self, path: str) -> bool:
        """Whether a file is one of them."""
        folder, _, leaf = path.rpartition("/")
        parsed = parse_shard_name(leaf)
        if folder != self.attempt or parsed is None or parsed[1] != self.shards:
            return False
        return any(start <= parsed[0] < stop for start, stop in self.ranks)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one checkpoint but its tensors' bytes; O(tensors + shards).

    ``objects`` are replicated ones as typed JSON, ``per_rank`` the names of those that stand in each shard's
    header; ``shards[i]`` is rank i's. ``aliases`` maps the further names of a tied tensor to the stored one.
    ``reused`` are the files of earlier checkpoints that its shards refer to, O(attempts); unset where there are none.
    """

    step: Count
    epoch: int | float | None
    time: str
    generation: Count
    attempt: str
    save_id: str
    world_size: Count
    engine: str
    meshes: list[MeshEntry]
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str]
    objects: dict[str, Any]
    per_rank: list[str]
    metrics: dict[str, Any]
    config: Any
    provenance: Any
    software: dict[str, str]
    shards: list[ShardEntry]
    plan: PlanEntry | msgspec.UnsetType = msgspec.UNSET
    signature: str | None = None
    reused: list[Reference] | msgspec.UnsetType = msgspec.UNSET
    version: tuple[int, int] = VERSION
    format: str = FORMAT

    @property
    def references(self) -> list[Reference]:
        """The files of earlier checkpoints that hold a part of this one."""
        return [] if isinstance(self.reused, msgspec.UnsetType) else self.reused

    @property
    def nbytes(self) -> int:
        """Bytes that hold this checkpoint: its own files, and what it uses of earlier ones."""
        return sum(shard.size for shard in self.shards) + sum(reference.used for reference in self.references)

    def referring(self, references: list[Reference]) -> Manifest:
        """Return the manifest with these references, and the version that they need."""
        if not references:
            return msgspec.structs.replace(self, reused=msgspec.UNSET, version=VERSION)
        return msgspec.structs.replace(self, reused=references, version=REUSING)


class _Raw(msgspec.Struct, frozen=True):
    tensors: msgspec.Raw


# msgspec 0.22 looks into a type at its first use, and crashes (SIGSEGV) when two threads do so at once.
for _type in (Manifest, _Raw, dict[str, TensorEntry]):
    msgspec.json.Decoder(_type)


def layout_text(manifest: Manifest, entry: TensorEntry) -> str:
    """Return a tensor's layout: its placements and the mesh, ``S(0) R on 2x4 ranks``; ``whole`` on one rank."""
    mesh = manifest.meshes[entry.mesh].shape
    if manifest.world_size == 1 and entry.boxes is None:
        return "whole"
    return f"{' '.join(entry.placements)} on {'x'.join(map(str, mesh)) or '1'} ranks"


@no_collections()
def encode_manifest(manifest: Manifest) -> bytes:
    """Return the file's bytes, having checked them as a reader would: what can't be read is never written.

    Raises ``UnserializableState`` for values that are not plain JSON, ``ManifestError`` for a manifest that
    contradicts itself, is too large, or nests too deeply.
    """
    where = f"manifest of step {manifest.step} to be written"
    try:
        head, table = msgspec.structs.replace(manifest, tensors={}), _table(manifest.tensors)
        # Keys are sorted, and what follows "tensors" is plain texts and numbers: the last one is the manifest's own.
        front, _, back = canonical(msgspec.to_builtins(head)).rpartition(_NO_TABLE)
        body = b"".join((front, b'"tensors":', table, back))
    except (UnserializableState, TypeError, ValueError, OverflowError) as cause:
        raise UnserializableState(f"{where}: {cause}; encode values with typed_json.encode first") from cause
    _parse(body, where)
    return b"".join((_HEAD, digest(body).encode(), _MIDDLE, body, _TAIL))


def _table(tensors: dict[str, TensorEntry]) -> bytes:
    """Return the tensors as ``canonical`` writes them, many times faster: there are no floats in them."""
    return msgspec.json.encode(tensors, order="sorted")


def decode_manifest(data: bytes, *, where: str, step: int | None = None, generation: int | None = None) -> Manifest:
    """Parse and check a manifest. ``where`` names its file; ``step`` and ``generation`` are its name's.

    Unknown fields are ignored. Raises ``ManifestError`` naming the file and the field, ``UnsupportedVersion``
    if the format's major version is newer.
    """
    manifest = _parse(_body(data, where), where)
    for name, wanted in (("step", step), ("generation", generation)):
        stated = getattr(manifest, name)
        if wanted is not None and wanted != stated:
            raise ManifestError(f"{where}: $.{name} is {stated}, the file's name says {wanted}")
    return manifest


def reread_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse a manifest that another rank of this job has read from storage and checked, several times faster.

    Only its digest and its types are checked again, so never use this for bytes from anywhere else.
    """
    body = _body(data, where)
    known = _parsed.get(digest(body))
    return known if known is not None else msgspec.convert(json.loads(bytes(body)), type=Manifest, strict=True)


def _body(data: bytes, where: str) -> memoryview:
    """Return the body of a manifest's bytes, its frame and digest checked."""
    if len(data) > MAX_MANIFEST:
        raise ManifestError(f"{where}: {len(data)} bytes, more than the {MAX_MANIFEST} of any manifest")
    if len(data) < _FRAME + len(_TAIL):
        raise ManifestError(f"{where}: {len(data)} bytes are no manifest; it was truncated")
    body = memoryview(data)[_FRAME : len(data) - len(_TAIL)]
    if not data.startswith(_HEAD) or not data.endswith(_TAIL):
        raise ManifestError(f"{where}: not framed as a manifest (xxh3-128 digest, body); damaged or truncated")
    if data[len(_HEAD) : _FRAME] != digest(body).encode() + _MIDDLE:
        found = data[len(_HEAD) : len(_HEAD) + 32].decode("ascii", "replace")
        raise ManifestError(f"{where}: its digest says {found}, its body has {digest(body)}; it is damaged")
    return body


@no_collections()
def _parse(body: bytes | memoryview, where: str) -> Manifest:
    """Return the manifest in a body; equal bytes are checked once (a save meets its manifest half a dozen times)."""
    found = digest(body)
    with _lock:
        manifest = _parsed.get(found)
    if manifest is None:
        manifest = _check(body, where)
        _remember(_parsed, found, manifest)
    return manifest


def _remember(known: dict[str, _T], key: str, value: _T) -> None:
    with _lock:
        known[key] = value
        while len(known) > _REMEMBERED:
            del known[next(iter(known))]


def _check(body: bytes | memoryview, where: str) -> Manifest:
    """Return the manifest in a body: JSON, version, types and meaning checked, in this order."""
    rest, table, tensors = _split(bytes(body)) or (body, "", None)
    plain = strict_loads(rest, where=where, max_bytes=_MAX_BODY)
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ManifestError(f"{where}: $.format is not {FORMAT!r}; this is no manifest of a checkpoint")
    check_version(plain.get("version"), where=f"{where}: $", error=ManifestError)
    try:
        manifest = msgspec.convert(plain, type=Manifest, strict=True)
    except msgspec.ValidationError as cause:
        raise ManifestError(f"{where}: {cause}; the manifest is damaged or hostile") from cause
    if tensors is None:
        check_manifest(manifest, where)
        return manifest
    manifest = msgspec.structs.replace(manifest, tensors=tensors)
    with _lock:
        known = _tables.get(table)
    check_manifest(manifest, where, tensors=known is None or known[0] != manifest.meshes)
    _remember(_tables, table, (manifest.meshes, tensors))
    return manifest


def _split(body: bytes) -> tuple[bytes, str, dict[str, TensorEntry]] | None:
    """Return a body without its tensors, their digest, and they; None where a key of theirs may stand twice.

    They are nearly all of a manifest, and going straight into their types is a tenth of the work of ``strict_loads``.
    """
    if len(body) > _MAX_BODY:
        return None
    try:
        table = bytes(msgspec.json.decode(body, type=_Raw).tensors)
        whole, name = b'"tensors":' + table, digest(table)
        if body.count(whole) != 1:
            return None
        with _lock:
            known = _tables.get(name)
        if known is not None:
            return body.replace(whole, _NO_TABLE), name, known[1]
        tensors = msgspec.json.decode(table, type=dict[str, TensorEntry])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    keys = len(tensors) * (1 + len(TensorEntry.__struct_fields__))
    # With "boxes", which may be left out, in each of them and first, no other key can be missing for one that stands twice.
    if table.count(b':{"boxes":') != len(tensors) or not has_keys_once(table, keys):
        return None
    return body.replace(whole, _NO_TABLE), name, tensors
