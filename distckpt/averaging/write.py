"""Writing a blend as an ordinary committed checkpoint: alone, or each rank its shards; all of it or nothing."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import msgspec
import torch

from distckpt import __version__, clock, errors
from distckpt.averaging.arithmetic import one_thread
from distckpt.averaging.blend import Blend
from distckpt.averaging.layout import Output, plan_output
from distckpt.clock import Deadline
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.parallel import asked_by_one, processors
from distckpt.dcp.rounds import Decide
from distckpt.errors import AgreementError, ConfigError, CorruptCheckpoint, DistckptError, ReplicasDiffer, SaveFailed
from distckpt.format import digest as digests
from distckpt.format import names, typed_json
from distckpt.format.catalog import parse_location
from distckpt.format.commit import begin_attempt, commit
from distckpt.format.lineage import Committed
from distckpt.format.manifest import Manifest, ShardEntry
from distckpt.format.read_ahead import MEMORY
from distckpt.format.shard import plan_shard
from distckpt.format.verify import verify
from distckpt.importers.commit_source import new_generation
from distckpt.importers.stream_shard import write_pieces
from distckpt.storage.base import Store

REQUEST: Final = 4 << 20
"""Bytes of the result that a thread works on at a time, at most."""
LEAST: Final = 1 << 20
"""The same, at least: threads that do less at a time meet at the interpreter's lock."""
WRITING: Final = 2
"""Threads that write while others add up: of what an average of two checkpoints moves a third is written."""
Progress = Callable[[int, int], None]
"""Called with (bytes of the result written by this rank, bytes it has to write), one call at a time."""

_calls: defaultdict[tuple[str, int], Iterator[int]] = defaultdict(itertools.count)


def fresh_key(what: str, agreement: Agreement) -> str:
    """Return a key that no round of these ranks had; the same on all of them, as all make the same calls.

    What a rank does alone, or with some of the others, is counted apart: the rest do not make that call.
    """
    return f"{what}/{next(_calls[agreement.prefix, agreement.world_size])}"


def together(agreement: Agreement, timeout_s: float, what: str, work: Callable[[], bytes], decide: Decide) -> bytes:
    """Do some work on all ranks and agree on its result; what fails on one rank is raised on all, at once."""
    key, deadline = fresh_key(what, agreement), Deadline.after(timeout_s)
    try:
        with agreement.guard(key, deadline=deadline):
            payload = work()
        return agreement.round(key, payload, decide, deadline=deadline)
    except AgreementError as error:
        raise_cause(error)


@contextmanager
def joined(agreement: Agreement | None, timeout_s: float) -> Iterator[Agreement]:
    """Yield the agreement with the other ranks: the one given, else that of the default process group, left at the end."""
    if agreement is not None:
        yield agreement
        return
    with closing(Agreement.from_environment(timeout_s=timeout_s)) as group:
        yield group


@dataclass(frozen=True, slots=True)
class Target:
    """Where the result goes and how: ``threads`` add up at most, each with 24 MiB; ``timeout_s`` for each wait for ranks."""

    out: str
    step: int
    threads: int
    shard_bytes: int
    timeout_s: float


class _Receipt(msgspec.Struct, array_like=True):
    index: int
    size: int
    header: str


def write_blend(
    blend: Blend,
    target: Target,
    provenance: Mapping[str, Any],
    agreement: Agreement,
    progress: Progress | None = None,
) -> str:
    """Write and commit on all ranks; returns the new step's path or URL.

    Until the last step there is no result: a failure of any rank leaves an attempt that was never committed. Raises on
    every rank what one of them raised: ``ConfigError`` (the root has that step), ``ShardError`` (a damaged source),
    ``IncompatibleState``, ``SaveFailed``.
    """
    key = fresh_key("average-write", agreement)
    try:
        return _write(blend, target, provenance, agreement, key, progress)
    except AgreementError as error:
        raise_cause(error)


def _write(
    blend: Blend,
    target: Target,
    provenance: Mapping[str, Any],
    agreement: Agreement,
    key: str,
    progress: Progress | None,
) -> str:
    deadline = Deadline.after(target.timeout_s)
    store = parse_location(target.out).store
    with agreement.guard(f"{key}/begin", deadline=deadline):
        _check_target(store, blend)
        output = plan_output(blend, agreement.world_size, target.shard_bytes)
        plan = _digest(blend, output, target)

    def begin(payloads: list[bytes]) -> bytes:
        other = [rank for rank, payload in enumerate(payloads) if payload != payloads[0]]
        if other:
            raise ReplicasDiffer(
                f"ranks {other} average other checkpoints, or otherwise, than rank 0; call it alike everywhere"
            )
        generation = new_generation(store, target.step, "distckpt average")
        save_id = uuid.uuid4().hex
        attempt = begin_attempt(store, step=target.step, generation=generation, nonce=save_id[:8])
        return msgspec.json.encode([generation, attempt, save_id])

    generation, attempt, save_id = msgspec.json.decode(
        agreement.round(f"{key}/begin", plan.encode(), begin, deadline=deadline)
    )
    folder = f"{names.step_folder(target.step)}/{attempt}"
    with agreement.guard(f"{key}/commit", deadline=deadline):
        receipts = _write_shards(blend, output, store, folder, save_id, target, agreement, f"{key}/commit", progress)
        store.sync_folder(folder)

    def decide(payloads: list[bytes]) -> bytes:
        found = [msgspec.convert(r, _Receipt) for payload in payloads for r in msgspec.json.decode(payload)]
        manifest = _manifest(blend, output, target, provenance, generation, attempt, save_id, found)
        path = commit(store, manifest)
        report = verify(store, Committed(target.step, generation, path))
        if not report.ok:
            raise CorruptCheckpoint(f"{store.url}/{path}: written, but damaged: {report.problems[0]}")
        return path.encode()

    agreement.round(f"{key}/commit", msgspec.json.encode(receipts), decide, deadline=deadline)
    return f"{getattr(store, 'root', store.url)}/{names.step_folder(target.step)}"


def _check_target(store: Store, blend: Blend) -> None:
    for member in blend.members:
        source = member.source.checkpoint
        if source is not None and source.store.url == store.url:
            raise ConfigError(
                f"{store.url}: an average needs a root of its own, or a resuming job would take it for its newest"
            )


def _digest(blend: Blend, output: Output, target: Target) -> str:
    """Return what all ranks must agree on: members, weights, rules, and who writes what."""
    rows = [(n, m.dtype, m.shape, m.how) for n, m in blend.tensors.items()]
    pieces = [[(p.fqn, p.box) for p in shard] for shard in output.shards]
    return digests.digest(repr((blend.digest, rows, blend.aliases, pieces, target)).encode("utf-8", "surrogatepass"))


def _write_shards(
    blend: Blend,
    output: Output,
    store: Store,
    folder: str,
    save_id: str,
    target: Target,
    agreement: Agreement,
    key: str,
    progress: Progress | None,
) -> list[_Receipt]:
    count = len(output.shards)
    mine = output.of_rank(agreement.rank, agreement.world_size)
    plans = [
        plan_shard(output.shards[i], rank=i, world_size=count, save_id=save_id, objects=_own_objects(blend, i))
        for i in mine
    ]
    total, done, lock = sum(sum(plan.nbytes) for plan in plans), 0, threading.Lock()

    def count_bytes(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)

    # What is read ahead does the waiting: threads add up, and what they work on at a time has to fit into its memory.
    threads = min(target.threads, processors())
    request = max(LEAST, min(REQUEST, MEMORY // (4 * threads * len(blend.members))))
    stopped = asked_by_one(lambda: agreement.aborted(key))
    receipts = []
    for index, plan in zip(mine, plans, strict=True):
        pieces = plan.pieces

        def fill(piece: int, start: int, stop: int, view: memoryview, pieces: Any = pieces) -> None:
            blend.fill(pieces[piece].fqn, pieces[piece].box, start, stop, view)

        name = f"{folder}/{names.shard_name(index, count)}"
        with one_thread(), blend.reading_ahead((pieces[i].fqn, pieces[i].box) for i in plan.order):
            written = write_pieces(
                store,
                name,
                plan,
                fill,
                threads=threads + WRITING,
                making=threads,
                request=request,
                progress=count_bytes,
                stopped=stopped,
            )
        receipts.append(_Receipt(index, written.size, written.header))
    return receipts


def _own_objects(blend: Blend, index: int) -> dict[str, Any]:
    own = blend.rank_objects[index] if blend.rank_objects else {}
    return {name: typed_json.encode(value, where=f"$.{name}") for name, value in own.items()}


def _manifest(
    blend: Blend,
    output: Output,
    target: Target,
    provenance: Mapping[str, Any],
    generation: int,
    attempt: str,
    save_id: str,
    receipts: list[_Receipt],
) -> Manifest:
    by_index = {receipt.index: receipt for receipt in receipts}
    count = len(output.shards)
    missing = sorted(set(range(count)) - by_index.keys())
    if missing:
        raise SaveFailed(f"step {target.step}: no rank wrote shards {missing}")
    shards = [
        ShardEntry(path=f"{attempt}/{names.shard_name(i, count)}", size=by_index[i].size, header=by_index[i].header)
        for i in range(count)
    ]
    return Manifest(
        step=target.step,
        epoch=blend.newest.source.epoch,
        time=clock.utc_text(),
        generation=generation,
        attempt=attempt,
        save_id=save_id,
        world_size=count,
        engine="average",
        meshes=output.meshes,
        tensors=output.tensors,
        aliases=dict(blend.aliases),
        objects={name: typed_json.encode(value, where=f"$.{name}") for name, value in blend.objects.items()},
        per_rank=sorted({name for own in blend.rank_objects for name in own}),
        metrics={},
        config=typed_json.encode(blend.config, where="$.config"),
        provenance=typed_json.encode(dict(provenance), where="$.provenance"),
        software={"torch": str(torch.__version__), "distckpt": __version__},
        shards=shards,
    )


def raise_cause(error: AgreementError) -> NoReturn:
    """Raise on every rank the kind of error that the first failed rank raised, with all ranks' texts."""
    cause = error.__cause__
    if isinstance(cause, Exception) and not isinstance(cause, AgreementError):
        raise cause from None
    first = error.failures[0] if error.failures else None
    kind = getattr(errors, first.kind, None) if first is not None else None
    if isinstance(kind, type) and issubclass(kind, DistckptError) and not issubclass(kind, AgreementError):
        raise kind(str(error)) from error
    raise SaveFailed(f"the average was not written: {error}") from error
