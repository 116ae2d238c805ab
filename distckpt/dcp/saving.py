"""One save, on every rank: compare what is replicated, write the shards, gather receipts, commit or fail together.

The store of the agreement carries a few bytes per rank; the training process group is never used. A save goes
through three rounds: plan (on the training thread, see ``agreed.py``), begin, commit.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from distckpt import clock, failpoints
from distckpt.clock import Deadline
from distckpt.dcp.agreed import AgreedPlan
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.cover import added, cover_of
from distckpt.dcp.fingerprint import combined, fingerprint
from distckpt.dcp.incremental import Chain, check_bases, merged
from distckpt.dcp.leaves import DROP_ON_RESIZE, GROUPS, PER_RANK, REPLICATED, State
from distckpt.dcp.parallel import asked_by_one
from distckpt.dcp.planner import Plan, Row, check_tiling, manifest_tensors, pieces_for
from distckpt.dcp.replicas import Claims, disagreeing, object_claims, refuse
from distckpt.dcp.tables import Table
from distckpt.dcp.writer import Source, WrittenShard, write_shard
from distckpt.errors import (
    AgreementError,
    CommitInDoubt,
    DistckptError,
    IncompatibleState,
    LayoutChanged,
    ReplicasDiffer,
    SaveFailed,
    SnapshotFailed,
    StaleGeneration,
    UnserializableState,
)
from distckpt.format import digest as digests
from distckpt.format import names, typed_json
from distckpt.format.commit import begin_attempt, commit, is_committed
from distckpt.format.manifest import Manifest, ShardEntry
from distckpt.format.runs import FileRef
from distckpt.heap import no_collections
from distckpt.storage.base import Store

log = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What one save stores besides tensors; the same on all ranks except ``objects`` and ``replicas``.

    ``objects`` are encoded (typed JSON) by name. ``replicas`` are digests of replicated tensors' values, on the first
    save of a structure (``tensor_claims``). ``trained``: FQNs of tensors that training changes; a fingerprint of them
    goes into the manifest's provenance as ``weights``.
    """

    save_id: str
    step: int
    generation: int
    epoch: int | float | None = None
    engine: str = "torch"
    metrics: Mapping[str, Any] = field(default_factory=dict)
    config: Any = None
    provenance: Any = None
    software: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)
    replicas: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()


class _Receipt(msgspec.Struct, array_like=True):
    size: int
    header: str
    plan: str
    cover: int
    sourced: dict[str, bytes]
    weights: str
    references: list[tuple[FileRef, int]] = []
    base: str = ""
    """Name of the manifest that ``references`` come from; empty where there are none."""


def table_of(state: State) -> Table:
    """Return the structure of a state: what the plan depends on."""
    rows = {fqn: Row(leaf.dtype, leaf.shape, leaf.layout) for fqn, leaf in sorted(state.tensors.items())}
    objects = {name: leaf.kind for name, leaf in sorted(state.objects.items())}
    return Table(rows, dict(sorted(state.aliases.items())), objects)


def encode_objects(state: State) -> dict[str, Any]:
    """Return every object as typed JSON; ``UnserializableState`` names the key path of what cannot be stored."""
    return {name: typed_json.encode(leaf.value, where=f"$.{name}") for name, leaf in state.objects.items()}


def write_and_commit(
    agreement: Agreement,
    store: Store,
    agreed: AgreedPlan,
    request: SaveRequest,
    source: Source,
    *,
    threads: int,
    timeout_s: float,
    before_write: Callable[[], None] = lambda: None,
    before_receipt: Callable[[], None] = lambda: None,
    block: int = digests.BLOCK,
    chain: Chain | None = None,
) -> str:
    """Write this rank's shard, and commit the checkpoint with all others; returns the manifest's name on the store.

    ``before_write`` runs once the attempt has begun (a full save sends tensors to the leader there), ``before_receipt``
    once the shard is durable; what either raises fails the save on every rank. ``block`` is the number of bytes of each
    digest. With ``chain`` what the checkpoint before holds already is referred to.
    Every rank gets the same answer. Raises ``SaveFailed`` (or ``StaleGeneration``, ``LayoutChanged``,
    ``ReplicasDiffer``) with all failed ranks' causes; ``CommitInDoubt`` where storage could not be asked either.
    """
    deadline = Deadline.after(timeout_s)
    try:
        path = _attempt(
            agreement, store, agreed, request, source, threads, deadline, before_write, before_receipt, block, chain
        )
    except AgreementError as error:
        try:
            path = _resolve(store, request, error)
        except CommitInDoubt:
            if chain is not None:
                chain.forget()
            raise
    if chain is not None:
        chain.committed()
    return path


def _attempt(
    agreement: Agreement,
    store: Store,
    agreed: AgreedPlan,
    request: SaveRequest,
    source: Source,
    threads: int,
    deadline: Deadline,
    before_write: Callable[[], None],
    before_receipt: Callable[[], None],
    block: int,
    chain: Chain | None,
) -> str:
    failpoints.hit("save.begin", request.save_id)
    begin_key, commit_key = f"{request.save_id}/begin", f"{request.save_id}/commit"

    attempt = _begin(agreement, store, agreed, request, begin_key, deadline)
    failpoints.hit("save.begun", request.save_id)
    with agreement.guard(commit_key, deadline=deadline):
        folder = f"{names.step_folder(request.step)}/{attempt}"
        path = f"{attempt}/{names.shard_name(agreement.rank, agreement.world_size)}"
        own = {n: v for n, v in request.objects.items() if agreed.written.objects[n] in (PER_RANK, DROP_ON_RESIZE)}
        before_write()
        base = None if chain is None else chain.base(request.step, request.generation)
        written = write_shard(
            store,
            f"{names.step_folder(request.step)}/{path}",
            agreed.placed,
            source,
            rank=agreement.rank,
            world_size=agreement.world_size,
            save_id=request.save_id,
            objects=own,
            threads=threads,
            stopped=asked_by_one(lambda: agreement.aborted(commit_key)),
            block=block,
            base=base,
        )
        store.sync_folder(folder)
        failpoints.hit("save.synced", request.save_id)
        before_receipt()
        if chain is not None:
            shard = f"{names.step_folder(request.step)}/{path}"
            chain.written(written, shard, step=request.step, generation=request.generation)
        used = base.manifest_path if base is not None and written.references else ""
        receipt = msgspec.msgpack.encode(_receipt(agreement.rank, agreed, request, written, used))

    def decide(payloads: list[bytes]) -> bytes:
        receipts = [msgspec.msgpack.decode(p, type=_Receipt) for p in payloads]
        bases = {receipt.base for receipt in receipts}
        check_bases(store, bases)
        committed = commit(store, _manifest(agreed, request, attempt, receipts))
        check_bases(store, bases, committed=True)
        return committed.encode()

    failpoints.hit("save.receipt", request.save_id)
    path = agreement.round(commit_key, receipt, decide, deadline=deadline).decode()
    failpoints.hit("save.verdict", request.save_id)
    return path


def _begin(
    agreement: Agreement,
    store: Store,
    agreed: AgreedPlan,
    request: SaveRequest,
    key: str,
    deadline: Deadline,
) -> str:
    """Compare what is replicated and begin an attempt; returns its name. ``ReplicasDiffer`` names values and ranks."""
    claims = Claims({**object_claims(agreed.held, request.objects), **request.replicas})

    def begin(payloads: list[bytes]) -> bytes:
        differing = disagreeing(payloads)
        if differing:
            return msgspec.json.encode(differing)
        nonce = uuid.uuid4().hex[:8]
        return begin_attempt(store, step=request.step, generation=request.generation, nonce=nonce).encode()

    def explain(payloads: list[bytes]) -> bytes:
        refuse(payloads)
        return b""

    verdict = agreement.round(key, claims.encode(), begin, deadline=deadline)
    if verdict[:1] == b"[":
        details = claims.details(msgspec.json.decode(verdict, type=list[str]))
        agreement.round(f"{key}/differ", details, explain, deadline=deadline)
    return verdict.decode()


def _receipt(rank: int, agreed: AgreedPlan, request: SaveRequest, written: WrittenShard, base: str) -> _Receipt:
    return _Receipt(
        size=written.size,
        header=written.header,
        plan=agreed.id,
        cover=agreed.cover,
        sourced={
            name: typed_json.canonical(value)
            for name, value in request.objects.items()
            if rank in agreed.written.sources.get(name, ())
        },
        weights=fingerprint(agreed.pieces, written.digests, request.trained),
        references=list(written.references),
        base=base,
    )


@no_collections()
def _manifest(agreed: AgreedPlan, request: SaveRequest, attempt: str, receipts: list[_Receipt]) -> Manifest:
    """Check all receipts against the plan and put the manifest together (leader only)."""
    _check_receipts(agreed, request.step, receipts)
    constant = agreed.placed.constant
    if manifest_tensors not in constant:
        constant[manifest_tensors] = manifest_tensors(agreed.written)
    meshes, tensors = constant[manifest_tensors]
    provenance, weights = request.provenance, combined(r.weights for r in receipts)
    if weights and isinstance(provenance, Mapping):
        provenance = {**provenance, "weights": weights}
    world = len(receipts)
    manifest = Manifest(
        step=request.step,
        epoch=request.epoch,
        time=clock.utc_text(),
        generation=request.generation,
        attempt=attempt,
        save_id=request.save_id,
        world_size=world,
        engine=request.engine,
        meshes=meshes,
        tensors=tensors,
        aliases=dict(agreed.written.aliases),
        objects=_merged_objects(agreed.written, receipts),
        per_rank=sorted(n for n, k in agreed.written.objects.items() if k in (PER_RANK, DROP_ON_RESIZE)),
        metrics={k: typed_json.encode(v) for k, v in request.metrics.items()},
        config=typed_json.encode(request.config, where="$.model_config"),
        provenance=typed_json.encode(provenance, where="$.provenance"),
        software=dict(request.software),
        shards=[
            ShardEntry(path=f"{attempt}/{names.shard_name(rank, world)}", size=r.size, header=r.header)
            for rank, r in enumerate(receipts)
        ],
        plan=agreed.entry(),
    )
    return manifest.referring(merged(r.references for r in receipts))


def _check_receipts(agreed: AgreedPlan, step: int, receipts: Sequence[_Receipt]) -> None:
    """Prove that all ranks wrote by this plan, and that their boxes cover every tensor exactly once."""
    others = [rank for rank, r in enumerate(receipts) if r.plan != agreed.id]
    if others:
        raise LayoutChanged(f"step {step}: ranks {others[:16]} wrote by another plan; the next save plans afresh")
    if added(r.cover for r in receipts) == agreed.whole:
        return
    # Something is wrong, so take the time to say where: one rank's boxes after the other, none of them kept.
    for rank, receipt in enumerate(receipts):
        if cover_of(((p.fqn, p.box) for p in pieces_for(agreed.written, rank)), agreed.id) != receipt.cover:
            raise LayoutChanged(
                f"step {step}: ranks [{rank}] wrote other boxes than planned; the next save plans afresh"
            )
    check_tiling(agreed.written, [pieces_for(agreed.written, rank) for rank in range(len(receipts))])
    raise IncompatibleState(f"step {step}: the boxes of all ranks together do not cover the tensors exactly once")


def _merged_objects(plan: Plan, receipts: list[_Receipt]) -> dict[str, Any]:
    """Take replicated objects from the ranks that sent them, and merge param groups by position."""
    merged: dict[str, Any] = {}
    for name, kind in plan.objects.items():
        if kind in (REPLICATED, GROUPS):
            values = [typed_json.loads(receipts[rank].sourced[name]) for rank in plan.sources[name]]
            value = values[0] if kind == REPLICATED else merge_groups(name, values)
            merged[name] = typed_json.encode(value, where=f"$.{name}")
    return merged


def merge_groups(name: str, by_rank: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge optimizer param groups of ranks that hold different parameters: same position, same settings."""
    merged: list[dict[str, Any]] = []
    for groups in by_rank:
        for position, group in enumerate(groups):
            if position == len(merged):
                merged.append({**group, "params": list(group["params"])})
                continue
            base = merged[position]
            if {k: v for k, v in base.items() if k != "params"} != {k: v for k, v in group.items() if k != "params"}:
                raise ReplicasDiffer(
                    f"{name}[{position}] has other settings on some ranks; give all stages the same groups"
                )
            base["params"] += [p for p in group["params"] if p not in base["params"]]
    return merged


def _resolve(store: Store, request: SaveRequest, error: AgreementError) -> str:
    """Turn a failed agreement into the verdict: storage is the truth where the message did not arrive."""
    folder = names.step_folder(request.step)
    if error.in_doubt:
        try:
            committed = is_committed(store, request.step, request.generation, request.save_id)
            if committed:  # whoever linked the manifest may have died before its folders were synced
                store.sync_folder(folder)
                store.sync_folder("")
        except OSError as unreadable:
            raise CommitInDoubt(
                f"step {request.step}: no verdict ({error}), and storage cannot be asked ({unreadable}); the next start finds out"
            ) from error
        if committed:
            log.warning("step %d: no verdict from rank 0, but storage holds the commit: %s", request.step, error)
            return f"{folder}/{names.manifest_name(request.generation)}"
        if error.missing:  # rank 0 fell silent while it decided; should it only be slow, its commit may still appear
            raise CommitInDoubt(f"step {request.step}: not committed up to now: {error}") from error
    raise save_error(request.step, error) from error


def save_error(step: int, error: AgreementError) -> DistckptError:
    """Return the first cause's own kind of error where callers act on it, else ``SaveFailed``."""
    kinds: tuple[type[DistckptError], ...] = (
        StaleGeneration,
        LayoutChanged,
        SnapshotFailed,
        ReplicasDiffer,
        IncompatibleState,
        UnserializableState,
    )
    first = error.failures[0].kind if error.failures else ""
    kind = next((k for k in kinds if k.__name__ == first), SaveFailed)
    return kind(f"step {step} was not committed: {error}")
