"""The reading of a load: alone, or shared among the ranks that want the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch.distributed as dist

from distckpt.config import CheckpointConfig
from distckpt.dcp import share
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.read_plan import Request
from distckpt.dcp.reader import CheckpointReader
from distckpt.engines.base import Engine
from distckpt.errors import AgreementError
from distckpt.manager.components import Components
from distckpt.manager.report import LoadOptions


@dataclass(frozen=True, slots=True)
class Restore:
    """One load on one rank: what it reads from, what it loads into, how."""

    reader: CheckpointReader
    engine: Engine
    components: Components
    config: CheckpointConfig
    options: LoadOptions
    path: str
    progress: Callable[[int], None] | None = None
    small: Mapping[str, bytes] = field(default_factory=dict)
    """Values of small tensors that the leader read for all ranks."""


def may_share(world_size: int, load: Restore) -> bool:
    """Whether ranks ask each other who wants the same; alike on all ranks."""
    mode, nbytes = load.config.share_loads, load.reader.manifest.nbytes
    together = world_size > 1 and dist.is_available() and dist.is_initialized()
    return together and (mode == "always" or (mode == "auto" and nbytes >= share.LEAST_BYTES))


def group_offers(offers: Sequence[Sequence[str]], least: int) -> list[str]:
    """Return, as JSON, the groups of ranks that want the same; ``offers[rank]`` is a fingerprint and a number of bytes."""
    found = share.groups_of([(wanted, int(nbytes)) for wanted, nbytes in offers], least)
    return [msgspec.json.encode(found).decode()]


def read_planned(agreement: Agreement, key: str, load: Restore, planned: list[Request], ranks: list[int]) -> None:
    """Read what was planned: alone, or with ``ranks`` (this one among them), who planned the same."""
    threads, progress = load.config.threads, load.progress
    if not ranks:
        load.reader.read_requests(planned, threads=threads, progress=progress)
        return

    def decide(rates: share.Rates) -> bool:
        return load.config.share_loads == "always" or share.sharing_pays(len(ranks), rates)

    try:
        group = agreement.bytes_group(key, ranks, load.config.timeout_s)
        load.reader.read_shared(planned, group, threads=threads, decide=decide, progress=progress)
    except RuntimeError as error:  # gloo's own kind, also for a timeout
        raise AgreementError(f"rank {agreement.rank}: reading together with ranks {ranks} failed: {error}") from error
