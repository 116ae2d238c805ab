"""The suite's slot for averages of checkpoints: ``python -m benchmarks --only averaging``.

K = 2, 8, 32 checkpoints of bf16 weights, of sizes by which each K reads and writes as many bytes. The limit of a turn is what
direct reads of the very files and a durable direct write of the result's bytes take, before and after it. Every average runs
in a process of its own on files that are not in the page cache, and its result is compared with the mean in fp64.
``python -m benchmarks.average`` is the same with more settings.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.average import greatest_error, mean_of, run_one, write_checkpoints
from benchmarks.jobs import Job
from benchmarks.limits import disk_read, disk_write, verified_read
from benchmarks.measures import Measure, Test
from benchmarks.peers import OURS
from benchmarks.report import Results
from benchmarks.run import DEPTH, VERIFIED, Bench, Row, folder_for, palindrome, together
from distckpt.dcp.read_plan import SPAN

PART = "average"
PEERS = {OURS: "ours", "eager loop": "eager", "per tensor, as mergekit": "per-tensor"}
COUNTS = (2, 8, 32)
MIB = 1 << 20
HALF_A_SPACING = 0.51
"""Most that a result rounded once may be off, in spacings of bf16 at the tensor's largest value."""


def averages(bench: Bench) -> None:
    """Average K checkpoints with every peer in turn."""
    for count in COUNTS if bench.settings.full else COUNTS[:2]:
        with folder_for(bench, f"average-{count}") as root:
            _averages(bench, count, root)


def _averages(bench: Bench, count: int, root: Path) -> None:
    shards = write_checkpoints(root / "sources", count, bench.settings.nbytes // (count + 1), torch.bfloat16)
    small = write_checkpoints(root / "small", 2, MIB, torch.bfloat16)
    wanted = mean_of(shards)
    read, written = sum(shard.stat().st_size for shard in shards), shards[0].stat().st_size
    readers, writers = bench.read_point, bench.write_point

    read_at = {"threads": readers.threads, "request": readers.request}
    write_at = {"threads": writers.threads, "request": writers.request}

    verified_write = bench.verified_write_limit(written)

    def one_after_the_other(reading: float, writing: float) -> float:
        return (read + written) / (read / reading + written / writing)

    def probe() -> dict[str, float]:
        return {"average": one_after_the_other(disk_read(shards, **read_at), disk_write(root, written, **write_at))}

    def verified() -> dict[str, float]:
        reading = verified_read(shards, np.empty(0, np.uint8), threads=DEPTH, request=SPAN)
        return {VERIFIED: one_after_the_other(reading, verified_write()[VERIFIED])}

    both = together(probe, verified)

    def turn(peer: str) -> Row:
        found = run_one(PEERS[peer], root / "out", shards, small)
        error = greatest_error(PEERS[peer], root / "out", wanted)
        shutil.rmtree(root / "out")
        check = "equal" if error <= HALF_A_SPACING else f"off by {error:.2f} spacings"
        rate = (read + written) / found["seconds"]
        return {**found, "nbytes": read + written, "min_rank_bytes_s": rate, "error_spacings": error,
                "check": check if peer == OURS else "equal"}  # fmt: skip

    peers = bench.settings.chosen(PEERS)
    for number in range(1, 1 + bench.settings.rounds):
        for peer in palindrome(peers):
            about = {"workload": f"K={count}", "world": 1, "part": PART, "peer": peer, "round": number}
            bench.measure(about, partial(turn, peer), both if peer == OURS else probe, shared=True)


def jobs() -> list[Job]:
    return [Job("averaging", "the mean of 2, 8 and 32 checkpoints", averages)]


def measures() -> list[Measure]:
    return [
        Measure("average of K checkpoints, of K reads and 1 write", "≥ 0.8", "≥ 0.95", judge_speed),
        Measure("average of K checkpoints, peak extra memory", "≤ 512 MiB", "≤ 128 MiB", judge_memory),
    ]


def judge_speed(results: Results) -> list[Test]:
    out = []
    for count in COUNTS:
        s = results.one(f"K={count}", PART)
        value = None if s.wrong else s.fraction()
        why = s.error or s.wrong or "not measured in this run"
        out.append(Test(f"K={count} of limit", value, 0.8, 0.95, why=why, void=s.only_void))
        hashed = None if s.wrong else s.fraction(VERIFIED)
        out.append(Test("with every byte hashed", hashed, None, None, why=why, void=s.only_void))
    return out


def judge_memory(results: Results) -> list[Test]:
    out = []
    for count in COUNTS:
        s = results.one(f"K={count}", PART)
        peak = max((row["peak_extra_bytes"] for row in s.rows), default=None)
        value = peak / MIB if peak is not None else None
        out.append(
            Test(f"K={count}", value, 512, 128, at_least=False, unit=" MiB", digits=0, why=s.error or "not measured")
        )
    return out
