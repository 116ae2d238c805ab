"""Plans: which boxes each rank writes. Pure functions of the ranks' tables; no collective, no torch.

Every rank describes what it holds in a table. Equal tables (the usual case) mean that every rank can compute the
plan alone; otherwise (pipeline stages) the leader merges the distinct ones. A tensor that several ranks hold is
written once: the replicas split their common boxes by bytes, cutting large ones between rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distckpt.boxes import Box, tiling_error
from distckpt.errors import IncompatibleState, ReplicasDiffer
from distckpt.format import digest as digests
from distckpt.format import typed_json
from distckpt.format.dtypes import itemsize
from distckpt.format.layout import Layout, Mesh, held_boxes, replica_of, replicated
from distckpt.format.manifest import MeshEntry, TensorEntry
from distckpt.format.shard import Piece

CUT_BYTES = 1 << 20
"""Replicated boxes up to this size go to one replica whole: cutting them would cost more than it balances."""
CHECKED_BOXES = 500_000
"""The tiling of a plan is proved box by box up to this many boxes; beyond it, closed forms are trusted."""


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor in a table. ``layout`` None: a plain tensor, whole on each rank that lists it."""

    dtype: str
    shape: tuple[int, ...]
    layout: Layout | None


@dataclass(frozen=True, slots=True)
class Table:
    """What one rank holds, without any data: the same structure every save, so a digest of it can be compared."""

    tensors: Mapping[str, Row]
    aliases: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    """Object name to kind (``replicated``, ``per_rank``, ``drop_on_resize``, ``groups``)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The merged table: one layout per tensor, and for every object the ranks whose values are stored."""

    world_size: int
    tensors: Mapping[str, Row]
    aliases: Mapping[str, str]
    objects: Mapping[str, str]
    sources: Mapping[str, tuple[int, ...]]
    """Replicated object or groups to the ranks that send theirs to the leader (normally only rank 0)."""


def encode_table(table: Table) -> bytes:
    """Return canonical bytes; equal tables give equal bytes."""
    meshes: dict[Mesh, int] = {}
    rows = {fqn: _encode_row(row, meshes) for fqn, row in table.tensors.items()}
    return typed_json.canonical(
        {
            "meshes": [[list(m.shape), list(m.ranks)] for m in meshes],
            "tensors": rows,
            "aliases": dict(table.aliases),
            "objects": dict(table.objects),
        }
    )


def _encode_row(row: Row, meshes: dict[Mesh, int]) -> list[Any]:
    if row.layout is None:
        return [row.dtype, list(row.shape)]
    mesh = meshes.setdefault(row.layout.mesh, len(meshes))
    explicit = None
    if row.layout.explicit is not None:
        explicit = [[[list(b.offsets), list(b.sizes)] for b in boxes] for boxes in row.layout.explicit]
    return [row.dtype, list(row.shape), mesh, list(row.layout.placements), explicit]


def decode_table(data: bytes) -> Table:
    """Inverse of ``encode_table``."""
    plain: Any = typed_json.strict_loads(data, where="a rank's table", max_bytes=1 << 30)
    meshes = [Mesh(tuple(shape), tuple(ranks)) for shape, ranks in plain["meshes"]]
    rows = {}
    for fqn, (dtype, shape, *rest) in plain["tensors"].items():
        layout = None
        if rest:
            mesh, placements, explicit = rest
            boxes = None
            if explicit is not None:
                boxes = tuple(tuple(Box(tuple(o), tuple(s)) for o, s in held) for held in explicit)
            layout = Layout(meshes[mesh], tuple(placements), boxes)
        rows[fqn] = Row(dtype, tuple(shape), layout)
    return Table(rows, plain["aliases"], plain["objects"])


def merge_tables(by_rank: Sequence[Table]) -> Plan:
    """Merge every rank's table into one plan.

    ``by_rank[r]`` may be the same object for many ranks; distinct ones are compared once. Raises ``ReplicasDiffer``
    where ranks disagree on a tensor's dtype, shape or layout, or on an alias or an object's kind, and
    ``IncompatibleState`` where a rank of a tensor's mesh does not have the tensor; both name FQN and ranks.
    """
    distinct: dict[int, tuple[Table, list[int]]] = {}
    for rank, table in enumerate(by_rank):
        distinct.setdefault(id(table), (table, []))[1].append(rank)
    rows: dict[str, Row] = {}
    holders: dict[str, list[int]] = {}
    objects: dict[str, str] = {}
    aliases: dict[str, str] = {}
    sources: dict[str, list[int]] = {}
    for table, ranks in distinct.values():
        for fqn, row in table.tensors.items():
            known = rows.setdefault(fqn, row)
            if known != row:
                joined = _join(known, row)
                if joined is None:
                    raise ReplicasDiffer(
                        f"{fqn}: ranks {holders[fqn]} hold {_text(known)}, ranks {ranks} hold {_text(row)}; a tensor "
                        "must have one dtype, global shape and layout on all ranks"
                    )
                rows[fqn] = joined
            holders.setdefault(fqn, []).extend(ranks)
        for name, kind in table.objects.items():
            if objects.setdefault(name, kind) != kind:
                raise ReplicasDiffer(f"object {name} is {objects[name]} on some ranks and {kind} on ranks {ranks}")
            sources.setdefault(name, []).append(ranks[0])
        for alias, target in table.aliases.items():
            if aliases.setdefault(alias, target) != target:
                raise ReplicasDiffer(
                    f"{alias} is tied to {aliases[alias]} on some ranks and to {target} on ranks {ranks}"
                )
    clash = sorted(set(aliases) & set(rows))
    if clash:
        raise ReplicasDiffer(
            f"{clash[0]} is tied to {aliases[clash[0]]} on some ranks and a tensor of its own on ranks {holders[clash[0]]}; "
            "tie it on all ranks or on none"
        )
    resolved = {fqn: _resolve(fqn, row, holders[fqn]) for fqn, row in sorted(rows.items())}
    kept = {
        n: tuple(sorted(r)) if objects[n] == "groups" else (min(r),)
        for n, r in sources.items()
        if objects[n] in ("replicated", "groups")
    }
    return Plan(len(by_rank), resolved, dict(sorted(aliases.items())), dict(sorted(objects.items())), kept)


def _join(known: Row, row: Row) -> Row | None:
    """Return the row of a tensor that several sub-meshes hold alike, each a whole copy; None where they differ.

    FSDP2 over the data dimension of a 2-D mesh leaves parameters without tensor parallelism on one sub-mesh for each
    place in the other dimension. Together they are one mesh with a leading dimension that replicates.
    """
    if (known.dtype, known.shape) != (row.dtype, row.shape) or known.layout is None or row.layout is None:
        return None
    first, other = known.layout, row.layout
    if first.explicit is not None or other.explicit is not None:
        return None
    copies = 1
    if len(first.mesh.shape) == len(other.mesh.shape) + 1 and first.placements[0] == "R":
        copies, shape, placements = first.mesh.shape[0], first.mesh.shape[1:], first.placements[1:]
    else:
        shape, placements = first.mesh.shape, first.placements
    if (shape, placements) != (other.mesh.shape, other.placements):
        return None
    size = math.prod(shape)
    if other.mesh.ranks in (first.mesh.ranks[i * size : (i + 1) * size] for i in range(copies)):
        return known  # a further rank of a sub-mesh that was joined before
    if set(first.mesh.ranks) & set(other.mesh.ranks):
        return None
    mesh = Mesh((copies + 1, *shape), first.mesh.ranks + other.mesh.ranks)
    return Row(known.dtype, known.shape, Layout(mesh, ("R", *placements)))


def _resolve(fqn: str, row: Row, holders: list[int]) -> Row:
    if row.layout is None:
        return Row(row.dtype, row.shape, replicated(sorted(holders)))
    absent = sorted(set(row.layout.mesh.ranks) - set(holders))
    if absent:
        raise IncompatibleState(f"{fqn} lies on a mesh with ranks {absent}, which do not offer it to the save")
    return row


def _text(row: Row) -> str:
    layout = "a plain tensor" if row.layout is None else f"{row.layout.placements} on mesh {row.layout.mesh.shape}"
    return f"{row.dtype}{list(row.shape)} as {layout}"


def gathered(plan: Plan) -> Plan:
    """Return the plan of a full save: rank 0 writes every tensor whole, other ranks only their own objects."""
    leader = Layout(Mesh.flat([0]), ("R",))
    rows = {fqn: Row(row.dtype, row.shape, leader) for fqn, row in plan.tensors.items()}
    return Plan(plan.world_size, rows, plan.aliases, plan.objects, plan.sources)


def pieces_for(plan: Plan, rank: int) -> list[Piece]:
    """Return the boxes that a rank writes, in order of FQN. Pure: any rank can compute any other's."""
    groups: dict[tuple[Mesh, tuple[bool, ...]], list[Piece]] = {}
    out: list[Piece] = []
    for fqn, row in plan.tensors.items():
        assert row.layout is not None
        held = held_boxes(row.shape, row.layout, rank)
        boxes = [Piece(fqn, row.dtype, row.shape, h.box) for h in held]
        if replica_of(row.layout, rank)[1] == 1:
            out.extend(boxes)
        else:
            key = (row.layout.mesh, tuple(p == "R" for p in row.layout.placements))
            groups.setdefault(key, []).extend(boxes)
    for (mesh, is_replicated), boxes in groups.items():
        layout = Layout(mesh, tuple("R" if r else "S(0)" for r in is_replicated))
        out.extend(split_among_replicas(boxes, *replica_of(layout, rank)))
    return sorted(out, key=lambda p: (p.fqn, p.box))


def split_among_replicas(pieces: Sequence[Piece], index: int, count: int) -> list[Piece]:
    """Return the index-th replica's share of boxes that ``count`` ranks all hold.

    The boxes' bytes are laid end to end and cut in ``count`` equal parts; a cut within a large box falls between
    two rows, within a small one at its nearer end. All replicas compute the same cuts, so each byte is written once.
    """
    total = sum(_nbytes(p) for p in pieces)
    low, high = total * index // count, total * (index + 1) // count
    out, at = [], 0
    for piece in pieces:
        nbytes = _nbytes(piece)
        start = 0 if index == 0 else _cut_row(piece, nbytes, low - at)
        stop = _rows(piece) if index == count - 1 else _cut_row(piece, nbytes, high - at)
        if start < stop if nbytes else index == 0:
            whole = stop - start == _rows(piece)
            box = piece.box if whole or nbytes == 0 else piece.box.rows(start, stop)
            out.append(Piece(piece.fqn, piece.dtype, piece.global_shape, box))
        at += nbytes
    return out


def _nbytes(piece: Piece) -> int:
    return piece.box.numel * itemsize(piece.dtype)


def _rows(piece: Piece) -> int:
    return piece.box.sizes[0] if piece.box.sizes else 1


def _cut_row(piece: Piece, nbytes: int, position: int) -> int:
    """Return how many rows of the piece lie before a cut ``position`` bytes from its start."""
    rows = _rows(piece)
    if position <= 0 or nbytes == 0:
        return 0
    if position >= nbytes:
        return rows
    if nbytes <= CUT_BYTES or not piece.box.sizes:
        return rows if position * 2 > nbytes else 0
    return position * rows // nbytes


def check_tiling(plan: Plan, by_rank: Sequence[Sequence[Piece]]) -> None:
    """Prove that all ranks' pieces cover every tensor exactly once; ``IncompatibleState`` names the first that fails."""
    if sum(map(len, by_rank)) > CHECKED_BOXES:
        return
    boxes: dict[str, list[Box]] = {fqn: [] for fqn in plan.tensors}
    for pieces in by_rank:
        for piece in pieces:
            boxes[piece.fqn].append(piece.box)
    for fqn, row in plan.tensors.items():
        problem = tiling_error(row.shape, boxes[fqn])
        if problem is None and not math.prod(row.shape) and len(boxes[fqn]) != 1:
            problem = f"{len(boxes[fqn])} boxes for a tensor without elements"
        if problem:
            raise IncompatibleState(
                f"{fqn} {list(row.shape)}: {problem}; the layouts that ranks report contradict each other"
            )


def pieces_digest(pieces: Sequence[Piece]) -> str:
    """Return a digest of which boxes are written, for comparing what a rank wrote with what it was to write."""
    return digests.digest(repr([(p.fqn, p.dtype, p.box.offsets, p.box.sizes) for p in pieces]).encode())


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
