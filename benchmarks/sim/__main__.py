"""What saving and loading cost at 8 to 16,384 ranks, by the planner's own code on shape-only states.

    python -m benchmarks.sim [--quick] [--out FILE.json] [--plot FILE.png]

Counts, bytes and proofs are exact; CPU seconds are this machine's. DCP's planner runs on the same shapes as far as it
gets in reasonable time; beyond that its figures are extrapolated, and called so. Takes less than three minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.sim import dcp, measure, report, save, shapes
from benchmarks.sim.shapes import MODELS, Job, Model

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHALLOW = Model("405B, 2 layers", 16384, 53248, 2, 128, 8)
FEW_EXPERTS = Model("MoE, 1 layer, 64 experts", 7168, 2048, 1, 128, 128, experts=64)
LAYOUTS: tuple[tuple[str, Callable[[Model, int], Job]], ...] = (
    ("405B", shapes.fsdp),
    ("405B", shapes.hsdp),
    ("405B", shapes.parallel),
    ("1T", shapes.parallel),
    ("MoE", shapes.expert_parallel),
    ("1T", shapes.zero1),
    ("405B", shapes.zero3),
)


def thousand(worlds: list[int]) -> list[dict[str, Any]]:
    """Return the coordinator's work for 1,000 tensors on each rank: plan, receipts, manifest."""
    rows = []
    for world in worlds:
        job = shapes.thousand(world)
        cold = _quietly(partial(measure.plan, job))
        sizes, manifest = measure.metadata(cold.plans[0])
        receipts = save.receipts(cold.plans[0])
        rows.append(
            {
                "ranks": world,
                "boxes": world * len(cold.plans[0].held.tensors),
                "first_plan": cold.row(),
                "steady_plan": measure.plan(job, cold.plans).row(),
                "resumed_plan": _quietly(partial(measure.plan, job, resumed=manifest)).row(),
                "manifest": sizes,
                "receipts": receipts,
                "coordinator_s": cold.leader_s + receipts["cpu_s"] + sizes["encode_cpu_s"],
            }
        )
    return rows


def layouts(world: int) -> list[dict[str, Any]]:
    """Return what each layout costs at a world size."""
    rows = []
    for name, make in LAYOUTS:
        job = make(MODELS[name], world)
        cold = _quietly(partial(measure.plan, job))
        whole = cold.plans[0].held
        sizes, manifest = measure.metadata(cold.plans[0])
        rank = world // 2 + 1
        rows.append(
            {
                "model": name,
                "layout": job.name,
                "ranks": world,
                "tensors": len(whole.tensors),
                "tensors_of_a_rank": len(job.table_of(rank).tensors),
                "tables": len(job.classes),
                "first_plan": cold.row(),
                "steady_plan": measure.plan(job, cold.plans).row(),
                "resumed_plan": measure.plan(job, resumed=manifest).row(),
                "manifest": sizes,
                "same_layout": measure.opened(whole, measure.wants(job, whole, rank)),
                "same_layout_leader": measure.opened(whole, measure.wants(job, whole, 0), leads=True),
                "replicas": measure.replicas(job, whole),
            }
        )
    return rows


def reshard(world: int, to: int) -> dict[str, Any]:
    """Return what one rank does to load a state that more ranks saved."""
    saved, wanted = shapes.fsdp(MODELS["405B"], world), shapes.fsdp(MODELS["405B"], to)
    whole = measure.plan(saved).plans[0].held
    other = measure.plan(wanted).plans[0].held
    return {"from": world, "to": to, **measure.opened(whole, measure.wants(wanted, other, to // 2 + 1))}


def proofs(quick: bool) -> list[dict[str, Any]]:
    """Return what holds for the boxes of every rank together."""
    few, many = (256, 1024) if quick else (1024, 16384)
    jobs = [
        shapes.fsdp(SHALLOW, few),
        shapes.hsdp(SHALLOW, few),
        shapes.zero3(SHALLOW, few),
        shapes.expert_parallel(FEW_EXPERTS, few),
        shapes.parallel(MODELS["405B"], many),
        shapes.zero1(MODELS["1T"], many),
    ]
    return [{"layout": job.name, **measure.proofs(job)} for job in jobs]


def peers(quick: bool) -> dict[str, Any]:
    """Return DCP's figures on 100 tensors a rank, the fit, how well it predicts a wider point, and what it says beyond."""
    worlds = [64, 128, 256] if quick else [64, 128, 256, 512, 1024]
    rows = [dcp.measure(shapes.thousand(world, 100), collect=on) for world in worlds for on in (True, False)]
    running, without = ([row for row in rows if row["gc"] is on] for on in (True, False))
    a, b = dcp.fit([(row["boxes"], row["coordinator_s"]) for row in running])
    c, d = dcp.fit([(row["boxes"], row["coordinator_s"]) for row in without])
    check = dcp.measure(shapes.thousand(1024 if quick else 4096, 25), collect=True)
    far = 16384 * 1000
    return {
        "rows": rows,
        "fit": {"a": a, "b": b},
        "check": {**check, "predicted_s": a * check["boxes"] ** b},
        "extrapolated": {
            "ranks": 16384,
            "boxes": far,
            "coordinator_s": a * far**b,
            "coordinator_without_gc_s": c * far**d,
            "metadata_bytes": running[-1]["metadata_bytes"] / running[-1]["boxes"] * far,
            "gathered_bytes": running[-1]["gathered_bytes"] / running[-1]["boxes"] * far,
        },
    }


def _quietly(work: Callable[[], Any]) -> Any:
    """Do work without the garbage of what came before: a job has no simulated neighbours on its heap."""
    gc.collect()
    gc.freeze()
    return work()


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small worlds only, a few seconds")
    parser.add_argument("--out", type=Path, default=RESULTS / "sim.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "sim.png")
    args = parser.parse_args()
    console, started, before = Console(), time.monotonic(), os.getloadavg()
    console.width = max(console.width, 150)
    most = 1024 if args.quick else 16384
    worlds = [8 << i for i in range(12) if 8 << i <= most]
    found: dict[str, Any] = {"command": "python -m benchmarks.sim" + (" --quick" if args.quick else "")}
    with console.status("") as status:
        for name, work in (
            ("thousand", lambda: thousand(worlds)),
            ("layouts", lambda: layouts(most)),
            ("reshard", lambda: reshard(most, most * 3 // 8)),
            ("proofs", lambda: proofs(args.quick)),
            ("storage", lambda: {n: save.storage(shapes.thousand(n, 4, extent=8)) for n in (1, 2, 4, 8)}),
            ("dcp", lambda: peers(args.quick)),
        ):
            status.update(f"{name} ...")
            found[name] = _quietly(work)
            console.print(f"{name}: {time.monotonic() - started:.0f} s")
    found["machine"] = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": [before[0], os.getloadavg()[0]],
        "seconds": round(time.monotonic() - started, 1),
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    report.show(console, found)
    report.plot(found, args.plot)


if __name__ == "__main__":
    main()
