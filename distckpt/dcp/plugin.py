"""torch.distributed.checkpoint over distckpt's storage: ``dcp.save(..., storage_writer=DistckptStorageWriter(root))``.

DCP plans and moves the tensors, with its own collectives; the format, digests, durability and commit are ours. What is
written this way opens with ``open_checkpoint`` and the manager, and the reverse. No pickle touches storage: objects
are typed JSON, refused at save time if they cannot be (DCP itself would pickle them).
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from distckpt import clock
from distckpt.boxes import Box
from distckpt.config import DEFAULT_THREADS
from distckpt.dcp.buffers import HostBytes
from distckpt.dcp.dcp_names import flat_objects, nested_objects
from distckpt.dcp.leaves import dtype_name, torch_dtype
from distckpt.dcp.planner import Plan, Row, check_tiling, infer_layout, manifest_tensors
from distckpt.dcp.reader import CheckpointReader, Want
from distckpt.dcp.writer import write_shard
from distckpt.errors import ConfigError, UnserializableState
from distckpt.format import names, typed_json
from distckpt.format.catalog import find_checkpoint, parse_location
from distckpt.format.commit import begin_attempt, commit
from distckpt.format.lineage import create_generation, ensure_root, lineage, list_committed, read_generations
from distckpt.format.manifest import Manifest, ShardEntry
from distckpt.format.placing import Piece
from distckpt.storage import open_store

_RECEIPT = "distckpt/receipt"


class DistckptStorageWriter(StorageWriter):
    """Writes one checkpoint per ``dcp.save``, or several, one after another.

    ``path``: a root, with ``step``, or a step's folder in it (``<root>/step-0000000100``). ``checkpoint_id``, if
    ``dcp.save`` is given one, replaces ``path`` for that save. Works with ``dcp.async_save``. Not with
    ``use_collectives=False``, which has no single commit.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, step: int | None = None, threads: int = DEFAULT_THREADS
    ) -> None:
        self.threads = threads
        self._given_step = step
        self._generation: dict[str, int] = {}
        self._coordinator = False
        self.reset(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Aim at a checkpoint (DCP calls this at the start of a save)."""
        if checkpoint_id is not None:
            place = parse_location(checkpoint_id)
            self._url = place.store.url
            self.step = place.step if place.step is not None else (self._given_step or 0)
        self._plans: list[SavePlan] = []

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See ``StorageWriter``."""
        self._coordinator = is_coordinator
        if kwargs.get("use_collectives", True) is False:
            raise ConfigError(
                "use_collectives=False commits ranks one by one; distckpt commits a checkpoint as a whole"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See ``StorageWriter``."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the attempt (coordinator): its name and every rank's number travel with the plans."""
        from dataclasses import replace

        store = open_store(self._url)
        ensure_root(store)
        if self._url not in self._generation:
            line = lineage(list_committed(store), read_generations(store))
            origin = (line[0].generation, line[0].step) if line else None
            self._generation[self._url] = create_generation(store, resumed_from=origin, owner="dcp.save").number
        save_id = uuid.uuid4().hex
        attempt = begin_attempt(store, step=self.step, generation=self._generation[self._url], nonce=save_id[:8])
        self._plans = [
            replace(plan, storage_data=(attempt, save_id, rank, len(plans))) for rank, plan in enumerate(plans)
        ]
        return self._plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shard; the receipt and the objects travel to the coordinator with the results."""
        attempt, save_id, rank, world = plan.storage_data
        pieces, tensors, objects = [], [], {}
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                objects[item.index.fqn] = typed_json.encode(_lookup(planner, item), where=f"$.{item.index.fqn}")
                continue
            assert item.tensor_data is not None
            chunk = item.tensor_data.chunk
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor)
            shape = tuple(item.tensor_data.size)
            pieces.append(
                Piece(item.index.fqn, dtype_name(tensor.dtype), shape, Box(tuple(chunk.offsets), tuple(chunk.sizes)))
            )
            tensors.append(tensor)
        store = open_store(self._url)
        folder = f"{names.step_folder(self.step)}/{attempt}"
        written = write_shard(
            store,
            f"{folder}/{names.shard_name(rank, world)}",
            pieces,
            HostBytes(tensors),
            rank=rank,
            world_size=world,
            save_id=save_id,
            objects={},
            threads=self.threads,
        )
        store.sync_folder(folder)
        receipt = WriteResult(dcp_metadata.MetadataIndex(_RECEIPT), written.size, (rank, written.header, objects))
        results = [WriteResult(item.index, 0, None) for item in plan.items]
        future: Future[list[WriteResult]] = Future()
        future.set_result([receipt, *results])
        return future

    def finish(self, metadata: dcp_metadata.Metadata, results: list[list[WriteResult]]) -> None:
        """Commit (coordinator only): until the manifest is linked, nothing of this save exists for a reader."""
        attempt, save_id, _, world = self._plans[0].storage_data
        receipts = sorted(
            (r for rank in results for r in rank if r.index.fqn == _RECEIPT), key=lambda r: r.storage_data[0]
        )
        objects: dict[str, Any] = {}
        for receipt in receipts:
            objects |= {name: typed_json.decode(value) for name, value in receipt.storage_data[2].items()}
        plan = _written_plan(self._plans, metadata)
        meshes, tensors = manifest_tensors(plan)
        nested = nested_objects(objects, set(tensors), metadata.planner_data)
        manifest = Manifest(
            step=self.step,
            epoch=None,
            time=clock.utc_text(),
            generation=self._generation[self._url],
            attempt=attempt,
            save_id=save_id,
            world_size=world,
            engine="dcp",
            meshes=meshes,
            tensors=tensors,
            aliases={},
            objects={name: typed_json.encode(value, where=f"$.{name}") for name, value in nested.items()},
            per_rank=[],
            metrics={},
            config=None,
            provenance=typed_json.encode({"dcp": {"planner_data": metadata.planner_data}}),
            software={"torch": str(torch.__version__)},
            shards=[
                ShardEntry(
                    path=f"{attempt}/{names.shard_name(rank, world)}", size=r.size_in_bytes, header=r.storage_data[1]
                )
                for rank, r in enumerate(receipts)
            ],
        )
        commit(open_store(self._url), manifest)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a path or URL can name a checkpoint."""
        try:
            parse_location(checkpoint_id)
        except (ConfigError, OSError):
            return False
        return True

    def storage_meta(self) -> dcp_metadata.StorageMeta | None:
        """See ``StorageWriter``."""
        return dcp_metadata.StorageMeta(checkpoint_id=f"{self._url}/{names.step_folder(self.step)}")


def _lookup(planner: SavePlanner, item: Any) -> Any:
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise UnserializableState(
            f"{item.index.fqn}: {type(planner).__name__} hands objects over pickled; use a DefaultSavePlanner or give your "
            "planner lookup_object(index)"
        )
    return lookup(item.index)


def _written_plan(plans: Sequence[SavePlan], metadata: dcp_metadata.Metadata) -> Plan:
    """Return what DCP's plans say each rank wrote, with layouts in closed form where they have one."""
    boxes: dict[str, dict[int, list[Box]]] = {}
    by_rank: list[list[Piece]] = []
    rows: dict[str, tuple[str, tuple[int, ...]]] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, dcp_metadata.TensorStorageMetadata):
            rows[fqn] = (dtype_name(entry.properties.dtype), tuple(entry.size))
    for rank, plan in enumerate(plans):
        by_rank.append([])
        for item in plan.items:
            if item.tensor_data is not None:
                chunk = item.tensor_data.chunk
                box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
                boxes.setdefault(item.index.fqn, {}).setdefault(rank, []).append(box)
                by_rank[rank].append(Piece(item.index.fqn, *rows[item.index.fqn], box))
    tensors = {fqn: Row(dtype, shape, infer_layout(shape, boxes[fqn])) for fqn, (dtype, shape) in sorted(rows.items())}
    plan_ = Plan(len(plans), tensors, {}, {}, {})
    check_tiling(plan_, by_rank)
    return plan_


class DistckptStorageReader(StorageReader):
    """Reads a committed checkpoint for ``dcp.load``: a root (its newest), a step's folder, or a manifest.

    Every byte is verified on the rank that reads it. DCP's planner sees each tensor as one chunk; which shards hold
    a wanted box is found from the layout when it is read.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = DEFAULT_THREADS) -> None:
        self.threads = threads
        self.path = path
        self._reader: CheckpointReader | None = None
        self._objects: dict[str, Any] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Aim at a checkpoint."""
        if checkpoint_id is not None:
            self.path = checkpoint_id
        self._reader = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        """Return the manifest as DCP metadata."""
        reader = self._open()
        manifest = reader.manifest
        found: dict[str, Any] = {name: dcp_metadata.BytesStorageMetadata() for name in self._objects}
        for fqn in (*manifest.tensors, *manifest.aliases):
            entry = manifest.tensors[reader.index.resolve(fqn)]
            size = torch.Size(entry.shape)
            chunk = dcp_metadata.ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            properties = dcp_metadata.TensorProperties(dtype=torch_dtype(entry.dtype))
            found[fqn] = dcp_metadata.TensorStorageMetadata(properties, size, [chunk])
        provenance = typed_json.decode(manifest.provenance) or {}
        planner_data = provenance.get("dcp", {}).get("planner_data") if isinstance(provenance, dict) else None
        return dcp_metadata.Metadata(
            found, planner_data=planner_data or {name: tuple(name.split(".")) for name in found}
        )

    def set_up_storage_reader(self, metadata: Any, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See ``StorageReader``; ranks other than the coordinator open the checkpoint here."""
        self._open()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See ``StorageReader``."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See ``StorageReader``."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and verify what this rank's plan wants, straight into its tensors."""
        reader = self._open()
        wants, tensors = [], []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                # DCP's planners take objects only as torch.save bytes; these never leave this process' memory.
                buffer = io.BytesIO()
                torch.save(self._objects[item.storage_index.fqn], buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)
                continue
            target = planner.resolve_tensor(item).detach()
            wants.append(Want(item.storage_index.fqn, Box(tuple(item.storage_offsets), tuple(item.lengths)), target))
            tensors.append((item, target))
        reader.read(wants, threads=self.threads)
        for item, target in tensors:
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _open(self) -> CheckpointReader:
        if self._reader is None:
            found = find_checkpoint(self.path)
            self._reader = CheckpointReader(found.store, found.manifest, found.committed.folder)
            objects = {name: typed_json.decode(value) for name, value in found.manifest.objects.items()}
            self._objects = flat_objects(objects)
        return self._reader

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a path or URL can name a checkpoint."""
        return DistckptStorageWriter.validate_checkpoint_id(checkpoint_id)
