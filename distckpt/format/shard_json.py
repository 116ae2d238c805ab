"""The JSON of a shard's header: what a plan and its digests become in the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from distckpt.format.dtypes import itemsize, safetensors_tag, stored_form
from distckpt.format.limits import REUSING, VERSION

if TYPE_CHECKING:
    from distckpt.format.shard import ShardPlan


class _Entry(msgspec.Struct, gc=False):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Tensor(msgspec.Struct, gc=False):
    fqn: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    digests: Sequence[str]


class _Reused(_Tensor, gc=False):
    key: str
    runs: list[list[int]]


def _stored_offsets(dtype: str, offsets: tuple[int, ...]) -> tuple[int, ...]:
    """Return a box's offsets in units of its stored shape, the only one that other readers see."""
    if safetensors_tag(dtype) is not None:
        return offsets
    return (*offsets[:-1], offsets[-1] * itemsize(dtype)) if offsets else (0,)


def header_json(plan: ShardPlan, digests: Sequence[Sequence[str]]) -> bytes:
    """Return the JSON without padding; ``__metadata__`` first, then the tensors in file order."""
    tensors: dict[str, _Tensor] = {}
    sharding: dict[str, dict[str, tuple[int, ...]]] = {}
    entries: dict[str, Any] = {"__metadata__": None}
    for i in plan.order:
        piece, key, start = plan.pieces[i], plan.keys[i], plan.starts[i] - plan.data_start
        box, dtype = piece.box, piece.dtype
        tensors[key] = _Tensor(piece.fqn, piece.global_shape, box.offsets, box.sizes, dtype, digests[i])
        tag, shape = stored_form(dtype, box.sizes)
        sharding[key] = {"saved_offsets": _stored_offsets(dtype, box.offsets)}
        entries[key] = _Entry(tag, shape, (start, start + plan.nbytes[i]))
    if plan.packed is not None:
        key, nbytes = plan.packed
        start = plan.size - plan.data_start - nbytes
        sharding[key] = {"saved_offsets": (0,)}
        entries[key] = _Entry("U8", (nbytes,), (start, start + nbytes))
    reused = _reused_json(plan, digests)
    ours = {
        "version": REUSING if reused else VERSION,
        "rank": plan.rank,
        "world_size": plan.world_size,
        "save_id": plan.save_id,
        "block": plan.block,
        "tensors": tensors,
        "objects": msgspec.Raw(plan.objects),
        "reused": reused,
    }
    if reused:
        ours["files"] = [[file.path, file.size, file.header] for file in plan.files]
    if plan.packed is not None:
        ours["packed"] = plan.packed[0]
    entries["__metadata__"] = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": msgspec.json.encode(sharding).decode(),
        "distckpt": msgspec.json.encode(ours).decode(),
    }
    return msgspec.json.encode(entries)


def _reused_json(plan: ShardPlan, digests: Sequence[Sequence[str]]) -> list[_Reused]:
    """Return the boxes that are not whole in this file; own runs as [blocks], others as [blocks, file, byte]."""
    number = {file.path: i for i, file in enumerate(plan.files)}
    return [
        _Reused(
            fqn=piece.fqn,
            shape=piece.global_shape,
            offsets=piece.box.offsets,
            sizes=piece.box.sizes,
            dtype=piece.dtype,
            digests=digests[i],
            key=plan.keys[i],
            runs=[[r.count] if r.path is None else [r.count, number[r.path], r.start] for r in plan.runs[i]],
        )
        for i, piece in enumerate(plan.pieces)
        if plan.runs[i]
    ]
