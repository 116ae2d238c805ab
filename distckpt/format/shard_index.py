"""Which shards of a checkpoint hold what: headers opened as they are needed, checked, kept. Used live and offline.

The layout in the manifest says which ranks held a box, and the rule of ``shares.py`` which of them wrote it, so only their
headers are opened. The rule is a hint: where they do not hold the whole box, all ranks that had it are asked.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from distckpt.boxes import Box
from distckpt.errors import ShardError
from distckpt.format.box_reader import open_shard
from distckpt.format.layout import Layout, Mesh, candidate_ranks, interned, meeting_cells
from distckpt.format.manifest import Manifest, MeshEntry, TensorEntry
from distckpt.format.shard import ShardHeader, StoredBox
from distckpt.format.shares import Writers
from distckpt.storage.base import Store

HEADER_THREADS = 16


def mesh_of(entry: MeshEntry) -> Mesh:
    """Return a manifest's mesh with its runs of ranks written out."""
    ranks = tuple(itertools.chain.from_iterable(itertools.starmap(range, entry.ranks)))
    return interned(Mesh(tuple(entry.shape), ranks))


def layout_of(entry: TensorEntry, meshes: Sequence[Mesh]) -> Layout:
    """Return the layout that a manifest gives a tensor."""
    explicit = None
    if entry.boxes is not None:
        explicit = tuple(tuple(Box(tuple(o), tuple(s)) for o, s in held) for held in entry.boxes)
    return Layout(meshes[entry.mesh], tuple(entry.placements), explicit)


class ShardIndex:
    """The shards of one committed checkpoint. ``folder`` is the step folder's name on the store. Thread-safe."""

    def __init__(self, store: Store, manifest: Manifest, folder: str) -> None:
        self.store = store
        self.manifest = manifest
        self.folder = folder
        self._meshes = [mesh_of(mesh) for mesh in manifest.meshes]
        self._layouts: dict[str, Layout] = {}
        self._writers: Writers | None = None
        self._headers: dict[int, ShardHeader] = {}
        self._boxes: dict[int, dict[str, list[StoredBox]]] = {}
        self._exact: dict[tuple[str, Box], tuple[int, StoredBox]] = {}
        self._lock = threading.Lock()

    @property
    def opened(self) -> int:
        """How many headers were read so far."""
        return len(self._headers)

    def path(self, shard: int) -> str:
        """Return the name on the store of a shard."""
        return f"{self.folder}/{self.manifest.shards[shard].path}"

    def size(self, shard: int, path: str) -> int:
        """Return how many bytes a shard, or a file that it refers to, has, as the manifest or its header says."""
        if path == self.path(shard):
            return self.manifest.shards[shard].size
        return next(file.size for file in self.header(shard).files if file.path == path)

    def header(self, shard: int) -> ShardHeader:
        """Return a shard's header, checked against the manifest; raises ``ShardError``."""
        with self._lock:
            known = self._headers.get(shard)
        if known is not None:
            return known
        header = open_shard(self.store, self.manifest, self.folder, shard)
        boxes: dict[str, list[StoredBox]] = defaultdict(list)
        for stored in header.boxes:
            boxes[stored.fqn].append(stored)
        with self._lock:
            self._headers[shard], self._boxes[shard] = header, dict(boxes)
            self._exact.update({(stored.fqn, stored.box): (shard, stored) for stored in header.boxes})
        return header

    def open(self, shards: Iterable[int]) -> list[dict[str, list[StoredBox]]]:
        """Return what each shard holds, by FQN; headers that are not known yet are read in parallel."""
        wanted = list(shards)
        missing = [index for index in wanted if index not in self._boxes]
        if len(missing) > 1:
            workers = min(HEADER_THREADS, len(missing))
            with ThreadPoolExecutor(workers, thread_name_prefix="distckpt-headers") as pool:
                list(pool.map(self.header, missing))
        else:
            for index in missing:
                self.header(index)
        return [self._boxes[index] for index in wanted]

    def resolve(self, fqn: str) -> str:
        """Return the name under which a tensor is stored (follows an alias)."""
        return self.manifest.aliases.get(fqn, fqn)

    def candidates(self, fqn: str, box: Box) -> list[int]:
        """Return the shards that can hold a part of the box, by the tensor's layout alone: nothing is opened."""
        if not box.numel:
            return []
        if len(self.manifest.shards) == 1:
            return [0]
        return sorted(candidate_ranks(self.manifest.tensors[fqn].shape, self._layout(fqn), box))

    def writers(self, fqn: str, box: Box) -> list[int]:
        """Return the shards that hold the box if every rank wrote what it was to write: nothing is opened."""
        layout = self._layout(fqn)
        if layout.explicit is not None or len(self.manifest.shards) == 1:
            return self.candidates(fqn, box)
        with self._lock:
            if self._writers is None:
                entries = self.manifest.tensors.items()
                self._writers = Writers({n: (e.dtype, e.shape, self._layout(n)) for n, e in entries})
            cells = meeting_cells(self.manifest.tensors[fqn].shape, layout, box)
            return sorted({rank for cell in cells for rank in self._writers.of(fqn, cell, box)})

    def _layout(self, fqn: str) -> Layout:
        layout = self._layouts.get(fqn)
        if layout is None:
            layout = self._layouts[fqn] = layout_of(self.manifest.tensors[fqn], self._meshes)
        return layout

    def overlapping(self, fqn: str, box: Box) -> list[tuple[int, StoredBox]]:
        """Return (shard, stored box) for stored boxes that together hold ``box``; opens only shards that it needs.

        One that is equal to ``box``, in a shard that is open already, is enough: the common case of a resume.
        Raises ``ShardError`` where a header contradicts the manifest.
        """
        name = self.resolve(fqn)
        entry = self.manifest.tensors[name]
        promised = (entry.dtype, tuple(entry.shape))
        exact = self._exact.get((name, box))
        if exact is not None and box.numel and (exact[1].dtype, exact[1].global_shape) == promised:
            return [exact]
        found = self._overlapping(name, box, self.writers(name, box), promised)
        if sum(part.numel for _, stored in found if (part := stored.box.intersect(box)) is not None) != box.numel:
            found = self._overlapping(name, box, self.candidates(name, box), promised)
        return found

    def _overlapping(
        self, name: str, box: Box, shards: Sequence[int], promised: tuple[str, tuple[int, ...]]
    ) -> list[tuple[int, StoredBox]]:
        found = []
        for shard, boxes in zip(shards, self.open(shards), strict=True):
            for stored in boxes.get(name, ()):
                if (stored.dtype, stored.global_shape) != promised:
                    raise ShardError(
                        f"{self.path(shard)}: tensor {name!r} is {stored.dtype} {stored.global_shape} in the shard of "
                        f"rank {shard}, but {promised[0]} {promised[1]} in the manifest"
                    )
                if stored.box == box or stored.box.intersect(box) is not None:
                    found.append((shard, stored))
        return found
