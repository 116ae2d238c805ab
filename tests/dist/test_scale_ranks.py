"""Real ranks beside simulated ones: the same counters; and what a resume opens and its first save exchanges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layout_models import build, make_state
from manager_support import manager
from ranks import run_ranks

from benchmarks.sim import shapes
from benchmarks.sim.group import Counted, Group
from benchmarks.sim.shapes import Job, Model
from benchmarks.sim.storage import manifest_of
from distckpt.dcp.agreed import agree_plan
from distckpt.dcp.agreement import Agreement

TINY = Model("tiny", 64, 128, 4, 4, 4)
EXPERTS = Model("tiny experts", 64, 128, 2, 4, 4, experts=4)
JOBS = {
    "fsdp": lambda world: shapes.fsdp(TINY, world),
    "stages": lambda world: shapes.zero1(TINY, world, pp=2),
    "experts": lambda world: shapes.expert_parallel(EXPERTS, world, ep=4),
}


def three_saves(agreement: Any, rank: int, job: Job) -> list[dict[str, int]]:
    """Agree cold, steadily, and after a resume; returns the counters of each."""
    found, table = [], job.table_of(rank)
    counted = Counted(agreement)
    cold = agree_plan(counted, "cold", table, None, step=1, timeout_s=30)  # type: ignore[arg-type]
    found.append(counted.counts.plain())
    counted = Counted(agreement)
    agree_plan(counted, "steady", table, cold, step=2, timeout_s=30)  # type: ignore[arg-type]
    found.append(counted.counts.plain())
    entry = agreement.round("manifest", b"", lambda _: _encoded(cold))
    counted = Counted(agreement)
    manifest = _decoded(entry)
    again = agree_plan(counted, "resumed", table, None, step=3, timeout_s=30, resumed=manifest)  # type: ignore[arg-type]
    found.append(counted.counts.plain())
    assert again.pieces == cold.pieces
    assert again.cover == cold.cover
    return found


def _encoded(cold: Any) -> bytes:
    from distckpt.format.manifest import encode_manifest

    return encode_manifest(manifest_of(cold.held, cold.entry()))


def _decoded(data: bytes) -> Any:
    from distckpt.format.manifest import decode_manifest

    return decode_manifest(data, where="test")


def on_a_rank(rank: int, name: str, world: int) -> list[dict[str, int]]:
    agreement = Agreement.from_environment(timeout_s=30)
    found = three_saves(agreement, rank, JOBS[name](world))
    agreement.close()
    return found


@pytest.mark.parametrize(("name", "world"), [("fsdp", 2), ("fsdp", 4), ("stages", 4), ("experts", 4)])
def test_simulated_and_real_ranks_count_the_same(name: str, world: int) -> None:
    job = JOBS[name](world)
    group = Group.of([ranks for _, ranks in job.classes], world)
    simulated = group.run(lambda agreement, rank: three_saves(agreement, rank, job))
    real = run_ranks(world, on_a_rank, name, world, timeout_s=60)
    for (value, _, _), ranks in zip(simulated, group.classes, strict=True):
        for rank in ranks:
            assert real[rank] == value


def resume_and_save(rank: int, kind: str, world: int, root: Path, step: int) -> dict[str, Any]:
    """Load what is there, then save twice; returns what was opened and what the plans of the two saves exchanged."""
    model, optimizer = build(kind, rank, world)
    make_state(optimizer)
    with manager(root, model, optimizer) as m:
        report = m.resume()
        counts = []
        for number in range(2):
            counted = Counted(m.agreement)
            m.pipeline.agreement = counted  # type: ignore[assignment]
            assert m.save(step=step + number)
            counts.append(counted.counts.plain())
        return {"headers": None if report is None else report.headers_read, "counts": counts}


@pytest.mark.parametrize("kind", ["fsdp2", "pp"])
def test_a_resume_in_the_same_layout_opens_one_header_and_its_first_save_is_a_steady_one(kind: str, tmp_path: Path) -> None:
    world = 4 if kind == "fsdp2" else 2
    run_ranks(world, resume_and_save, kind, world, tmp_path, 1, timeout_s=60)
    again = run_ranks(world, resume_and_save, kind, world, tmp_path, 3, timeout_s=60)
    first, steady = again[0]["counts"]
    assert first == steady == again[1]["counts"][0]
    assert steady["rounds"] == 1
    assert steady["blobs_offered"] == steady["blobs_fetched"] == 0
    assert [found["headers"] for found in again[1:]] == [1] * (world - 1)
    assert again[0]["headers"] <= world


def test_another_world_size_opens_what_it_needs(tmp_path: Path) -> None:
    run_ranks(4, resume_and_save, "fsdp2", 4, tmp_path, 1, timeout_s=60)
    narrow = run_ranks(2, resume_and_save, "fsdp2", 2, tmp_path, 3, timeout_s=60)
    assert all(2 <= found["headers"] <= 4 for found in narrow)
