"""torch.distributed.checkpoint's own planner on the same shapes: what its coordinator does for one save.

Timed: unpickling all ranks' plans (they arrive by a gather of objects), ``DefaultSavePlanner.create_global_plan`` (dedup,
global plan, validation), and pickling the metadata with its storage data, as ``FileSystemWriter.finish`` does.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import pickle
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from benchmarks.sim.shapes import Job
from distckpt.dcp.tables import merge_tables
from distckpt.format.layout import held_boxes


def plans_of(job: Job) -> list[SavePlan]:
    """Return every rank's local plan, as DCP would make it of the same tensors (replicas are all offered)."""
    whole = merge_tables(job.by_rank())
    plans = []
    for rank in range(job.world):
        items = []
        for fqn, row in whole.tensors.items():
            assert row.layout is not None
            for held in held_boxes(row.shape, row.layout, rank):
                chunk = ChunkStorageMetadata(torch.Size(held.box.offsets), torch.Size(held.box.sizes))
                data = TensorWriteData(chunk, TensorProperties(getattr(torch, row.dtype)), torch.Size(row.shape))
                index = MetadataIndex(fqn, chunk.offsets)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        plans.append(SavePlan(items))
    return plans


def measure(job: Job, *, collect: bool) -> dict[str, Any]:
    """Return CPU seconds of the coordinator and sizes; ``collect``: with Python's garbage collector, as it runs."""
    gathered = [pickle.dumps(plan) for plan in plans_of(job)]
    gc.collect()
    if not collect:
        gc.disable()
    try:
        started = time.process_time()
        plans = [pickle.loads(data) for data in gathered]  # our own bytes, made above
        loaded = time.process_time()
        plans, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
        planned = time.process_time()
        places = {
            item.index: _StorageInfo(f"__{rank}_0.distcp", 4096 * i, 4096)
            for rank, plan in enumerate(plans)
            for i, item in enumerate(plan.items)
        }
        data = pickle.dumps(dataclasses.replace(metadata, storage_data=places))
        dumped = time.process_time()
        pickle.loads(data)
        read = time.process_time()
    finally:
        gc.enable()
    return {
        "ranks": job.world,
        "boxes": sum(len(plan.items) for plan in plans),
        "gc": collect,
        "unpickle_plans_s": loaded - started,
        "global_plan_s": planned - loaded,
        "pickle_metadata_s": dumped - planned,
        "coordinator_s": dumped - started,
        "one_rank_reads_metadata_s": read - dumped,
        "gathered_bytes": sum(map(len, gathered)),
        "metadata_bytes": len(data),
    }


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (a, b) of ``a * n**b`` through points (n, value), by least squares of logarithms."""
    logs = [(math.log(n), math.log(value)) for n, value in points]
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    b = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    return math.exp(mean_y - b * mean_x), b
