"""Plans: which boxes each rank writes. Pure functions of (shape, mesh, placements) and a rank; no collective, no torch.

A tensor that several ranks hold is written once: the replicas share their common boxes (``format/shares.py``).
Nothing here makes an object for each tensor on each rank: a rank's boxes are computed when that rank is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from distckpt.boxes import Box, tiling_error
from distckpt.dcp.cover import added, cover_of, cover_of_table, whole_cover
from distckpt.errors import IncompatibleState
from distckpt.format.box_columns import BoxColumns
from distckpt.format.dtypes import itemsize
from distckpt.format.layout import Layout, Mesh, held_boxes, parse_placement, replica_of
from distckpt.format.manifest import MeshEntry, TensorEntry
from distckpt.format.placing import Piece
from distckpt.format.shares import Group, group_of, line_of


class Row(msgspec.Struct, frozen=True, gc=False):
    """One tensor in a table. ``layout`` None: a plain tensor, whole on each rank that lists it."""

    dtype: str
    shape: tuple[int, ...]
    layout: Layout | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The merged table: one layout per tensor, and for every object the ranks whose values are stored."""

    world_size: int
    tensors: Mapping[str, Row]
    aliases: Mapping[str, str]
    objects: Mapping[str, str]
    sources: Mapping[str, tuple[int, ...]]
    """Replicated object or groups to the ranks that send theirs to the leader (normally only rank 0)."""
    shared: Mapping[str, int] = field(default_factory=dict)
    """Replicated object to a number, equal for objects that the same ranks have: those are compared together."""


def gathered(plan: Plan) -> Plan:
    """Return the plan of a full save: rank 0 writes every tensor whole, other ranks only their own objects."""
    leader = Layout(Mesh.flat([0]), ("R",))
    rows = {fqn: Row(row.dtype, row.shape, leader) for fqn, row in plan.tensors.items()}
    return Plan(plan.world_size, rows, plan.aliases, plan.objects, plan.sources, plan.shared)


def pieces_for(plan: Plan, rank: int) -> list[Piece]:
    """Return the boxes that a rank writes, in order of FQN. Pure: any rank can compute any other's.

    ``plan`` may be the part of it that the rank's own table offers.
    """
    groups: dict[Group, list[Piece]] = {}
    out: list[Piece] = []
    for fqn, row in plan.tensors.items():
        assert row.layout is not None
        boxes = [Piece(fqn, row.dtype, row.shape, h.box) for h in held_boxes(row.shape, row.layout, rank)]
        if replica_of(row.layout, rank)[1] == 1:
            out += boxes
        else:
            groups.setdefault(group_of(row.layout), []).extend(boxes)
    for (mesh, mask), boxes in groups.items():
        replica = replica_of(Layout(mesh, tuple("R" if r else "S(0)" for r in mask)), rank)
        out += split_among_replicas(boxes, *replica)
    return sorted(out, key=lambda p: (p.fqn, p.box))


def split_among_replicas(pieces: Sequence[Piece], index: int, count: int) -> list[Piece]:
    """Return the index-th replica's share of boxes that ``count`` ranks all hold (see ``format/shares.py``)."""
    line = line_of([p.box for p in pieces], [itemsize(p.dtype) for p in pieces], count)
    out = []
    for i, first, last in line.share(index):
        piece = pieces[i]
        box = piece.box if last - first == line.rows[i] else piece.box.rows(first, last)
        out.append(Piece(piece.fqn, piece.dtype, piece.global_shape, box))
    return out


def check_layouts(plan: Plan) -> None:
    """Prove from the layouts alone that the ranks hold every element; ``IncompatibleState`` names the first hole.

    O(tensors): placements S, SS and R cover whatever the mesh, a ZeRO partition covers if it is long enough, and listed
    boxes are added up. What ranks really write is proved by ``Plan`` receipts (see ``dcp/cover.py``).
    """
    for fqn, row in plan.tensors.items():
        layout, problem = row.layout, None
        assert layout is not None
        if isinstance(layout.explicit, BoxColumns):
            problem = _explicit_problem(fqn, row, layout.explicit)
        else:
            for extent, text in zip(layout.mesh.shape, layout.placements, strict=True):
                p = parse_placement(text)
                end = p.offset + math.prod(row.shape)
                if p.kind == "F" and extent * p.partition < end:
                    problem = f"{extent} partitions of {p.partition} elements end before the tensor does, at {end}"
        if problem:
            raise _contradiction(fqn, row, problem)


def _explicit_problem(fqn: str, row: Row, columns: BoxColumns) -> str | None:
    table = columns.table()
    if row.shape and columns.boxes and columns.ndim == len(row.shape):
        inside = (table[:, 0] >= 0).all() and (table[:, 0] + table[:, 1] <= row.shape).all()
        if inside and cover_of_table(fqn, table, "boxes") == whole_cover([(fqn, row.shape)], "boxes"):
            return None
    return _tiling_problem(row, [box for held in columns for box in held])  # slower, and says what is wrong


def check_tiling(plan: Plan, by_rank: Sequence[Sequence[Piece]]) -> None:
    """Prove that all ranks' pieces cover every tensor exactly once; ``IncompatibleState`` names the first that fails."""
    covered = added(cover_of(((p.fqn, p.box) for p in pieces), "pieces") for pieces in by_rank)
    if covered == whole_cover(((fqn, row.shape) for fqn, row in plan.tensors.items()), "pieces"):
        return
    boxes: dict[str, list[Box]] = {fqn: [] for fqn in plan.tensors}
    for pieces in by_rank:
        for piece in pieces:
            boxes[piece.fqn].append(piece.box)
    for fqn, row in plan.tensors.items():
        problem = _tiling_problem(row, boxes[fqn])
        if problem:
            raise _contradiction(fqn, row, problem)


def _tiling_problem(row: Row, boxes: Sequence[Box]) -> str | None:
    problem = tiling_error(row.shape, boxes)
    if problem is None and not math.prod(row.shape) and len(boxes) != 1:
        problem = f"{len(boxes)} boxes for a tensor without elements"
    return problem


def _contradiction(fqn: str, row: Row, problem: str) -> IncompatibleState:
    return IncompatibleState(f"{fqn} {list(row.shape)}: {problem}; the layouts that ranks report contradict each other")


def manifest_tensors(plan: Plan) -> tuple[list[MeshEntry], dict[str, TensorEntry]]:
    """Return the manifest's mesh table and tensor entries: O(tensors + meshes), whatever the world size."""
    meshes: dict[Mesh, int] = {}
    entries = {}
    for fqn, row in plan.tensors.items():
        assert row.layout is not None
        explicit = None
        if row.layout.explicit is not None:
            explicit = [[[list(b.offsets), list(b.sizes)] for b in held] for held in row.layout.explicit]
        entries[fqn] = TensorEntry(
            dtype=row.dtype,
            shape=list(row.shape),
            mesh=meshes.setdefault(row.layout.mesh, len(meshes)),
            placements=list(row.layout.placements),
            boxes=explicit,
        )
    return [MeshEntry(shape=list(m.shape), ranks=runs(m.ranks)) for m in meshes], entries


def runs(ranks: Sequence[int]) -> list[list[int]]:
    """Return ranks as half-open runs: ``[4, 5, 6, 0] -> [[4, 7], [0, 1]]``."""
    out: list[list[int]] = []
    for rank in ranks:
        if out and out[-1][1] == rank:
            out[-1][1] += 1
        else:
            out.append([rank, rank + 1])
    return out


def infer_layout(shape: tuple[int, ...], by_rank: Mapping[int, Sequence[Box]]) -> Layout:
    """Return a layout for boxes that somebody else's plan gave to ranks: whole, row shards, or else explicit."""
    ranks = sorted(by_rank, key=lambda r: (min((b.offsets for b in by_rank[r]), default=()), r))
    if len(ranks) == 1 and list(by_rank[ranks[0]]) == [Box.whole(shape)]:
        return Layout(Mesh.flat(ranks), ("R",))
    if shape:
        rows = Layout(Mesh.flat(ranks), ("S(0)",))
        if all([h.box for h in held_boxes(shape, rows, r)] == list(by_rank[r]) for r in ranks):
            return rows
    return Layout(Mesh.flat(ranks), ("E",), tuple(tuple(by_rank[r]) for r in ranks))
