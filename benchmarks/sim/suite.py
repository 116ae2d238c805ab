"""The suite's slot for plans: what a first save at 16,384 ranks plans, and what a resume there opens.

Simulated by the planner's own code, as ``python -m benchmarks.sim`` does for more layouts and for DCP beside it.
"""

from __future__ import annotations

from benchmarks.jobs import Job
from benchmarks.measures import Measure, Test
from benchmarks.peers import OURS
from benchmarks.report import Results
from benchmarks.run import Bench
from benchmarks.sim import measure, shapes

WORLD, PART = 16384, "plan"


def plan(bench: Bench, world: int = WORLD) -> None:
    """Plan a first save of 1,000 sharded tensors on so many ranks; look at its manifest, and at a resume of one rank."""
    job = shapes.thousand(world)
    planned = measure.plan(job)
    sizes, _ = measure.metadata(planned.plans[0])
    whole = planned.plans[0].held
    found = measure.opened(whole, measure.wants(job, whole, world // 2 + 1))
    bench.add(
        {
            "kind": "row", "workload": f"{world} ranks", "world": world, "part": PART, "peer": OURS, "void": False,
            "seconds": max(planned.leader_s, planned.other_s), "leader_cpu_s": planned.leader_s,
            "other_cpu_s": planned.other_s, "nbytes": sizes["bytes"],
            "headers": found["headers"],
        }
    )  # fmt: skip


def jobs() -> list[Job]:
    return [Job("plan", "plans and metadata at 16,384 simulated ranks", plan)]


def measures() -> list[Measure]:
    return [
        Measure("first plan, 16,384 ranks × 1,000 tensors, per rank", "≤ 1 s", "≤ 10 ms", judge_plan),
        Measure("manifest there; headers one rank reads in its own layout", "≤ 32 MB; 1", "≤ 8 MB; 1", judge_metadata),
    ]


def judge_plan(results: Results) -> list[Test]:
    s = results.one(f"{WORLD} ranks", PART, OURS, WORLD)
    found = {"leader": s.median("leader_cpu_s"), "another rank": s.median("other_cpu_s")}
    return [
        Test(who, None if value is None else value * 1e3, 1000, 10, at_least=False, unit=" ms", digits=1)
        for who, value in found.items()
    ]


def judge_metadata(results: Results) -> list[Test]:
    s = results.one(f"{WORLD} ranks", PART, OURS, WORLD)
    size, headers = s.median("nbytes"), s.median("headers")
    return [
        Test("manifest", None if size is None else size / 1e6, 32, 8, at_least=False, unit=" MB", digits=1),
        Test("headers", headers, 1, 1, at_least=False, digits=0),
    ]
