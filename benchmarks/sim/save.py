"""The rest of a save: what the leader does with thousands of receipts, and what storage is asked to do."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.sim.group import Counted, Group
from benchmarks.sim.shapes import Job
from distckpt.dcp.agreed import AgreedPlan, agree_plan
from distckpt.dcp.cover import PRIME
from distckpt.dcp.saving import SaveRequest, _check_receipts, _Receipt, write_and_commit
from distckpt.format.digest import digest
from distckpt.format.dtypes import itemsize
from distckpt.format.typed_json import encode
from distckpt.storage import open_store


def receipts(whole: AgreedPlan, seed: int = 1) -> dict[str, Any]:
    """Let the leader read and check as many receipts as there are ranks; covers are drawn, but add up as they must."""
    draw = random.Random(seed)
    world = whole.held.world_size
    covers = [draw.randrange(PRIME) for _ in range(world - 1)]
    assert whole.whole is not None
    covers.append((whole.whole - sum(covers)) % PRIME)
    sent = [
        msgspec.msgpack.encode(_Receipt(10**9 + rank, digest(str(rank).encode()), whole.id, cover, {}, digest(b"")))
        for rank, cover in enumerate(covers)
    ]
    started = time.process_time()
    found = [msgspec.msgpack.decode(data, type=_Receipt) for data in sent]
    _check_receipts(whole, 1, found)
    return {"receipt_bytes": max(map(len, sent)), "cpu_s": time.process_time() - started}


def storage(job: Job) -> dict[str, int]:
    """Save a tiny state with real ranks (threads) in a folder, and return how often storage was asked for what."""
    group = Group.of([[rank] for rank in range(job.world)], job.world)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        root.mkdir()

        def work(agreement: Counted, rank: int) -> Counter[str]:
            store = open_store(str(root))
            agreed = agree_plan(agreement, "s", job.table_of(rank), None, step=1, timeout_s=60)  # type: ignore[arg-type]
            objects = {name: encode([] if kind == "groups" else 1) for name, kind in agreed.held.objects.items()}
            request = SaveRequest("s", step=1, generation=1, objects=objects)
            sizes = [p.box.numel * itemsize(p.dtype) for p in agreed.pieces]
            data = memoryview(bytearray(max(sizes, default=0)))
            write_and_commit(
                agreement,  # type: ignore[arg-type]
                store,
                agreed,
                request,
                lambda i: data[: sizes[i]],
                threads=1,
                timeout_s=60,
            )
            return store.counters

        for counted, _, _ in group.run(work):
            total.update(counted)
    return dict(sorted(total.items()))
