"""The reading of a load: alone, or shared among the ranks that want the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch.distributed as dist

from distckpt.config import CheckpointConfig
from distckpt.dcp import share
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.read_plan import KINDS, Request
from distckpt.dcp.reader import CheckpointReader
from distckpt.dcp.warming import Warming
from distckpt.engines.base import Engine
from distckpt.errors import AgreementError, DistckptError
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
    warming: Warming | None = None
    """What is fetched ahead until reading begins."""


def may_share(world_size: int, load: Restore) -> bool:
    """Whether ranks ask each other who wants the same; alike on all ranks."""
    mode, nbytes = load.config.share_loads, load.reader.manifest.nbytes
    together = world_size > 1 and dist.is_available() and dist.is_initialized()
    return together and (mode == "always" or (mode == "auto" and nbytes >= share.LEAST_BYTES))


def offers(load: Restore, planned: Sequence[Request]) -> list[str]:
    """Return what a rank tells the others of what it wants: of each kind a digest and a number of bytes.

    None where its memory has them already (the page cache, of an earlier load): one copy and no rank waits for another.
    """
    kinds = [[r for r in planned if r.kind == kind] for kind in KINDS]
    alone = load.config.share_loads == "auto" and load.reader.in_memory(planned)
    return [f"{share.fingerprint(wanted)} {0 if alone else share.size_of(wanted)}" for wanted in kinds]


def group_offers(by_rank: Sequence[Sequence[str]], least: int) -> list[str]:
    """Return, as JSON, of each kind the groups of ranks that want the same; ``by_rank`` are their ``offers``."""
    groups = []
    for told in zip(*by_rank, strict=True):
        pairs = (offer.split() for offer in told)
        groups.append(share.groups_of([(wanted, int(nbytes)) for wanted, nbytes in pairs], least))
    return [msgspec.json.encode(found).decode() for found in groups]


def groups_with(rank: int, answer: Sequence[str]) -> list[list[int]]:
    """Return of each kind the ranks of the group of ``rank``, from what ``group_offers`` answered; empty: it is alone."""
    groups = [msgspec.json.decode(text, type=list[list[int]]) for text in answer] or [[] for _ in KINDS]
    return [next((ranks for ranks in found if rank in ranks), []) for found in groups]


def read_planned(
    agreement: Agreement, key: str, load: Restore, planned: Sequence[Request], groups: Sequence[Sequence[int]]
) -> None:
    """Read what was planned: of each kind together with the ranks of ``groups[kind]``, who planned the same, or alone."""
    left: list[Request] = []
    failed: DistckptError | None = None
    if load.warming is not None:
        load.warming.stop()
    for kind, ranks in enumerate(groups):
        wanted = [request for request in planned if request.kind == kind]
        try:
            left += _read_together(agreement, f"{key}/{kind}", load, wanted, ranks) if ranks else wanted
        except DistckptError as error:  # the group of the next kind has other ranks, who would wait for this one
            failed = failed or error
    if failed is not None:
        raise failed
    if load.warming is not None:
        left = load.warming.spread(left)
    load.reader.read_requests(left, threads=load.config.threads, progress=load.progress)


def _read_together(
    agreement: Agreement, key: str, load: Restore, wanted: Sequence[Request], ranks: Sequence[int]
) -> list[Request]:
    """Read with other ranks as long as that pays; return what is left to read alone."""

    def decide(rates: share.Rates) -> bool:
        return load.config.share_loads == "always" or share.sharing_pays(len(ranks), rates)

    try:
        group = agreement.bytes_group(key, ranks, load.config.timeout_s)
        return load.reader.read_shared(
            wanted, group, threads=load.config.threads, decide=decide, progress=load.progress
        )
    except RuntimeError as error:  # gloo's own kind, also for a timeout
        raise AgreementError(
            f"rank {agreement.rank}: reading together with ranks {list(ranks)} failed: {error}"
        ) from error
