"""Tables: what one rank holds, as bytes, and how the tables of all ranks become one plan. Pure.

Ranks of a regular layout have the same table, and nothing but its digest travels. Otherwise (pipeline stages) ranks
fall into classes of equal tables; work and memory grow with the classes' tensors, never with tensors times ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import msgspec

from distckpt.dcp.planner import Plan, Row
from distckpt.errors import IncompatibleState, ReplicasDiffer
from distckpt.format import digest as digests
from distckpt.format.box_columns import BoxColumns
from distckpt.format.layout import Layout, Mesh, interned, replicated


@dataclass(frozen=True)
class Table:
    """What one rank holds, without any data: the same structure every save, so a digest of it can be compared."""

    tensors: Mapping[str, Row]
    aliases: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    """Object name to kind (``replicated``, ``per_rank``, ``drop_on_resize``, ``groups``)."""

    @cached_property
    def encoded(self) -> bytes:
        """The table as canonical bytes."""
        return encode_table(self)

    @cached_property
    def digest(self) -> str:
        """What is equal for equal tables, and for no others."""
        return digests.digest(self.encoded)


def encode_table(table: Table) -> bytes:
    """Return canonical bytes; equal tables give equal bytes. Meshes once each, as spans of ranks; boxes as columns."""
    meshes: dict[Mesh, int] = {}
    rows = [_encode_row(fqn, row, meshes) for fqn, row in sorted(table.tensors.items())]
    grids = [[mesh.shape, spans(mesh.ranks)] for mesh in meshes]
    return msgspec.msgpack.encode([grids, rows, sorted(table.aliases.items()), sorted(table.objects.items())])


def _encode_row(fqn: str, row: Row, meshes: dict[Mesh, int]) -> list[Any]:
    if row.layout is None:
        return [fqn, row.dtype, row.shape]
    explicit = row.layout.explicit.pack() if isinstance(row.layout.explicit, BoxColumns) else None
    mesh = meshes.setdefault(row.layout.mesh, len(meshes))
    return [fqn, row.dtype, row.shape, mesh, row.layout.placements, explicit]


def decode_table(data: bytes) -> Table:
    """Inverse of ``encode_table``; equal meshes of several tables become one object."""
    grids, rows, aliases, objects = msgspec.msgpack.decode(data)
    meshes = [_mesh(tuple(shape), tuple(map(tuple, runs))) for shape, runs in grids]
    tensors = {}
    for fqn, dtype, shape, *rest in rows:
        layout = None
        if rest:
            mesh, placements, explicit = rest
            layout = Layout(meshes[mesh], tuple(placements), None if explicit is None else BoxColumns.unpack(explicit))
        tensors[fqn] = Row(dtype, tuple(shape), layout)
    return Table(tensors, dict(aliases), dict(objects))


def spans(ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return ranks as arithmetic runs (first, count, step): ``[0, 8, 16, 3] -> [(0, 3, 8), (3, 1, 1)]``."""
    out = []
    at = 0
    while at < len(ranks):
        step = ranks[at + 1] - ranks[at] if at + 1 < len(ranks) else 1
        end = at + 1
        while end < len(ranks) and ranks[end] - ranks[end - 1] == step:
            end += 1
        if end - at == 2 and end < len(ranks):
            end, step = at + 1, 1  # two are no run: the second may begin one
        out.append((ranks[at], end - at, step))
        at = end
    return out


@lru_cache(maxsize=1024)
def _mesh(shape: tuple[int, ...], runs: tuple[tuple[int, int, int], ...]) -> Mesh:
    return interned(Mesh(shape, tuple(first + i * step for first, count, step in runs for i in range(count))))


def merge_tables(by_rank: Sequence[Table]) -> Plan:
    """Merge every rank's table into one plan.

    ``by_rank[r]`` may be the same object for many ranks; distinct ones are compared once. Raises ``ReplicasDiffer``
    where ranks disagree on a tensor's dtype, shape or layout, or on an alias or an object's kind, and
    ``IncompatibleState`` where a rank of a tensor's mesh does not have the tensor; both name FQN and ranks.
    """
    merging = _Merging(by_rank)
    offered: dict[str, list[int]] = {}
    held: dict[str, list[int]] = {}
    for number, table in enumerate(merging.tables):
        for fqn in table.tensors:
            offered.setdefault(fqn, []).append(number)
        for name in table.objects:
            held.setdefault(name, []).append(number)
    aliases = merging.aliases(offered)
    objects = {name: merging.kind(name, classes) for name, classes in sorted(held.items())}
    tensors = {fqn: merging.row(fqn, tuple(classes)) for fqn, classes in sorted(offered.items())}
    sources, shared = {}, {}
    numbers: dict[tuple[int, ...], int] = {}
    for name, kind in objects.items():
        ranks = tuple(merging.ranks[number][0] for number in held[name])
        if kind == "replicated":
            sources[name], shared[name] = ranks[:1], numbers.setdefault(tuple(held[name]), len(numbers))
        elif kind == "groups":
            sources[name] = ranks
    return Plan(len(by_rank), tensors, aliases, objects, sources, shared)


class _Merging:
    """The classes of equal tables, in order of their first ranks. What many tensors have in common is made once."""

    def __init__(self, by_rank: Sequence[Table]) -> None:
        ranks: dict[int, list[int]] = {}
        self.tables: list[Table] = []
        for rank, table in enumerate(by_rank):
            if id(table) not in ranks:
                self.tables.append(table)
            ranks.setdefault(id(table), []).append(rank)
        self.ranks = list(ranks.values())
        self._holders: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._whole: dict[tuple[int, ...], Layout] = {}
        self._absent: dict[tuple[Mesh, tuple[int, ...]], list[int]] = {}
        self._joined: dict[tuple[tuple[str, ...], tuple[Mesh, ...]], Layout | None] = {}

    def row(self, fqn: str, classes: tuple[int, ...]) -> Row:
        """Return the row of a tensor that these classes offer, its layout resolved."""
        first = self.tables[classes[0]].tensors[fqn]
        variants = {first: 0}
        for i, number in enumerate(classes):
            row = self.tables[number].tensors[fqn]
            if row is not first and variants.setdefault(row, i) == i and not _alike(first, row):
                raise self._contradiction(fqn, classes, i)
        layout = first.layout if len(variants) == 1 else self._join(tuple(variants))
        if layout is None and len(variants) > 1:
            raise self._contradiction(fqn, classes, max(variants.values()))
        if layout is None:
            if classes not in self._whole:
                self._whole[classes] = replicated(self._ranks_of(classes))
            return Row(first.dtype, first.shape, self._whole[classes])
        key = (layout.mesh, classes)
        if key not in self._absent:
            self._absent[key] = sorted(set(layout.mesh.ranks) - set(self._ranks_of(classes)))
        if self._absent[key]:
            raise IncompatibleState(
                f"{fqn} lies on a mesh with ranks {_few(self._absent[key])}, which do not offer it to the save"
            )
        return first if len(variants) == 1 else Row(first.dtype, first.shape, layout)

    def _contradiction(self, fqn: str, classes: tuple[int, ...], i: int) -> ReplicasDiffer:
        first, row = self.tables[classes[0]].tensors[fqn], self.tables[classes[i]].tensors[fqn]
        return ReplicasDiffer(
            f"{fqn}: ranks {_few(self._ranks_of(classes[:i]))} hold {_text(first)}, ranks {_few(self.ranks[classes[i]])} "
            f"hold {_text(row)}; a tensor must have one dtype, global shape and layout on all ranks"
        )

    def _join(self, rows: Sequence[Row]) -> Layout | None:
        """Return the layout of a tensor that several sub-meshes hold alike, each a whole copy; None where they overlap.

        FSDP2 over the data dimension of a 2-D mesh leaves parameters without tensor parallelism on one sub-mesh for
        each place in the other dimension. Together they are one mesh with a leading dimension that replicates.
        """
        layouts = [row.layout for row in rows if row.layout is not None]
        key = (layouts[0].placements, tuple(layout.mesh for layout in layouts))
        if key not in self._joined:
            placements, meshes = key
            ranks = tuple(rank for mesh in meshes for rank in mesh.ranks)
            grid = interned(Mesh((len(meshes), *meshes[0].shape), ranks))
            distinct = len(set(ranks)) == len(ranks)
            self._joined[key] = Layout(grid, ("R", *placements)) if distinct else None
        return self._joined[key]

    def _ranks_of(self, classes: tuple[int, ...]) -> tuple[int, ...]:
        if classes not in self._holders:
            self._holders[classes] = tuple(sorted(rank for number in classes for rank in self.ranks[number]))
        return self._holders[classes]

    def kind(self, name: str, classes: Sequence[int]) -> str:
        """Return an object's kind."""
        kind = self.tables[classes[0]].objects[name]
        for number in classes:
            if self.tables[number].objects[name] != kind:
                other = self.tables[number].objects[name]
                raise ReplicasDiffer(
                    f"object {name} is {kind} on some ranks and {other} on ranks {_few(self.ranks[number])}"
                )
        return kind

    def aliases(self, offered: Mapping[str, list[int]]) -> dict[str, str]:
        """Return every tied name with the name that it is stored under."""
        found: dict[str, str] = {}
        for number, table in enumerate(self.tables):
            for alias, target in table.aliases.items():
                if found.setdefault(alias, target) != target:
                    raise ReplicasDiffer(
                        f"{alias} is tied to {found[alias]} on some ranks and to {target} on ranks "
                        f"{_few(self.ranks[number])}"
                    )
        clash = min(found.keys() & offered.keys(), default=None)
        if clash is not None:
            raise ReplicasDiffer(
                f"{clash} is tied to {found[clash]} on some ranks and a tensor of its own on ranks "
                f"{_few(self._ranks_of(tuple(offered[clash])))}; tie it on all ranks or on none"
            )
        return dict(sorted(found.items()))


def _alike(a: Row, b: Row) -> bool:
    """Whether two rows differ at most in the ranks of their meshes."""
    if a.layout is None or b.layout is None or a.layout.explicit is not None or b.layout.explicit is not None:
        return False
    same = (a.layout.mesh.shape, a.layout.placements) == (b.layout.mesh.shape, b.layout.placements)
    return same and (a.dtype, a.shape) == (b.dtype, b.shape)


def _few(ranks: Sequence[int]) -> str:
    return str(list(ranks)) if len(ranks) <= 16 else f"{str(list(ranks[:16]))[:-1]}, ... {len(ranks)} ranks]"


def _text(row: Row) -> str:
    layout = "a plain tensor" if row.layout is None else f"{row.layout.placements} on mesh {row.layout.mesh.shape}"
    return f"{row.dtype}{list(row.shape)} as {layout}"


def part_of(plan: Plan, table: Table) -> Plan:
    """Return what a rank with this table needs of a plan: the rows that it offers, as all ranks together hold them."""
    return Plan(
        plan.world_size,
        {fqn: plan.tensors[fqn] for fqn in sorted(table.tensors)},
        {alias: plan.aliases[alias] for alias in sorted(table.aliases)},
        {name: plan.objects[name] for name in sorted(table.objects)},
        {name: plan.sources[name] for name in sorted(table.objects) if name in plan.sources},
        {name: plan.shared[name] for name in sorted(table.objects) if name in plan.shared},
    )


def encode_plan(plan: Plan) -> bytes:
    """Return a plan, or a part of one, as bytes."""
    table = encode_table(Table(plan.tensors, plan.aliases, plan.objects))
    return msgspec.msgpack.encode([plan.world_size, table, list(plan.sources.items()), list(plan.shared.items())])


def decode_plan(data: bytes) -> Plan:
    """Inverse of ``encode_plan``."""
    world_size, encoded, sources, shared = msgspec.msgpack.decode(data)
    table = decode_table(encoded)
    found = {name: tuple(ranks) for name, ranks in sources}
    return Plan(world_size, table.tensors, table.aliases, table.objects, found, dict(shared))
