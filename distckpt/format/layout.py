"""Layouts: which boxes of a global tensor each rank holds, from its mesh and placements. Pure, no torch, no collective.

A layout is a function of (global shape, mesh, placements), so a manifest stores it once per tensor instead of once
per rank, and any process can compute any rank's boxes alone. The placements are DTensor's: ``R`` replicate,
``S(dim)`` shard with ``torch.chunk`` semantics, ``SS(dim,factor)`` strided shard (FSDP2 + TP). ``F(offset,partition)``
is a ZeRO partition: the tensor lies flattened at ``offset`` in a buffer of which the i-th rank of that mesh dimension
holds elements ``[i*partition, (i+1)*partition)``. ``E`` lists boxes for whatever has no closed form.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import msgspec

from distckpt.boxes import Box, flat_range_to_boxes
from distckpt.format.box_columns import BoxColumns

Interval = tuple[int, int]
_PLACEMENT = re.compile(
    r"R|E|S\((0|[1-9][0-9]?)\)|SS\((0|[1-9][0-9]?),([1-9][0-9]{0,5})\)|F\((0|[1-9][0-9]{0,17}),([1-9][0-9]{0,17})\)"
)


@dataclass(frozen=True, slots=True)
class Placement:
    """One mesh dimension's placement.

    ``kind`` is ``R``, ``S``, ``SS``, ``F`` or ``E``; ``factor`` is SS's split factor; ``offset`` and ``partition`` are
    F's, in elements.
    """

    kind: str
    dim: int = 0
    factor: int = 1
    offset: int = 0
    partition: int = 0


@lru_cache(maxsize=4096)
def parse_placement(text: str) -> Placement:
    """Parse ``R``, ``E``, ``S(0)``, ``SS(0,4)`` or ``F(100,64)``; raises ``ValueError`` for anything else."""
    match = _PLACEMENT.fullmatch(text)
    if match is None:
        raise ValueError(f"unknown placement {text!r}: want R, S(dim), SS(dim,factor), F(offset,partition) or E")
    if match[1] is not None:
        return Placement("S", int(match[1]))
    if match[2] is not None:
        return Placement("SS", int(match[2]), int(match[3]))
    if match[4] is not None:
        return Placement("F", offset=int(match[4]), partition=int(match[5]))
    return Placement(text)


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks in an n-dimensional grid; ``ranks`` is flattened row-major.

    Many tensors share one mesh of thousands of ranks, so it is hashed once and compared by identity first.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if math.prod(self.shape) != len(self.ranks):
            raise ValueError(f"mesh of shape {self.shape} with {len(self.ranks)} ranks")
        object.__setattr__(self, "_hash", hash((self.shape, self.ranks)))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def flat(cls, ranks: Sequence[int]) -> Mesh:
        """Return a one-dimensional mesh over these ranks."""
        return cls((len(ranks),), tuple(ranks))

    def position(self, rank: int) -> int | None:
        """Return where the rank stands in ``ranks``, or None where it has no place."""
        return _positions(self).get(rank)

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """Return the rank's place in the grid, or None where it has none."""
        return _coordinate(self, rank)

    def rank_at(self, coordinate: Sequence[int]) -> int:
        """Return the rank at a place in the grid."""
        position = 0
        for extent, index in zip(self.shape, coordinate, strict=True):
            position = position * extent + index
        return self.ranks[position]


@lru_cache(maxsize=4096)
def interned(mesh: Mesh) -> Mesh:
    """Return one object for all meshes that are equal, so that comparing them again costs nothing."""
    return mesh


@lru_cache(maxsize=1024)
def _positions(mesh: Mesh) -> dict[int, int]:
    return {rank: i for i, rank in enumerate(mesh.ranks)}


@lru_cache(maxsize=16384)
def _coordinate(mesh: Mesh, rank: int) -> tuple[int, ...] | None:
    position = mesh.position(rank)
    if position is None:
        return None
    out = []
    for extent in reversed(mesh.shape):
        position, index = divmod(position, extent)
        out.append(index)
    return tuple(reversed(out))


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tensor lies over a mesh. ``explicit[i]`` are the boxes of the mesh's i-th rank where placements are E."""

    mesh: Mesh
    placements: tuple[str, ...]
    explicit: Sequence[tuple[Box, ...]] | None = None

    def __post_init__(self) -> None:
        if self.explicit is not None and not isinstance(self.explicit, BoxColumns):
            object.__setattr__(self, "explicit", BoxColumns.of(self.explicit))


class Held(msgspec.Struct, frozen=True, gc=False):
    """A box of the global tensor and where it starts in the rank's own local tensor."""

    box: Box
    local: tuple[int, ...]


def replicated(ranks: Sequence[int]) -> Layout:
    """Return the layout of a tensor that each of these ranks holds whole."""
    return Layout(interned(Mesh.flat(ranks)), ("R",))


def _chunk(intervals: tuple[Interval, ...], parts: int, index: int) -> tuple[Interval, ...]:
    """Return the index-th of ``parts`` pieces of concatenated intervals, cut as ``torch.chunk`` cuts."""
    total = sum(stop - start for start, stop in intervals)
    size = -(-total // parts)
    return _slice(intervals, min(total, index * size), min(total, (index + 1) * size))


def _slice(intervals: tuple[Interval, ...], start: int, stop: int) -> tuple[Interval, ...]:
    out: list[Interval] = []
    at = 0
    for begin, end in intervals:
        low, high = max(start, at), min(stop, at + end - begin)
        if low < high:
            piece = (begin + low - at, begin + high - at)
            if out and out[-1][1] == piece[0]:
                piece = (out.pop()[0], piece[1])
            out.append(piece)
        at += end - begin
    return tuple(out)


def _split(intervals: tuple[Interval, ...], placement: Placement, parts: int, index: int) -> tuple[Interval, ...]:
    if placement.kind == "S":
        return _chunk(intervals, parts, index)
    # A strided shard cuts the dimension into `factor` chunks first and takes its share of each: the later mesh
    # dimension (TP) then finds exactly its own chunk (torch/distributed/tensor/placement_types.py, _StridedShard).
    pieces = (_chunk(_chunk(intervals, placement.factor, i), parts, index) for i in range(placement.factor))
    return _slice(tuple(itertools.chain.from_iterable(pieces)), 0, 1 << 62)


_Splits = tuple[tuple[int, ...], tuple[tuple[Placement, int], ...]]


@lru_cache(maxsize=65536)
def _dim_intervals(extent: int, splits: tuple[tuple[Placement, int], ...], at: tuple[int, ...]) -> tuple[Interval, ...]:
    intervals: tuple[Interval, ...] = ((0, extent),) if extent else ()
    for (placement, parts), index in zip(splits, at, strict=True):
        intervals = _split(intervals, placement, parts, index)
    return intervals


@lru_cache(maxsize=4096)
def _splits_by_dim(ndim: int, layout_shape: tuple[int, ...], placements: tuple[str, ...]) -> tuple[_Splits, ...]:
    """Return for each tensor dimension what cuts it: mesh dimensions, and (placement, number of parts) of each."""
    by_dim: list[list[tuple[int, Placement]]] = [[] for _ in range(ndim)]
    for mesh_dim, text in enumerate(placements):
        placement = parse_placement(text)
        if placement.kind in ("S", "SS"):
            by_dim[placement.dim].append((mesh_dim, placement))
    return tuple((tuple(m for m, _ in found), tuple((p, layout_shape[m]) for m, p in found)) for found in by_dim)


def held_boxes(shape: Sequence[int], layout: Layout, rank: int) -> list[Held]:
    """Return what a rank holds of a tensor of this global shape, in the order of its local tensor.

    A rank outside the mesh holds nothing. A rank whose share is empty holds nothing, or, where the tensor itself
    has no elements or is 0-d, one box. Uneven strided shards yield several boxes.
    """
    coordinate = layout.mesh.coordinate(rank)
    if coordinate is None:
        return []
    if layout.explicit is not None:
        boxes = layout.explicit[layout.mesh.position(rank) or 0]
        return [Held(box, (0,) * box.ndim) for box in boxes]
    if not math.prod(shape):
        return [Held(Box.whole(shape), (0,) * len(shape))] if not any(coordinate) else []
    flat = flat_range(shape, layout, rank)
    if flat is not None:
        return [Held(box, (0,) * box.ndim) for box in flat_range_to_boxes(shape, *flat)]
    per_dim = [
        _dim_intervals(extent, splits, tuple([coordinate[m] for m in dims]))
        for extent, (dims, splits) in zip(
            shape, _splits_by_dim(len(shape), layout.mesh.shape, layout.placements), strict=True
        )
    ]
    return list(_product(tuple(per_dim)))


@lru_cache(maxsize=65536)
def _product(per_dim: tuple[tuple[Interval, ...], ...]) -> tuple[Held, ...]:
    """Return every combination of the intervals that a rank has in each dimension."""
    placed = []
    for intervals in per_dim:
        starts = itertools.accumulate((e - b for b, e in intervals), initial=0)
        placed.append(list(zip(intervals, starts, strict=False)))
    return tuple(
        Held(
            Box(tuple(i[0] for i, _ in combo), tuple(i[1] - i[0] for i, _ in combo)),
            tuple(start for _, start in combo),
        )
        for combo in itertools.product(*placed)
    )


def flat_range(shape: Sequence[int], layout: Layout, rank: int) -> tuple[int, int] | None:
    """Return the row-major element range ``(start, stop)`` of a rank's ZeRO partition; None for other layouts."""
    coordinate = layout.mesh.coordinate(rank)
    for mesh_dim, text in enumerate(layout.placements):
        placement = parse_placement(text)
        if placement.kind == "F":
            if coordinate is None:
                return (0, 0)
            numel, begin = math.prod(shape), coordinate[mesh_dim] * placement.partition - placement.offset
            start = min(max(begin, 0), numel)
            return (start, max(start, min(begin + placement.partition, numel)))
    return None


def local_shape(shape: Sequence[int], layout: Layout, rank: int) -> tuple[int, ...]:
    """Return the shape of the rank's local tensor under a closed-form layout."""
    coordinate = layout.mesh.coordinate(rank) or ()
    out = []
    cuts = _splits_by_dim(len(shape), layout.mesh.shape, layout.placements)
    for extent, (dims, splits) in zip(shape, cuts, strict=True):
        out.append(sum(e - b for b, e in _dim_intervals(extent, splits, tuple(coordinate[m] for m in dims))))
    return tuple(out)


def replica_of(layout: Layout, rank: int) -> tuple[int, int]:
    """Return (which replica this rank is, how many ranks hold the same boxes)."""
    coordinate = layout.mesh.coordinate(rank)
    if coordinate is None or layout.explicit is not None:
        return (0, 1)
    index, count = 0, 1
    for mesh_dim, text in enumerate(layout.placements):
        if text == "R":
            index = index * layout.mesh.shape[mesh_dim] + coordinate[mesh_dim]
            count *= layout.mesh.shape[mesh_dim]
    return index, count


def candidate_ranks(shape: Sequence[int], layout: Layout, box: Box) -> set[int]:
    """Return the ranks whose shards may hold a part of the box: every replica of every rank that holds any of it."""
    if layout.explicit is not None:
        assert isinstance(layout.explicit, BoxColumns)
        return {layout.mesh.ranks[i] for i in layout.explicit.meeting(box)}
    return {rank for cell in meeting_cells(shape, layout, box) for rank in replicas_at(layout, cell)}


def meeting_cells(shape: Sequence[int], layout: Layout, box: Box) -> list[tuple[int, ...]]:
    """Return the places in the mesh, 0 where it replicates, whose ranks may hold a part of the box.

    For closed-form layouts; work grows with the number of cells found, not with the mesh. Exact but for ZeRO
    partitions, which are judged by the box's first and last element.
    """
    if not box.numel:
        return []
    places = [[0] * len(layout.mesh.shape)]
    for mesh_dim, partitions in _meeting_partitions(shape, layout, box):
        places = [[*at[:mesh_dim], i, *at[mesh_dim + 1 :]] for at in places for i in partitions]
    cuts = _splits_by_dim(len(shape), layout.mesh.shape, layout.placements)
    for (dims, splits), extent, low, high in zip(cuts, shape, box.offsets, box.ends, strict=True):
        if not dims:
            continue
        found = _meeting_shards(extent, splits, low, high)
        merged = []
        for at in places:
            for indices in found:
                place = list(at)
                for mesh_dim, index in zip(dims, indices, strict=True):
                    place[mesh_dim] = index
                merged.append(place)
        places = merged
    return [tuple(at) for at in places]


def replicas_at(layout: Layout, cell: Sequence[int], indices: Iterable[int] | None = None) -> list[int]:
    """Return the ranks at a cell, in the order of their replica numbers; with ``indices`` only those replicas."""
    free = [m for m, text in enumerate(layout.placements) if text == "R"]
    if not free:
        return [layout.mesh.rank_at(cell)]
    if indices is None:
        indices = range(math.prod(layout.mesh.shape[m] for m in free))
    ranks = []
    for index in indices:
        place = list(cell)
        for m in reversed(free):
            index, place[m] = divmod(index, layout.mesh.shape[m])
        ranks.append(layout.mesh.rank_at(place))
    return ranks


def _meeting_partitions(shape: Sequence[int], layout: Layout, box: Box) -> list[tuple[int, range]]:
    """Return (mesh dimension, places in it) of an F whose partitions may meet the box."""
    for mesh_dim, text in enumerate(layout.placements):
        p = parse_placement(text)
        if p.kind == "F":
            low = high = 0
            for extent, offset, end in zip(shape, box.offsets, box.ends, strict=True):
                low, high = low * extent + offset, high * extent + end - 1
            last = min((p.offset + high) // p.partition, layout.mesh.shape[mesh_dim] - 1)
            return [(mesh_dim, range((p.offset + low) // p.partition, last + 1))]
    return []


@lru_cache(maxsize=65536)
def _meeting_shards(
    extent: int, splits: tuple[tuple[Placement, int], ...], low: int, high: int
) -> tuple[tuple[int, ...], ...]:
    """Return the places, one index for each split of a dimension, whose intervals meet ``[low, high)``."""
    found: list[tuple[int, ...]] = [()]
    for count, (placement, parts) in enumerate(splits):
        narrowed = []
        for at in found:
            intervals = _dim_intervals(extent, splits[:count], at)
            narrowed += [(*at, i) for i in _meeting_parts(intervals, placement, parts, low, high)]
        found = narrowed
    return tuple(found)


def _meeting_parts(intervals: tuple[Interval, ...], placement: Placement, parts: int, low: int, high: int) -> list[int]:
    """Return which of ``parts`` pieces of concatenated intervals meet ``[low, high)``: where ``_chunk`` cuts, inverted."""
    total = sum(end - begin for begin, end in intervals)
    factor = placement.factor if placement.kind == "SS" else 1
    chunk = max(1, -(-total // factor))
    found: set[int] = set()
    at = 0
    for begin, end in intervals:
        first, last = at + max(low, begin) - begin, at + min(high, end) - begin  # in the concatenation
        while first < last:
            start = first // chunk * chunk
            stop = min(start + chunk, total)
            size = -(-(stop - start) // parts)
            found.update(range((first - start) // size, (min(last, stop) - start - 1) // size + 1))
            first = stop
        at += end - begin
    return sorted(found)
