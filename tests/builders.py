"""Small complete checkpoints from numpy arrays, without torch or processes: every rank's shard, then the commit."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distckpt import clock
from distckpt.boxes import Box
from distckpt.format import names, typed_json
from distckpt.format.commit import begin_attempt, commit
from distckpt.format.digest import BLOCK, block_digests, digest
from distckpt.format.lineage import Committed
from distckpt.format.manifest import Manifest, MeshEntry, ShardEntry, TensorEntry
from distckpt.format.placing import Piece
from distckpt.format.shard import plan_shard, render_header
from distckpt.storage.base import Store
from distckpt.storage.memory import MemoryStore

Tensors = Mapping[str, np.ndarray]
CUT_DIM = {"rows": 0, "columns": 1}


@dataclass
class Draft:
    """One tensor: its dtype's name, its elements, its placement, and the box of each rank (None: holds nothing)."""

    dtype: str
    array: np.ndarray
    placement: str
    boxes: list[Box | None] = field(default_factory=list)


def some_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Return tensors of ordinary and odd shapes: uneven, 0-d, without elements, several dtypes, over one block."""
    rng = np.random.default_rng(seed)
    return {
        "model.embed.weight": rng.standard_normal((37, 16)).astype(np.float32),
        "model.head.weight": rng.standard_normal((8, 5, 3)).astype(np.float64),
        "model.big": rng.integers(0, 255, (700, 1000), dtype=np.int32),
        "model.mask": rng.integers(0, 2, (9, 2)).astype(np.bool_),
        "model.empty": np.zeros((0, 4), np.float32),
        "optim.step": np.array(float(seed), np.float32),
    }


def draft(array: np.ndarray, world: int, cut: str, turn: int, dtype: str | None = None) -> Draft:
    """Cut one array as torch.chunk does; what has no such dimension is replicated, rank ``turn % world`` writes it."""
    # ascontiguousarray would make a 0-d array 1-d.
    array = np.array(array, order="C", copy=True)
    dim = CUT_DIM.get(cut, -1)
    found = Draft(dtype or str(array.dtype), array, "R")
    if not 0 <= dim < array.ndim or not array.size:
        found.boxes = [Box.whole(array.shape) if rank == turn % world else None for rank in range(world)]
        if not array.size:
            found.boxes = [Box.whole(array.shape) if rank == 0 else None for rank in range(world)]
        return found
    found.placement = f"S({dim})"
    share = -(-array.shape[dim] // world)
    for rank in range(world):
        start, stop = min(array.shape[dim], rank * share), min(array.shape[dim], (rank + 1) * share)
        offsets, sizes = [0] * array.ndim, list(array.shape)
        offsets[dim], sizes[dim] = start, stop - start
        found.boxes.append(Box(tuple(offsets), tuple(sizes)) if stop > start else None)
    return found


def write_rank(
    store: Store, path: str, drafts: Mapping[str, Draft], rank: int, world: int, save_id: str,
    objects: Mapping[str, Any], block: int,
) -> tuple[int, str]:  # fmt: skip
    """Write one rank's shard to ``path`` (a name on the store); returns its size and the digest of its header."""
    pieces, data = [], []
    for fqn, tensor in drafts.items():
        box = tensor.boxes[rank]
        if box is not None:
            pieces.append(Piece(fqn, tensor.dtype, tensor.array.shape, box))
            part = tensor.array[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]
            data.append(part.tobytes())
    encoded = {name: typed_json.encode(value) for name, value in objects.items()}
    plan = plan_shard(pieces, rank=rank, world_size=world, save_id=save_id, objects=encoded, block=block)
    header = render_header(plan, [block_digests(memoryview(octets), block) for octets in data])
    writer = store.open_writer(path, plan.size)
    writer.write_at(0, memoryview(header))
    for start, octets in zip(plan.starts, data, strict=True):
        writer.write_at(start, memoryview(octets))
    writer.commit()
    return plan.size, digest(header)


def prepare(
    store: Store,
    step: int,
    generation: int = 1,
    world: int = 2,
    tensors: Tensors | None = None,
    cut: str = "rows",
    metrics: Mapping[str, Any] | None = None,
    objects: Mapping[str, Any] | None = None,
    *,
    rank_objects: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    config: Any = None,
    epoch: float | None = None,
    dtypes: Mapping[str, str] | None = None,
    nonce: str | None = None,
    save_id: str | None = None,
    block: int = BLOCK,
) -> Manifest:
    """Write all shards of an attempt and return the manifest that would commit it (an orphan until then).

    ``cut``: "rows", "columns" or "replicated". ``dtypes`` renames a tensor's dtype to one of equal item size that
    numpy lacks (uint16 as "bfloat16"). ``rank_objects[name]`` is called with the rank if it is callable.
    """
    tensors = some_tensors(step) if tensors is None else tensors
    save_id = save_id or secrets.token_hex(8)
    attempt = begin_attempt(store, step=step, generation=generation, nonce=nonce or secrets.token_hex(4))
    drafts = {
        fqn: draft(array, world, cut, turn, (dtypes or {}).get(fqn))
        for turn, (fqn, array) in enumerate(tensors.items())
    }
    shards = []
    for rank in range(world):
        own = {name: value(rank) if callable(value) else value for name, value in (rank_objects or {}).items()}
        path = f"{attempt}/{names.shard_name(rank, world)}"
        full = f"{names.step_folder(step)}/{path}"
        size, header = write_rank(store, full, drafts, rank, world, save_id, own, block)
        shards.append(ShardEntry(path=path, size=size, header=header))
    store.sync_folder(f"{names.step_folder(step)}/{attempt}")
    return Manifest(
        step=step,
        epoch=epoch,
        time=clock.utc_text(),
        generation=generation,
        attempt=attempt,
        save_id=save_id,
        world_size=world,
        engine="test",
        meshes=[MeshEntry(shape=[world], ranks=[[0, world]])],
        tensors={
            fqn: TensorEntry(dtype=d.dtype, shape=list(d.array.shape), mesh=0, placements=[d.placement])
            for fqn, d in drafts.items()
        },
        aliases=dict(aliases or {}),
        objects={name: typed_json.encode(value) for name, value in (objects or {}).items()},
        per_rank=sorted(rank_objects or {}),
        metrics={name: typed_json.encode(value) for name, value in (metrics or {}).items()},
        config=typed_json.encode(config),
        provenance=None,
        software={"distckpt": "test"},
        shards=shards,
    )


def build_checkpoint(
    store: Store,
    step: int,
    generation: int = 1,
    world: int = 2,
    tensors: Tensors | None = None,
    cut: str = "rows",
    metrics: Mapping[str, Any] | None = None,
    objects: Mapping[str, Any] | None = None,
    *,
    check_fencing: bool = False,
    **more: Any,
) -> Committed:
    """Write and commit a complete checkpoint; takes also what ``prepare`` takes. Late commits are allowed."""
    manifest = prepare(store, step, generation, world, tensors, cut, metrics, objects, **more)
    return Committed(step, generation, commit(store, manifest, check_fencing=check_fencing))


def shard_paths(store: Store, committed: Committed) -> list[str]:
    """Return the names on the store of a checkpoint's shards, by rank."""
    found = (entry.name for entry in store.list(f"{committed.folder}/"))
    return sorted(name for name in found if names.parse_shard_name(name.rpartition("/")[2]) is not None)


class Together(MemoryStore):
    """A store whose data writes go on when ``count`` of them are under way."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.writing = threading.Barrier(count)

    def open_writer(self, name: str, size: int) -> Any:
        opened = super().open_writer(name, size)
        write = opened.write_at

        def write_at(offset: int, data: memoryview) -> None:
            if offset:
                self.writing.wait(20)
            write(offset, data)

        opened.write_at = write_at  # type: ignore[method-assign]
        return opened
