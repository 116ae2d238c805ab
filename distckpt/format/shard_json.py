"""The JSON of a shard's header: what a plan and its digests become in the file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from distckpt.format.digest import block_count
from distckpt.format.dtypes import itemsize, safetensors_tag, stored_form
from distckpt.format.limits import REUSING, VERSION

if TYPE_CHECKING:
    from distckpt.format.shard import ShardPlan


_NO_DIGEST = "0" * 32
_MARK = "\0"


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


def header_length(plan: ShardPlan) -> int:
    """Return the length of a header's JSON; digests are equally long, so it is known before any is made.

    Of a shard that is written whole all but two texts are known from the save before.
    """
    key = (plan.block, plan.rank, plan.world_size)
    if not _is_whole(plan):
        return _draft_length(plan)
    known: int | None = plan.placed.constant.get(key)
    if known is None:
        known = plan.placed.constant[key] = _draft_length(replace(plan, save_id="", objects=b"0")) - 1
    return known + len(_in_text(msgspec.json.encode(plan.save_id)[1:-1])) + len(_in_text(plan.objects))


def _draft_length(plan: ShardPlan) -> int:
    return len(header_json(plan, [[_NO_DIGEST] * block_count(size, plan.block) for size in plan.nbytes]))


def _is_whole(plan: ShardPlan) -> bool:
    """Whether all of its pieces are written."""
    return plan.order is plan.placed.order


def _lists(plan: ShardPlan) -> tuple[bytes, str]:
    """Return the JSON of the tensors as safetensors has them, in file order, and of DCP's sharding.

    Both are the same in every save of the same pieces, unless blocks are reused.
    """
    known: tuple[bytes, str] | None = plan.placed.constant.get(_lists) if _is_whole(plan) else None
    if known is not None:
        return known
    sharding: dict[str, dict[str, tuple[int, ...]]] = {}
    entries: dict[str, _Entry] = {}
    for i in plan.order:
        piece, key, start = plan.pieces[i], plan.keys[i], plan.starts[i] - plan.data_start
        tag, shape = stored_form(piece.dtype, piece.box.sizes)
        sharding[key] = {"saved_offsets": _stored_offsets(piece.dtype, piece.box.offsets)}
        entries[key] = _Entry(tag, shape, (start, start + plan.nbytes[i]))
    if plan.packed is not None:
        key, nbytes = plan.packed
        start = plan.size - plan.data_start - nbytes
        sharding[key] = {"saved_offsets": (0,)}
        entries[key] = _Entry("U8", (nbytes,), (start, start + nbytes))
    found = msgspec.json.encode(entries), msgspec.json.encode(sharding).decode()
    if _is_whole(plan):
        plan.placed.constant[_lists] = found
    return found


def header_json(plan: ShardPlan, digests: Sequence[Sequence[str]]) -> bytes:
    """Return the JSON without padding; ``__metadata__`` first, then the tensors in file order."""
    entries, sharding = _lists(plan)
    reused = _reused_json(plan, digests)
    before = {
        "version": REUSING if reused else VERSION,
        "rank": plan.rank,
        "world_size": plan.world_size,
        "save_id": plan.save_id,
        "block": plan.block,
    }
    after: dict[str, object] = {"objects": msgspec.Raw(plan.objects), "reused": reused}
    if reused:
        after["files"] = [[file.path, file.size, file.header] for file in plan.files]
    if plan.packed is not None:
        after["packed"] = plan.packed[0]
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": sharding, "distckpt": ""}
    head = (
        msgspec.json.encode({"__metadata__": metadata})[: -len('"}}')],
        _in_text(msgspec.json.encode(before)[:-1] + b',"tensors":'),
        _tensors(plan, digests),
        _in_text(b"," + msgspec.json.encode(after)[1:]),
        b'"}',
    )
    return b"".join((*head, b"}" if entries == b"{}" else b"," + entries[1:]))


def _tensors(plan: ShardPlan, digests: Sequence[Sequence[str]]) -> bytes:
    """Return the JSON of all tensors that are whole in the file, within a text.

    Digests apart it is the same in every save of the same pieces, so it is kept as what stands between them.
    """
    constant = plan.placed.constant if _is_whole(plan) else {}
    key = (_tensors, plan.block)
    if key not in constant:
        constant[key] = _between_digests(plan)
    between: list[str] | None = constant[key]
    if between is None:
        return _tensors_json(plan, digests)
    text = [""] * (2 * len(between) - 1)
    text[::2], text[1::2] = between, list(itertools.chain.from_iterable(digests[i] for i in plan.order))
    return "".join(text).encode()


def _between_digests(plan: ShardPlan) -> list[str] | None:
    """Return the pieces of ``_tensors_json`` before, between and after the digests; None if a name looks like a mark."""
    counts = [block_count(size, plan.block) for size in plan.nbytes]
    marked = _tensors_json(plan, [[_MARK] * count for count in counts])
    between = marked.decode().split(_in_text(msgspec.json.encode(_MARK)[1:-1]).decode())
    alike: dict[str, str] = {}  # what stands between two digests of a tensor is one object for all
    between = [alike.setdefault(text, text) for text in between]
    return between if len(between) == 1 + sum(counts[i] for i in plan.order) else None


def _tensors_json(plan: ShardPlan, digests: Sequence[Sequence[str]]) -> bytes:
    tensors: dict[str, _Tensor] = {}
    for i in plan.order:
        piece = plan.pieces[i]
        box = piece.box
        tensors[plan.keys[i]] = _Tensor(piece.fqn, piece.global_shape, box.offsets, box.sizes, piece.dtype, digests[i])
    return _in_text(msgspec.json.encode(tensors))


def _in_text(text: bytes) -> bytes:
    """Return what stands in a JSON string for this text, without the quotes."""
    return msgspec.json.encode(text.decode())[1:-1]


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
