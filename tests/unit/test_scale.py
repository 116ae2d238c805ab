"""Thousands of simulated ranks: what grows with their number, and what must not. Counters, never seconds."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from benchmarks.sim import measure, save, shapes
from benchmarks.sim.group import Counts, Group
from benchmarks.sim.shapes import MODELS, Job, Model
from benchmarks.sim.storage import Headers, HeaderStore, manifest_of
from distckpt.boxes import Box
from distckpt.dcp.agreed import AgreedPlan, agree_plan
from distckpt.dcp.cover import PRIME
from distckpt.dcp.planner import Row, pieces_for
from distckpt.dcp.saving import _check_receipts, _Receipt
from distckpt.dcp.tables import Table
from distckpt.errors import AgreementError, LayoutChanged
from distckpt.format import shares
from distckpt.format.manifest import encode_manifest
from distckpt.format.shard_index import ShardIndex

SHALLOW = Model("405B, 8 layers", 16384, 53248, 8, 128, 8)
EXPERTS = Model("MoE, 2 layers", 7168, 2048, 2, 128, 128, experts=32)
JOBS: dict[str, Callable[[int], Job]] = {
    "fsdp": lambda world: shapes.fsdp(SHALLOW, world),
    "hsdp": lambda world: shapes.hsdp(SHALLOW, world),
    "tp+pp": lambda world: shapes.parallel(SHALLOW, world, tp=8, pp=8),
    "ep": lambda world: shapes.expert_parallel(EXPERTS, world, ep=16),
    "zero1": lambda world: shapes.zero1(SHALLOW, world, pp=8),
    "zero3": lambda world: shapes.zero3(SHALLOW, world),
}


@cache
def planned(name: str, world: int) -> tuple[Job, measure.Planned]:
    job = JOBS[name](world) if name in JOBS else shapes.thousand(world)
    return job, measure.plan(job)


def calls(work: Callable[[], Any]) -> int:
    """Return how many Python functions a piece of work calls."""
    count = 0

    def count_one(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(count_one)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


# ---------------------------------------------------------------- traffic


@pytest.mark.parametrize("name", JOBS)
def test_a_steady_save_and_the_first_after_a_resume_exchange_one_digest_a_rank(name: str) -> None:
    job, cold = planned(name, 4096)
    manifest = manifest_of(cold.plans[0].held, cold.plans[0].entry())
    steady = measure.plan(job, cold.plans)
    resumed = measure.plan(job, resumed=manifest)
    for found in (steady, resumed):
        for counts in (found.leader, found.other):
            assert (counts.rounds, counts.blobs_offered, counts.blobs_fetched) == (1, 0, 0)
            assert counts.sent + counts.received < 128
    assert (steady.leader, steady.other) == (resumed.leader, resumed.other)
    assert [p.id for p in resumed.plans] == [p.id for p in cold.plans]
    assert [p.pieces for p in resumed.plans] == [p.pieces for p in cold.plans]


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "zero3", "thousand"])
def test_the_first_plan_of_a_regular_layout_is_one_digest_too(name: str) -> None:
    _, cold = planned(name, 4096)
    for counts in (cold.leader, cold.other):
        assert (counts.rounds, counts.blobs_offered, counts.blobs_fetched) == (1, 0, 0)


@pytest.mark.parametrize("name", ["tp+pp", "ep", "zero1"])
def test_stages_send_each_table_once_and_get_their_own_part(name: str) -> None:
    job, cold = planned(name, 4096)
    assert cold.other.rounds == 2
    assert cold.other.blobs_offered == cold.other.blobs_fetched == 1
    assert cold.leader.blobs_fetched == len(job.classes) - 1
    largest = max(len(table.tensors) for table, _ in job.classes)
    assert cold.other.fetched < 160 * largest  # its own tensors', whatever the others have
    wider, again = planned(name, 512)
    assert len(wider.classes) == len(job.classes)
    assert cold.other.rounds == again.other.rounds
    assert cold.leader.blobs_fetched == again.leader.blobs_fetched


def test_ranks_that_disagree_are_named_at_any_scale() -> None:
    job, _ = planned("fsdp", 4096)
    table, ranks = job.classes[0]
    other = Table({**table.tensors, "model.norm.weight": Row("float16", (16384,), None)}, {}, table.objects)
    group = Group.of([[r for r in ranks if r != 77], [77]], 4096)
    tables = [table if ranks[0] != 77 else other for ranks in group.classes]

    def work(agreement: Any, rank: int) -> Any:
        try:
            return agree_plan(agreement, "s", tables[2 if rank == 77 else min(rank, 1)], None, step=1, timeout_s=30)
        except AgreementError as error:
            return (error.failures[0].kind, str(error))

    for (kind, text), _, _ in group.run(work):
        assert kind == "ReplicasDiffer"
        assert "model.norm.weight: ranks [0, 1, 2" in text
        assert "ranks [77] hold float16" in text


# ---------------------------------------------------------------- work and memory


def test_the_work_of_a_plan_does_not_grow_with_the_ranks() -> None:
    counted = {}
    for world in (1024, 16384):
        job = shapes.thousand(world, 300)
        whole = measure.plan(job).plans[0].held
        group = Group([[0], range(1, world)], world)
        table = job.classes[0][0]
        counted[world] = (
            calls(lambda w=world, p=whole: pieces_for(p, w // 2 + 3)),
            calls(lambda g=group, t=table: _lead(g, t)),
        )
    own, led = zip(counted[1024], counted[16384], strict=True)
    assert own[1] <= 1.2 * own[0]
    assert led[1] <= 1.2 * led[0] + 2.1 * (16384 - 1024)  # the leader compares what each rank sent
    assert max(counted[16384]) < 200 * 300


def _lead(group: Group, table: Table) -> AgreedPlan:
    """Run the leader's side on this thread; the others' payload is the leader's own."""

    class Alone:
        rank, world_size, is_leader = 0, group.world, True

        def round(self, key: str, payload: bytes, decide: Callable[[list[bytes]], bytes], **_: Any) -> bytes:
            return decide([payload] * group.world)

    return agree_plan(Alone(), "s", table, None, step=1, timeout_s=1)  # type: ignore[arg-type]


def test_the_coordinator_holds_no_object_for_a_tensor_on_a_rank() -> None:
    world = 16384
    job = shapes.thousand(world)
    _lead(Group([[0], range(1, world)], world), job.classes[0][0])  # caches filled
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    agreed = _lead(Group([[0], range(1, world)], world), job.classes[0][0])
    manifest = manifest_of(agreed.held, agreed.entry())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(gc.get_objects()) - before < 2 * (world + 10 * 1000)  # 16 million boxes
    assert peak < 24 << 20
    assert len(manifest.shards) == world


def test_receipts_prove_the_cover_and_a_wrong_one_names_its_rank() -> None:
    job = shapes.hsdp(MODELS["8B"], 64)
    agreed = measure.plan(job).plans[0]
    covers = [measure.cover_of(((p.fqn, p.box) for p in pieces_for(agreed.held, r)), agreed.id) for r in range(64)]
    good = [_Receipt(1, "", agreed.id, cover, {}, "") for cover in covers]
    _check_receipts(agreed, 1, good)
    wrong = [*good]
    wrong[17] = _Receipt(1, "", agreed.id, (covers[17] + 1) % PRIME, {}, "")
    with pytest.raises(LayoutChanged, match=r"ranks \[17\] wrote other boxes"):
        _check_receipts(agreed, 1, wrong)
    wrong[17] = _Receipt(1, "", "another", covers[17], {}, "")
    with pytest.raises(LayoutChanged, match=r"ranks \[17\] wrote by another plan"):
        _check_receipts(agreed, 1, wrong)
    assert save.receipts(agreed)["receipt_bytes"] < 200


@pytest.mark.parametrize("name", JOBS)
def test_all_boxes_of_all_ranks_cover_everything_once_and_evenly(name: str) -> None:
    found = measure.proofs(JOBS[name](128))
    assert found["covered_exactly_once"]
    assert found["imbalance"] <= 1.01


# ---------------------------------------------------------------- metadata


def test_a_manifest_grows_by_a_line_a_shard_and_a_line_a_tensor() -> None:
    def size(world: int, tensors: int) -> int:
        plan = measure.plan(shapes.thousand(world, tensors)).plans[0]
        return len(encode_manifest(manifest_of(plan.held, plan.entry())))

    small, wide, long = size(16, 100), size(1040, 100), size(16, 1100)
    assert (wide - small) / 1024 < 124
    assert (long - small) / 1000 < 128
    assert size(16384, 1000) < 8e6


@pytest.mark.parametrize(("name", "headers"), [("fsdp", 1), ("zero1", 1), ("zero3", 1), ("ep", 1), ("tp+pp", 2), ("hsdp", 8)])
def test_a_rank_that_resumes_in_its_own_layout_opens_its_own_shard(name: str, headers: int) -> None:
    """Its own alone; with tensor parallelism also the one that holds small boxes which it replicates; HSDP's replicas
    share the writing, so each has a part of what a rank reads."""
    job, cold = planned(name, 4096)
    whole = cold.plans[0].held
    for rank in (1, 2049, 4095):
        assert measure.opened(whole, measure.wants(job, whole, rank))["headers"] == headers
    leader = measure.opened(whole, measure.wants(job, whole, 0), leads=True)
    assert leader["headers"] <= headers + len(job.classes) + 1


def test_another_layout_opens_the_shards_that_it_needs_and_no_others() -> None:
    saved, wanted = shapes.fsdp(SHALLOW, 4096), shapes.fsdp(SHALLOW, 1536)
    whole, other = measure.plan(saved).plans[0].held, measure.plan(wanted).plans[0].held
    boxes = [(fqn, box) for fqn, box in measure.wants(wanted, other, 700) if not fqn.endswith(".step")]
    headers = Headers(whole)
    index = ShardIndex(HeaderStore(headers), manifest_of(whole, None, shards=headers), "step")  # type: ignore[arg-type]
    held = {shard for fqn, box in boxes for shard, _ in index.overlapping(fqn, box)}
    assert index.opened == len(held) <= 12


def test_headers_are_the_truth_where_replicas_were_shared_out_by_another_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    job = shapes.hsdp(MODELS["8B"], 32)
    whole = measure.plan(job).plans[0].held
    headers = Headers(whole)
    with monkeypatch.context() as patch:
        patch.setattr(shares, "SMALL_BYTES", 0)
        patch.setattr(shares, "CUT_BYTES", 1 << 30)
        for rank in range(32):
            headers.made(rank)
    store = HeaderStore(headers)
    index = ShardIndex(store, manifest_of(whole, None, shards=headers), "step")  # type: ignore[arg-type]
    for fqn in list(whole.tensors)[::17]:
        box = Box.whole(whole.tensors[fqn].shape)
        parts = [stored.box for _, stored in index.overlapping(fqn, box)]
        assert sum(part.numel for part in parts) == box.numel


def test_counts_say_what_travels() -> None:
    _, cold = planned("fsdp", 512)
    assert cold.store_bytes == 512 * (cold.other.sent + cold.other.received)
    assert isinstance(cold.other, Counts)
