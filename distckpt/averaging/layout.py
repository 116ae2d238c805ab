"""Which shard of the result holds which boxes: as in the newest member, so that reading and writing run in step."""

from __future__ import annotations

from dataclasses import dataclass

from distckpt.averaging.blend import Blend
from distckpt.boxes import Box
from distckpt.dcp.planner import Plan, Row, manifest_tensors, split_among_replicas
from distckpt.format.layout import Layout, Mesh
from distckpt.format.manifest import MeshEntry, TensorEntry
from distckpt.format.placing import Piece


@dataclass(frozen=True, slots=True)
class Output:
    """The manifest's tables, and the pieces of each shard."""

    meshes: list[MeshEntry]
    tensors: dict[str, TensorEntry]
    shards: tuple[tuple[Piece, ...], ...]

    def of_rank(self, rank: int, ranks: int) -> list[int]:
        """Return the shards that one of several ranks writes."""
        return list(range(rank, len(self.shards), ranks))


def plan_output(blend: Blend, ranks: int, shard_bytes: int) -> Output:
    """Lay the result out for ``ranks`` writers. Pure, but for headers that are read; the same on every rank.

    The newest member's own layout is kept where all members are distckpt's and its shards can be shared out evenly:
    each box is then one run of each file, whatever its placement. So it is where its ranks' own objects go in.
    Else every tensor is cut by rows, by bytes, into shards of at most about ``shard_bytes``, at least one a rank.
    """
    found = blend.newest.source.checkpoint
    own = len(blend.rank_objects)
    every = all(member.source.checkpoint is not None for member in blend.members)
    if found is not None:
        shards = len(found.manifest.shards)
        if own or (every and (shards % ranks == 0 or shards >= 4 * ranks)):
            return _kept(blend)
    count = max(ranks, -(-blend.nbytes // shard_bytes))
    count = own or -(-count // ranks) * ranks
    layout = Layout(Mesh.flat(range(count)), ("R",))
    rows = {name: Row(mixed.dtype, mixed.shape, layout) for name, mixed in blend.tensors.items()}
    pieces = [Piece(name, m.dtype, m.shape, Box.whole(m.shape)) for name, m in blend.tensors.items()]
    meshes, tensors = manifest_tensors(Plan(count, rows, {}, {}, {}))
    shared = tuple(tuple(split_among_replicas(pieces, index, count)) for index in range(count))
    return Output(meshes, tensors, shared)


def _kept(blend: Blend) -> Output:
    newest = blend.newest
    found = newest.source.checkpoint
    assert found is not None
    manifest = found.manifest
    # What is neither model nor optimizer has its own name.
    own = {name: newest.stored(name) if name in newest.names else name for name in blend.tensors}
    tensors = {}
    for name, mixed in blend.tensors.items():
        entry = manifest.tensors[own[name]]
        tensors[name] = TensorEntry(
            dtype=mixed.dtype, shape=list(mixed.shape), mesh=entry.mesh, placements=entry.placements, boxes=entry.boxes
        )
    shards = []
    names = {stored: [n for n, o in own.items() if o == stored] for stored in dict.fromkeys(own.values())}
    for held in found.shards():
        shards.append(
            tuple(
                Piece(name, blend.tensors[name].dtype, blend.tensors[name].shape, box)
                for fqn, boxes in held.items()
                for name in names.get(fqn, ())
                for box in boxes
            )
        )
    return Output(list(manifest.meshes), tensors, tuple(shards))
