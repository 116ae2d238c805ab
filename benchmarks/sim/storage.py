"""A store that has the headers of thousands of shards without their files: each is made when somebody opens it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, overload

from distckpt.dcp.planner import Plan, manifest_tensors, pieces_for
from distckpt.format import names
from distckpt.format.digest import block_count, digest
from distckpt.format.manifest import Manifest, ShardEntry
from distckpt.format.shard import plan_shard, render_header

ATTEMPT, SAVE_ID, STEP = "g000001-1a2b3c4d", "sim", 1000


class Headers(Sequence[ShardEntry]):
    """The shards of a simulated save, as a manifest lists them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.made = lru_cache(maxsize=64)(self._made)

    def _made(self, rank: int) -> tuple[int, bytes]:
        """Return a shard's size and its header's bytes."""
        pieces = pieces_for(self.plan, rank)
        shard = plan_shard(pieces, rank=rank, world_size=self.plan.world_size, save_id=SAVE_ID, objects={})
        zeros = [["0" * 32] * block_count(size, shard.block) for size in shard.nbytes]
        return shard.size, render_header(shard, zeros)

    def __len__(self) -> int:
        return self.plan.world_size

    @overload
    def __getitem__(self, rank: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, rank: slice) -> Sequence[ShardEntry]: ...
    def __getitem__(self, rank: int | slice) -> Any:
        if isinstance(rank, slice):
            return [self[i] for i in range(*rank.indices(len(self)))]
        size, header = self.made(rank)
        return ShardEntry(path=path_of(rank, len(self)), size=size, header=digest(header))


def path_of(rank: int, world: int) -> str:
    """Return a shard's path below the step folder."""
    return f"{ATTEMPT}/{names.shard_name(rank, world)}"


class HeaderStore:
    """The part of a store that opening shards takes, and its counters."""

    url = "sim://"

    def __init__(self, headers: Headers) -> None:
        self._headers = headers
        self.sizes = self.reads = self.read_bytes = 0

    def _rank(self, path: str) -> int:
        return int(path.rpartition("/")[2].partition("-")[0])

    def size(self, path: str) -> int:
        """Return a shard's size."""
        self.sizes += 1
        return self._headers.made(self._rank(path))[0]

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a shard: of its header, zeros after that."""
        total, header = self._headers.made(self._rank(path))
        stop = total if size is None else min(total, offset + size)
        data = header[offset:stop]
        self.reads += 1
        self.read_bytes += stop - offset
        return data + bytes(stop - offset - len(data))


def manifest_of(plan: Plan, plan_entry: Any, *, shards: Sequence[ShardEntry] | None = None) -> Manifest:
    """Return the manifest of a simulated save; without ``shards`` every header's digest is made up."""
    meshes, tensors = manifest_tensors(plan)
    if shards is None:
        shards = [
            ShardEntry(path=path_of(r, plan.world_size), size=10**9 + 7919 * r, header=digest(str(r).encode()))
            for r in range(plan.world_size)
        ]
    return Manifest(
        step=STEP,
        epoch=1,
        time="2026-01-31T12:00:00Z",
        generation=1,
        attempt=ATTEMPT,
        save_id=SAVE_ID,
        world_size=plan.world_size,
        engine="sim",
        meshes=meshes,
        tensors=tensors,
        aliases=dict(plan.aliases),
        objects={},
        per_rank=[],
        metrics={},
        config=None,
        provenance=None,
        software={},
        shards=shards,  # type: ignore[arg-type]
        plan=plan_entry,
    )
