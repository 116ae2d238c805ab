"""Reading checkpoints without a process group: ``open_checkpoint`` and what it gives.

Every byte that leaves here was verified: manifest by its own digest, headers by the manifest, blocks by the
headers. torch is imported only when a tensor is read.
"""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distckpt.boxes import Box
from distckpt.errors import ConfigError, CorruptCheckpoint, IncompatibleState, ShardError
from distckpt.format import typed_json
from distckpt.format.box_reader import (
    Reader,
    Source,
    extents_of,
    fill,
    missing_references,
    run_nbytes,
    sources_tile,
    wanted_runs,
)
from distckpt.format.catalog import CheckpointInfo, find_checkpoint, list_checkpoints
from distckpt.format.dtypes import itemsize
from distckpt.format.flat_reader import Share, fill_flat, lend_flat, rows_around, shares_of
from distckpt.format.lineage import Committed
from distckpt.format.manifest import Manifest
from distckpt.format.read_ahead import REQUEST, Extent, ReadAhead
from distckpt.format.shard import StoredBox
from distckpt.format.shard_index import ShardIndex
from distckpt.format.verify import Mode, Progress, VerifyReport, verify
from distckpt.storage.base import Store

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "CheckpointInfo", "TensorInfo", "list_checkpoints", "open_checkpoint"]

FEW_SOURCES = 8
"""A box with more stored boxes is read by looking up those of each request again."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor: torch's dtype name, global shape, the boxes it is stored in, bytes of the whole."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    nbytes: int


def open_checkpoint(path_or_url: str | os.PathLike[str], *, strict: bool = False) -> Checkpoint:
    """Open a root (its newest checkpoint), a step folder, or a manifest, on any store.

    Only the manifest is read. From a root, a newest one that is damaged is passed over with a warning;
    ``strict`` raises instead. Raises ``CheckpointNotFound``, ``CorruptCheckpoint`` (also for an incremental one whose
    step folder was copied without the files that it refers to), ``UnsupportedVersion``, ``StoreError``.
    """
    found = find_checkpoint(path_or_url, strict=strict)
    missing = missing_references(found.store, found.manifest)
    if missing:
        first = next(iter(missing))
        more = f" (and {len(missing) - 1} more files: {', '.join([*missing][1:6])})" if len(missing) > 1 else ""
        raise CorruptCheckpoint(f"{found.store.url}/{first}: {missing[first]}{more}")
    return Checkpoint(found.store, found.committed, found.manifest)


class Checkpoint:
    """One committed checkpoint, read only. Headers are read when first needed and kept; thread-safe."""

    def __init__(self, store: Store, committed: Committed, manifest: Manifest) -> None:
        self.store = store
        self.committed = committed
        self.manifest = manifest
        self._index = ShardIndex(store, manifest, committed.folder)
        self._tiled: dict[tuple[str, Box], list[Share]] = {}
        self._reader: Reader = store

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, generation={self.generation})"

    # ------------------------------------------------------------ what the manifest says

    @property
    def path(self) -> str:
        """URL of the step folder."""
        return f"{self.store.url}/{self.committed.folder}"

    @property
    def step(self) -> int:
        """The training step."""
        return self.manifest.step

    @property
    def epoch(self) -> int | float | None:
        """The epoch, if one was given."""
        return self.manifest.epoch

    @property
    def generation(self) -> int:
        """The job start that wrote it."""
        return self.manifest.generation

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return self.manifest.world_size

    @property
    def format_version(self) -> tuple[int, int]:
        """(major, minor) of the format it was written in."""
        return self.manifest.version

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The metrics given to ``save``."""
        return {name: self._decode(value, f"metrics.{name}") for name, value in self.manifest.metrics.items()}

    @cached_property
    def config(self) -> Any:
        """The model configuration given to ``save``."""
        return self._decode(self.manifest.config, "config")

    @cached_property
    def provenance(self) -> Any:
        """What it was resumed or made from."""
        return self._decode(self.manifest.provenance, "provenance")

    @cached_property
    def objects(self) -> dict[str, Any]:
        """Replicated objects by name; a ``typed_json.Ref`` in one stands for the tensor of that name."""
        return {name: self._decode(value, f"objects.{name}") for name, value in self.manifest.objects.items()}

    def rank_objects(self, rank: int) -> dict[str, Any]:
        """Return what one rank stored for itself (RNG states, ...); ``ConfigError`` for an unknown rank."""
        if not 0 <= rank < len(self.manifest.shards):
            raise ConfigError(f"{self.path}: no rank {rank}, only 0 to {len(self.manifest.shards) - 1}")
        where = f"{self._index.path(rank)}: $.objects"
        return {
            name: typed_json.decode(value, where=f"{where}.{name}", error=ShardError)
            for name, value in self._index.header(rank).objects.items()
        }

    def _decode(self, value: Any, field: str) -> Any:
        return typed_json.decode(value, where=f"{self.store.url}/{self.committed.manifest_path}: $.{field}")

    # ------------------------------------------------------------ tensors

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor under every name, aliases included; reads all headers. Raises ``ShardError``."""
        stored: dict[str, list[Box]] = defaultdict(list)
        for boxes in self._index.open(range(len(self.manifest.shards))):
            for fqn, held in boxes.items():
                stored[fqn] += [box.box for box in held]
        infos = {}
        for fqn, entry in self.manifest.tensors.items():
            shape = tuple(entry.shape)
            nbytes = Box.whole(shape).numel * itemsize(entry.dtype)
            infos[fqn] = TensorInfo(entry.dtype, shape, tuple(sorted(stored[fqn])), nbytes)
        return infos | {alias: infos[target] for alias, target in self.manifest.aliases.items()}

    def read(self, fqn: str) -> torch.Tensor:
        """Return a whole global tensor on the CPU, in its saved dtype; every block is verified.

        Raises ``IncompatibleState`` for an unknown name, ``ShardError`` naming file and tensor for damage.
        """
        return self.read_box(fqn, Box.whole(self.manifest.tensors[self._resolve(fqn)].shape))

    def read_box(self, fqn: str, box: Box) -> torch.Tensor:
        """Return a region of a global tensor, of shape ``box.sizes``; only blocks that it touches are read.

        Memory: the result, and at most 8 MiB for each of four threads. Raises as ``read``, and
        ``IncompatibleState`` for a box outside the tensor.
        """
        return self._read_box(self.store, fqn, box)

    def _read_box(self, store: Reader, fqn: str, box: Box) -> torch.Tensor:
        import torch

        name = self._resolve(fqn)
        entry = self.manifest.tensors[name]
        whole = Box.whole(entry.shape)
        if box.ndim != whole.ndim or not whole.contains(box) or min((*box.offsets, *box.sizes), default=0) < 0:
            raise IncompatibleState(f"{fqn}: box {box.offsets}+{box.sizes} lies outside shape {whole.sizes}")
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise IncompatibleState(f"{self.path}: tensor {fqn!r}: this torch has no {entry.dtype}; upgrade it")
        sources = self._sources(name, box)
        # Before anything is allocated: files bound the sizes in headers, nothing those in a manifest.
        sources_tile(name, sources, box, self.path)
        octets = torch.empty(box.numel * itemsize(entry.dtype), dtype=torch.uint8)
        if octets.numel():
            fill(store, sources, box, octets.numpy().data)
        return octets.view(dtype).reshape(box.sizes) if octets.numel() else torch.empty(box.sizes, dtype=dtype)

    def read_into(self, fqn: str, box: Box, start: int, stop: int, view: memoryview) -> None:
        """Put bytes [start, stop) of the row-major elements of a box into ``view``, verified; for streamed reading.

        ``box`` lies within the tensor, ``start`` and ``stop`` between elements; ``view`` is flat, writable and of that
        length. Raises ``IncompatibleState`` for an unknown name, ``ShardError`` for damage.
        """
        fill_flat(self._reader, self._shares(fqn, box, start, stop), box, start, stop, view)

    def lend(self, fqn: str, box: Box, start: int, stop: int, spare: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield what ``read_into`` puts into ``spare`` as (place, bytes), each to be used until the next is asked for.

        What was read ahead (``reading_through``) is verified where it lies and not copied, where blocks allow.
        """
        return lend_flat(self._reader, self._shares(fqn, box, start, stop), box, start, stop, spare)

    def _shares(self, fqn: str, box: Box, start: int, stop: int) -> list[Share]:
        """Return who holds bytes [start, stop) of a box, which is looked at as a whole once."""
        name = self._resolve(fqn)
        shares = self._tiled.get((name, box))
        if shares is None:
            sources = self._sources(name, box)
            sources_tile(name, sources, box, self.path)
            shares = self._tiled[name, box] = shares_of(sources, box)
        if len(shares) > FEW_SOURCES:
            size = itemsize(self.manifest.tensors[name].dtype)
            shares = shares_of(self._sources(name, rows_around(box, start // size, -(-stop // size))), box)
        return shares

    def extents(self, fqn: str, box: Box) -> list[Extent]:
        """Return what reading a box reads: (store, name on it, first byte, bytes), for ``ReadAhead``."""
        found: list[Extent] = []
        for source in self._sources(self._resolve(fqn), box):
            if source.stored.box == box:  # the common case, and thousands of blocks
                found += [(self.store, *extent) for extent in extents_of(source)]
            else:
                found += [(self.store, run[0].path, run[0].start, run_nbytes(run)) for run in wanted_runs(source, box)]
        return found

    @contextmanager
    def reading_through(self, ahead: ReadAhead) -> Iterator[None]:
        """Have ``read_into`` take what it needs from what is read ahead, inside ``with``."""
        self._reader = ahead.over(self.store)
        try:
            yield
        finally:
            self._reader = self.store

    def stored_boxes(self, fqn: str) -> list[tuple[int, StoredBox]]:
        """Return (bytes that a digest covers, stored box) of every box that a tensor lies in, digests and all.

        Opens only the headers of shards that can hold it. Raises as ``read_into``.
        """
        sources = self._sources(self._resolve(fqn), Box.whole(self.manifest.tensors[self._resolve(fqn)].shape))
        return [(source.block, source.stored) for source in sources]

    def shards(self) -> list[dict[str, list[Box]]]:
        """Return the boxes that each shard holds, by FQN; reads all headers. Raises ``ShardError``."""
        every = self._index.open(range(len(self.manifest.shards)))
        return [{fqn: [stored.box for stored in held] for fqn, held in boxes.items()} for boxes in every]

    def state_dict(self, prefix: str = "model.") -> dict[str, torch.Tensor]:
        """Return the tensors whose names start with ``prefix``, under the rest of their names.

        Tied tensors are one tensor under several names, as they were. Raises as ``read``, and
        ``IncompatibleState`` where no name starts so.
        """
        wanted = [name for name in (*self.manifest.tensors, *self.manifest.aliases) if name.startswith(prefix)]
        if not wanted:
            known = sorted({f"{name.split('.', 1)[0]}." for name in self.manifest.tensors})[:10]
            raise IncompatibleState(f"{self.path}: no tensor's name starts with {prefix!r}; names start with {known}")
        whole = {name: Box.whole(self.manifest.tensors[name].shape) for name in map(self._resolve, wanted)}
        extents = {
            name: sorted(extent for source in self._sources(name, box) for extent in extents_of(source))
            for name, box in whole.items()
        }
        order = sorted(whole, key=extents.__getitem__)
        rows = ([[(self.store, *extent)]] for name in order for extent in extents[name])
        with ReadAhead(rows, large=REQUEST) as ahead:
            through = ahead.over(self.store)
            read = {name: self._read_box(through, name, whole[name]) for name in order}
        return {name.removeprefix(prefix): read[self._resolve(name)] for name in wanted}

    def verify(
        self, mode: Mode = "quick", *, fraction: float = 0.05, seed: int = 0, progress: Progress | None = None
    ) -> VerifyReport:
        """Check it on storage; the report's ``.ok`` says it. Never raises for damage, never repairs."""
        return verify(self.store, self.committed, mode=mode, fraction=fraction, seed=seed, progress=progress)

    # ------------------------------------------------------------ where things are

    def _resolve(self, fqn: str) -> str:
        name = self.manifest.aliases.get(fqn, fqn)
        if name not in self.manifest.tensors:
            near = difflib.get_close_matches(fqn, [*self.manifest.tensors, *self.manifest.aliases], 3)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; it has {len(self.manifest.tensors)} tensors"
            raise IncompatibleState(f"{self.path}: no tensor {fqn!r}{hint}")
        return name

    def _sources(self, fqn: str, box: Box) -> list[Source]:
        found = self._index.overlapping(fqn, box)
        return [Source(self._index.path(i), i, self._index.header(i).block, stored) for i, stored in found]
