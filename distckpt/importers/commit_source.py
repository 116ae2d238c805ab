"""Writing a source as an ordinary committed checkpoint: generation, shards, manifest, then every byte read back."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from distckpt import __version__, clock
from distckpt.config import DEFAULT_THREADS
from distckpt.dcp.planner import Plan, Row, manifest_tensors
from distckpt.errors import ConfigError, CorruptCheckpoint
from distckpt.export.stream import Progress, Stream, fingerprint
from distckpt.format import names, typed_json
from distckpt.format.catalog import parse_location
from distckpt.format.commit import begin_attempt, commit
from distckpt.format.digest import digest
from distckpt.format.layout import Layout, Mesh
from distckpt.format.lineage import Committed, create_generation, ensure_root, lineage, list_committed, read_generations
from distckpt.format.manifest import Manifest, ShardEntry
from distckpt.format.verify import verify
from distckpt.importers.source import Source
from distckpt.importers.stream_shard import write_streams
from distckpt.storage.base import Store

SHARD_BYTES: Final = 4 << 30
"""Most bytes of tensors in one shard, unless a single tensor is larger."""


@dataclass(frozen=True, slots=True)
class Written:
    """Path or URL of the new step's folder, its step, and one digest over names, dtypes, shapes and bytes."""

    path: str
    step: int
    content: str


def commit_source(
    source: Source,
    target: str | os.PathLike[str],
    *,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    threads: int = DEFAULT_THREADS,
    progress: Progress = lambda nbytes: None,
) -> Written:
    """Commit a source under a root as a new generation, and verify it in full.

    ``step`` defaults to the source's, else 0. Memory: ``threads`` times 8 MiB. A source with objects of single ranks
    keeps its number of shards. Raises ``ConfigError`` if the root already has that step or a later one,
    ``CorruptCheckpoint`` if what was written does not verify, and what reading the source raises.
    """
    at = parse_location(target)
    store = at.store
    chosen = next(s for s in (at.step, step, source.step, 0) if s is not None)
    generation = new_generation(store, chosen, "distckpt convert")
    groups = _share_out(source.tensors, shard_bytes, len(source.per_rank))
    save_id = uuid.uuid4().hex
    attempt = begin_attempt(store, step=chosen, generation=generation, nonce=save_id[:8])
    folder = f"{names.step_folder(chosen)}/{attempt}"
    shards, prints = [], {}
    for rank, group in enumerate(groups):
        entry, found = _write(store, source, group, folder, rank, len(groups), save_id, threads, progress)
        shards.append(entry)
        prints.update(found)
    store.sync_folder(folder)
    content = digest("\n".join(f"{n} {p}" for n, p in sorted(prints.items())).encode("utf-8", "surrogatepass"))
    manifest = _manifest(source, chosen, generation, attempt, save_id, groups, shards, content)
    path = commit(store, manifest)
    report = verify(store, Committed(chosen, generation, path), mode="full")
    if not report.ok:
        raise CorruptCheckpoint(f"{store.url}/{path}: written, but it does not verify: {report.problems[0].what}")
    root = str(getattr(store, "root", store.url))
    return Written(f"{root}/{names.step_folder(chosen)}", chosen, content)


def new_generation(store: Store, step: int, owner: str) -> int:
    """Begin a generation that continues a root's newest step, or the root itself; returns its number.

    Raises ``ConfigError`` if the root already has that step or a later one.
    """
    ensure_root(store)
    line = lineage(list_committed(store), read_generations(store))
    if line and line[0].step >= step:
        raise ConfigError(f"{store.url}: its newest step is {line[0].step}; step {step} needs a root of its own")
    resumed = (line[0].generation, line[0].step) if line else None
    return create_generation(store, resumed_from=resumed, owner=owner).number


def _share_out(tensors: Mapping[str, Stream], most: int, ranks: int) -> list[list[str]]:
    """Return which shard holds which whole tensors: in order, about as many bytes each."""
    total = sum(stream.nbytes for stream in tensors.values())
    count = ranks or max(1, -(-total // most))
    groups: list[list[str]] = [[] for _ in range(count)]
    done = 0
    for name, stream in tensors.items():
        middle = done + stream.nbytes // 2
        groups[min(count - 1, middle * count // max(1, total))].append(name)
        done += stream.nbytes
    return groups


def _write(
    store: Store,
    source: Source,
    group: list[str],
    folder: str,
    rank: int,
    world: int,
    save_id: str,
    threads: int,
    progress: Progress,
) -> tuple[ShardEntry, dict[str, str]]:
    streams = {name: source.tensors[name] for name in group}
    own = source.per_rank[rank] if source.per_rank else {}
    name = names.shard_name(rank, world)
    written = write_streams(
        store,
        f"{folder}/{name}",
        streams,
        rank=rank,
        world_size=world,
        save_id=save_id,
        objects={key: typed_json.encode(value, where=f"$.{key}") for key, value in own.items()},
        threads=threads,
        progress=progress,
    )
    found = {n: fingerprint(s.dtype, s.shape, d) for (n, s), d in zip(streams.items(), written.digests, strict=True)}
    entry = ShardEntry(path=f"{folder.rpartition('/')[2]}/{name}", size=written.size, header=written.header)
    return entry, found


def _manifest(
    source: Source,
    step: int,
    generation: int,
    attempt: str,
    save_id: str,
    groups: list[list[str]],
    shards: list[ShardEntry],
    content: str,
) -> Manifest:
    rank_of = {name: rank for rank, group in enumerate(groups) for name in group}
    rows = {
        name: Row(stream.dtype, stream.shape, Layout(Mesh.flat([rank_of[name]]), ("R",)))
        for name, stream in source.tensors.items()
    }
    meshes, tensors = manifest_tensors(Plan(len(groups), rows, {}, {}, {}))
    imported = {
        "imported_from": source.kind,
        "name": source.name,
        "step": source.step,
        "digests": {"tensors": content},
        "notes": list(source.notes),
    }
    return Manifest(
        step=step,
        epoch=source.epoch,
        time=clock.utc_text(),
        generation=generation,
        attempt=attempt,
        save_id=save_id,
        world_size=len(groups),
        engine=f"convert:{source.kind}",
        meshes=meshes,
        tensors=tensors,
        aliases=dict(source.aliases),
        objects={name: typed_json.encode(value, where=f"$.{name}") for name, value in source.objects.items()},
        per_rank=sorted({name for own in source.per_rank for name in own}),
        metrics={name: typed_json.encode(value, where=f"$.metrics.{name}") for name, value in source.metrics.items()},
        config=typed_json.encode(source.config, where="$.config"),
        provenance=typed_json.encode(imported),
        software={"torch": str(torch.__version__), "distckpt": __version__},
        shards=shards,
    )
