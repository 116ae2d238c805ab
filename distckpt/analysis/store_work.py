"""A job's checkpoint on a scratch root: saved, loaded whole, in part and shared, by the library's own paths.

Each rank holds its rows of eight large tensors and of small ones; under several ranks there is a tensor too that all of
them hold whole. What was loaded is compared with what was saved, outside the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from distckpt.analysis.together import Together
from distckpt.dcp import share
from distckpt.dcp.agreed import AgreedPlan, agree_plan
from distckpt.dcp.buffers import HostBytes
from distckpt.dcp.leaves import State, TensorLeaf, byte_view
from distckpt.dcp.read_plan import SPAN
from distckpt.dcp.reader import CheckpointReader, Want
from distckpt.dcp.saving import SaveRequest, save_error, table_of, write_and_commit
from distckpt.errors import AgreementError, CorruptCheckpoint
from distckpt.format import digest as digests
from distckpt.format.layout import Layout, Mesh, held_boxes
from distckpt.format.manifest import decode_manifest
from distckpt.storage.base import Store
from distckpt.storage.probes import cold

BLOCKS: Final = 8
COLUMNS: Final = 1024
SMALL_ROWS: Final = 4
REPLICATED: Final = "embedding"

SHARDED: Final = "blocks."
PART: Final = "blocks.0."
"""Prefixes of what is loaded: everything that is sharded, and an eighth of it."""


@dataclass(slots=True)
class Saved:
    """A committed checkpoint of the scratch root. ``shards`` are names on the store."""

    step: int
    path: str
    shards: tuple[str, ...]


@dataclass(slots=True)
class Loaded:
    """One load of all ranks together; ``rates`` of a shared one, as its ranks measured them."""

    nbytes: int
    seconds: float
    cold: bool | None
    rates: share.Rates | None = None


@dataclass(slots=True)
class Workload:
    """One rank's part of a state of about ``nbytes`` bytes in all."""

    ranks: Together
    nbytes: int
    timeout_s: float
    state: State = field(default_factory=State)
    _digests: dict[str, str] = field(default_factory=dict)
    _plan: AgreedPlan | None = None

    def __post_init__(self) -> None:
        rank, world = self.ranks.rank, self.ranks.world_size
        whole = 4 * COLUMNS
        # Enough for the turns in which a shared load measures storage and link, as far as there are bytes.
        turn = max(SPAN, min(share.TURN, share.MEMORY // world))
        replicated = min(self.nbytes // 2, max(self.nbytes // 4, (share.PROBE + 2) * turn * world)) if world > 1 else 0
        rows = max(1, (self.nbytes - replicated) // BLOCKS // whole // world) * world
        layout = Layout(Mesh.flat(range(world)), ("S(0)",))
        own = torch.Generator().manual_seed(rank)
        for block in range(BLOCKS):
            for name, extent in (("weight", rows), ("norm", SMALL_ROWS * world)):
                shape = (extent, COLUMNS)
                (held,) = held_boxes(shape, layout, rank)
                values = _noise(held.box.sizes, own)
                self.state.add_leaf(
                    TensorLeaf(f"{SHARDED}{block}.{name}", "float32", shape, layout, ((held.box, values),))
                )
        if replicated:
            values = _noise((max(1, replicated // whole), COLUMNS), torch.Generator().manual_seed(-1))
            self.state.add_tensor(REPLICATED, values)
        self._digests = {fqn: self._digest(fqn) for fqn in self.state.tensors}

    def save(self, store: Store, step: int, threads: int) -> tuple[Saved, float]:
        """Save and commit, durably; return it and the seconds of the slowest rank. Raises as a save does."""
        paths: list[str] = []
        seconds = self.ranks.seconds("save", lambda: paths.append(self._save(store, step, threads)))
        shards = self.ranks.led("shards", lambda: _shards(store, step, paths[0]))
        return Saved(step, paths[0], tuple(shards)), seconds

    def _save(self, store: Store, step: int, threads: int) -> str:
        agreement = self.ranks.agreement
        key = f"{self.ranks.key('save')}/{step}"
        try:
            agreed = agree_plan(agreement, key, table_of(self.state), self._plan, step=step, timeout_s=self.timeout_s)
        except AgreementError as error:
            raise save_error(step, error) from error
        self._plan = agreed
        source = HostBytes([self.state.tensors[piece.fqn].view(piece.box) for piece in agreed.pieces])
        request = SaveRequest(save_id=key, step=step, generation=1)
        return write_and_commit(agreement, store, agreed, request, source, threads=threads, timeout_s=self.timeout_s)

    def load(self, store: Store, saved: Saved, threads: int, prefix: str = SHARDED, *, shared: bool = False) -> Loaded:
        """Evict the files, load what begins with ``prefix``, and compare it; ``shared``: each byte read once for all ranks.

        Raises as a load does, ``CorruptCheckpoint`` where other values were loaded than were saved.
        """
        chosen = {fqn: leaf for fqn, leaf in self.state.tensors.items() if fqn.startswith(prefix)}
        for leaf in chosen.values():
            for _, tensor in leaf.parts:
                tensor.zero_()
        evicted = self.ranks.gather("evict", lambda: cold(store, saved.shards))
        group = None
        if shared:
            everyone = range(self.ranks.world_size)
            group = self.ranks.agreement.bytes_group(self.ranks.key("share"), everyone, self.timeout_s)
        rates: list[share.Rates] = []

        def decide(measured: share.Rates) -> bool:
            rates.append(measured)
            return True

        def read() -> None:
            name = saved.path
            manifest = decode_manifest(store.read(name), where=f"{store.url}/{name}", step=saved.step)
            reader = CheckpointReader(store, manifest, name.rpartition("/")[0])
            wants = [Want(fqn, box, tensor) for fqn, leaf in chosen.items() for box, tensor in leaf.parts]
            planned = reader.plan(wants)
            if group is None:
                reader.read_requests(planned, threads=threads)
            else:
                reader.read_shared(planned, group, threads=threads, decide=decide)

        seconds = self.ranks.seconds("load", read)
        self.ranks.gather("compare", lambda: self._compare(chosen))
        nbytes = sum(self.ranks.gather("bytes", lambda: sum(leaf.local_nbytes for leaf in chosen.values())))
        known = [state for state in evicted if state is not None]
        return Loaded(nbytes, seconds, all(known) if known else None, rates[0] if rates else None)

    @property
    def saved_nbytes(self) -> int:
        """Bytes of all ranks' tensors in a checkpoint."""
        return sum(4 * torch.Size(leaf.shape).numel() for leaf in self.state.tensors.values())

    def _digest(self, fqn: str) -> str:
        return digests.digest(b"".join(digests.digest(byte_view(t)).encode() for _, t in self.state.tensors[fqn].parts))

    def _compare(self, names: Sequence[str] | dict[str, TensorLeaf]) -> None:
        wrong = [fqn for fqn in names if self._digest(fqn) != self._digests[fqn]]
        if wrong:
            raise CorruptCheckpoint(
                f"rank {self.ranks.rank}: {wrong[:4]} are not what was saved; do not trust this storage"
            )


def _noise(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32).uniform_(generator=generator)


def _shards(store: Store, step: int, path: str) -> list[str]:
    manifest = decode_manifest(store.read(path), where=f"{store.url}/{path}", step=step)
    folder = path.rpartition("/")[0]
    return [f"{folder}/{shard.path}" for shard in manifest.shards]
