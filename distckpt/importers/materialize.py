"""``distckpt convert --materialize``: an incremental checkpoint, copied so that it refers to no other file."""

from __future__ import annotations

import os
import uuid
from functools import partial
from typing import Any

import msgspec

from distckpt.config import DEFAULT_THREADS
from distckpt.errors import ConfigError, CorruptCheckpoint
from distckpt.export.stream import CHUNK, Progress
from distckpt.format import names
from distckpt.format.box_reader import Source
from distckpt.format.catalog import find_checkpoint, parse_location
from distckpt.format.commit import begin_attempt, commit
from distckpt.format.flat_reader import fill_flat, shares_of
from distckpt.format.lineage import Committed
from distckpt.format.manifest import Manifest, ShardEntry
from distckpt.format.placing import Piece
from distckpt.format.shard import plan_shard
from distckpt.format.shard_index import ShardIndex
from distckpt.format.verify import verify
from distckpt.importers.commit_source import new_generation
from distckpt.importers.convert import Report
from distckpt.importers.stream_shard import write_pieces
from distckpt.storage.base import Store


def materialize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    step: int | None = None,
    threads: int = DEFAULT_THREADS,
    progress: Progress = lambda nbytes: None,
) -> Report:
    """Copy a checkpoint with all that it refers to, as a new generation of the root ``dst``, and verify it in full.

    ``src`` is a root (its newest), a step's folder or a manifest; ``step`` picks one of a root. Everything stays as it
    was saved (ranks, layouts, boxes, objects, metrics, time) but generation, attempt and save id; the provenance says
    ``materialized_from``. Memory: ``threads`` times 16 MiB. Raises ``ConfigError`` if ``dst`` already has
    that step or a later one, ``CorruptCheckpoint`` for damage, ``CheckpointNotFound``.
    """
    if step is not None:
        if parse_location(src).step is not None:
            raise ConfigError(f"--step {step}: {os.fspath(src)} means one step already; give the root instead")
        src = f"{os.fspath(src).rstrip('/')}/{names.step_folder(step)}"
    found = find_checkpoint(src, strict=True)
    old, target = found.manifest, parse_location(dst)
    store = target.store
    if target.step is not None:
        raise ConfigError(f"{os.fspath(dst)}: name a root, in which the folder {names.step_folder(old.step)} is made")
    generation = new_generation(store, old.step, "distckpt convert --materialize")
    save_id = uuid.uuid4().hex
    attempt = begin_attempt(store, step=old.step, generation=generation, nonce=save_id[:8])
    folder = f"{names.step_folder(old.step)}/{attempt}"
    index = ShardIndex(found.store, old, found.committed.folder)
    write = partial(_write_shard, index, store, folder, save_id=save_id, threads=threads, progress=progress)
    shards = [write(number) for number in range(len(old.shards))]
    store.sync_folder(folder)
    new = msgspec.structs.replace(
        old,
        generation=generation,
        attempt=attempt,
        save_id=save_id,
        shards=shards,
        provenance=_provenance(old),
    ).referring([])
    path = commit(store, new)
    report = verify(store, Committed(old.step, generation, path), mode="full")
    if not report.ok:
        raise CorruptCheckpoint(f"{store.url}/{path}: written, but it does not verify: {report.problems[0].what}")
    where = f"{getattr(store, 'root', store.url)}/{names.step_folder(old.step)}"
    notes = () if old.references else ("it referred to no other file before either",)
    counts = len(old.tensors), len(old.aliases), len(old.objects)
    return Report("distckpt", "distckpt", where, old.step, *counts, report.total_bytes, notes)


def _write_shard(
    index: ShardIndex, store: Store, folder: str, number: int, *, save_id: str, threads: int, progress: Progress
) -> ShardEntry:
    """Write one rank's shard whole, and compare its digests with those that it had."""
    header, count = index.header(number), len(index.manifest.shards)
    pieces = [Piece(b.fqn, b.dtype, b.global_shape, b.box) for b in header.boxes]
    plan = plan_shard(
        pieces,
        rank=header.rank,
        world_size=header.world_size,
        save_id=save_id,
        objects=header.objects,
        block=header.block,
    )
    sources = [Source(index.path(number), number, header.block, stored) for stored in header.boxes]

    shares = [shares_of([source], source.stored.box) for source in sources]

    def fill(piece: int, start: int, stop: int, view: memoryview) -> None:
        fill_flat(index.store, shares[piece], sources[piece].stored.box, start, stop, view)

    name = names.shard_name(number, count)
    written = write_pieces(store, f"{folder}/{name}", plan, fill, threads=threads, request=CHUNK, progress=progress)
    for stored, digests in zip(header.boxes, written.digests, strict=True):
        if stored.digests != digests:
            raise CorruptCheckpoint(f"{store.url}/{folder}/{name}: {stored.fqn!r} was not written as it was read")
    return ShardEntry(path=f"{folder.rpartition('/')[2]}/{name}", size=written.size, header=written.header)


def _provenance(old: Manifest) -> Any:
    """Return the provenance (typed JSON), with where the copy comes from; what is no map of names stays as it is."""
    origin = {"generation": old.generation, "save_id": old.save_id, "step": old.step}
    if old.provenance is None:
        return {"materialized_from": origin}
    if not isinstance(old.provenance, dict):
        return old.provenance
    if old.provenance.keys() == {"$dict"}:
        return {"$dict": [*old.provenance["$dict"], ["materialized_from", origin]]}
    if any(key.startswith("$") for key in old.provenance):
        return old.provenance
    return {**old.provenance, "materialized_from": origin}
