"""What a layout costs at a world size: plans and their traffic, manifest, headers opened, and proofs about all boxes."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from benchmarks.sim.group import Counted, Counts, Group
from benchmarks.sim.shapes import Job
from benchmarks.sim.storage import Headers, HeaderStore, manifest_of
from distckpt.boxes import Box
from distckpt.dcp.agreed import AgreedPlan, agree_plan
from distckpt.dcp.cover import added, cover_of, whole_cover
from distckpt.dcp.planner import Plan, pieces_for
from distckpt.dcp.reader import CheckpointReader
from distckpt.dcp.tables import Table, merge_tables
from distckpt.format import manifest as manifests
from distckpt.format.dtypes import itemsize
from distckpt.format.layout import held_boxes, replica_of
from distckpt.format.manifest import Manifest, decode_manifest, encode_manifest, reread_manifest
from distckpt.manager.exchange import small_tensors


@dataclass(frozen=True)
class Planned:
    """One agreement on a plan: the leader's and another rank's counts and CPU seconds, and what a store had to carry."""

    leader: Counts
    other: Counts
    leader_s: float
    other_s: float
    store_bytes: int
    plans: Sequence[AgreedPlan]

    def row(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "leader": self.leader.plain(),
            "other": self.other.plain(),
            "leader_cpu_s": self.leader_s,
            "other_cpu_s": self.other_s,
            "store_bytes": self.store_bytes,
        }


def plan(job: Job, cached: Sequence[AgreedPlan] | None = None, resumed: Manifest | None = None) -> Planned:
    """Let all ranks agree: cold, or with the plans of a save before, or after a resume."""
    group = Group.of([ranks for _, ranks in job.classes], job.world)
    tables = [job.table_of(ranks[0]) for ranks in group.classes]

    def work(agreement: Counted, rank: int) -> AgreedPlan:
        number = next(i for i, ranks in enumerate(group.classes) if ranks[0] == rank)
        known = cached[number] if cached is not None else None
        found: AgreedPlan = agree_plan(
            agreement,  # type: ignore[arg-type]
            "save",
            tables[number],
            known,
            step=1,
            timeout_s=300,
            resumed=resumed,
        )
        return found

    results = group.run(work)
    others = results[1:] or results[:1]
    most = max(others, key=lambda result: result[2])
    carried = sum(map(len, group.blobs.values()))
    for (_, counts, _), ranks in zip(results, group.classes, strict=True):
        carried += (counts.sent + counts.received + counts.fetched) * len(ranks)
    return Planned(results[0][1], most[1], results[0][2], most[2], carried, [value for value, _, _ in results])


def sample(world: int, count: int = 64, seed: int = 1) -> list[int]:
    """Return ranks worth looking at: the first ones, the last ones, powers of two, and random ones."""
    picked = {0, 1, 2, world - 1, world - 2, world // 2, *(1 << i for i in range(world.bit_length()))}
    picked |= set(random.Random(seed).sample(range(world), min(world, count)))
    return sorted(rank for rank in picked if 0 <= rank < world)


def proofs(job: Job) -> dict[str, Any]:
    """Make every rank's pieces, one rank after the other, and prove things about all of them together."""
    whole = merge_tables(job.by_rank())
    covers, sizes, boxes = [], [], 0
    started = time.process_time()
    for rank in range(job.world):
        pieces = pieces_for(whole, rank)
        covers.append(cover_of(((p.fqn, p.box) for p in pieces), "sim"))
        sizes.append(sum(p.box.numel * itemsize(p.dtype) for p in pieces))
        boxes += len(pieces)
        if rank in (0, job.world - 1):
            assert pieces_for(whole, rank) == pieces, "a plan is a pure function"
    expected = whole_cover(((fqn, row.shape) for fqn, row in whole.tensors.items()), "sim")
    total = sum(math.prod(row.shape) * itemsize(row.dtype) for row in whole.tensors.values())
    return {
        "ranks": job.world,
        "boxes": boxes,
        "covered_exactly_once": added(covers) == expected and sum(sizes) == total,
        "imbalance": max(sizes) / (total / job.world),
        "cpu_s": time.process_time() - started,
    }


def metadata(whole: AgreedPlan) -> tuple[dict[str, Any], Manifest]:
    """Return the manifest's size, and what writing and reading it takes."""
    manifest = manifest_of(whole.held, whole.entry())
    started = time.process_time()
    data = encode_manifest(manifest)
    encoded = time.process_time()
    manifests._parsed.clear()  # else the reader would meet what the writer has just checked
    decode_manifest(data, where="sim")
    decoded = time.process_time()
    manifests._parsed.clear()
    found = reread_manifest(data, where="sim")
    reread = time.process_time()
    tensors, shards = len(found.tensors), len(found.shards)
    listed = len(msgspec.json.encode(found.shards))
    return {
        "bytes": len(data),
        "bytes_per_shard": listed / shards,
        "bytes_per_tensor": (len(data) - listed) / tensors,
        "encode_cpu_s": encoded - started,
        "leader_decode_cpu_s": decoded - encoded,
        "decode_cpu_s": reread - decoded,
    }, found


def opened(whole: Plan, wanted: Sequence[tuple[str, Box]], *, leads: bool = False) -> dict[str, Any]:
    """Return what one rank does to find wanted boxes: headers opened, requests and bytes for that, CPU seconds.

    Small tensors come from the leader, which opens headers for them too.
    """
    headers = Headers(whole)
    store = HeaderStore(headers)
    reader = CheckpointReader(store, manifest_of(whole, None, shards=headers), "step")  # type: ignore[arg-type]
    small = small_tensors(reader)
    own = [(fqn, box) for fqn, box in wanted if fqn not in small]
    candidates: set[int] = set()
    started = time.process_time()
    for fqn, box in own:
        candidates.update(reader.index.writers(fqn, box))
    planned = time.process_time() - started
    if leads:
        own += [(fqn, Box.whole(target.shape)) for fqn, target in small.items()]
    for rank in sorted(candidates):
        headers.made(rank)  # a real rank finds its headers on storage; making them is not its work
    started = time.process_time()
    covered = 0
    for fqn, box in own:
        for _, stored in reader.index.overlapping(fqn, box):
            common = stored.box.intersect(box)
            covered += common.numel if common is not None else 0
    assert covered == sum(box.numel for _, box in own), "the headers hold what is wanted"
    return {
        "headers": reader.index.opened,
        "header_bytes": store.read_bytes,
        "requests": store.sizes + store.reads,
        "writers_cpu_s": planned,
        "cpu_s": time.process_time() - started,
    }


def wants(job: Job, whole: Plan, rank: int) -> list[tuple[str, Box]]:
    """Return the boxes that a rank loads in its own layout."""
    out = []
    for fqn in job.table_of(rank).tensors:
        row = whole.tensors[fqn]
        assert row.layout is not None
        out += [(fqn, held.box) for held in held_boxes(row.shape, row.layout, rank)]
    return out


def replicas(job: Job, whole: Plan) -> int:
    """Return how many ranks at most hold the same large boxes: so many shards hold one rank's."""
    table: Table = job.classes[0][0]
    layouts = {whole.tensors[fqn].layout for fqn, row in table.tensors.items() if math.prod(row.shape) > 1 << 20}
    return max((replica_of(layout, 0)[1] for layout in layouts if layout is not None), default=1)
