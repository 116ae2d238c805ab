"""Loading one committed checkpoint into live state: match names, read boxes, hand values back, prove it.

Every rank reads its own boxes; the ranks then compare outcomes in one round, so that all load the same checkpoint or
none does. What was loaded, missing, unexpected and re-derived is always reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from distckpt.boxes import Box
from distckpt.clock import Deadline
from distckpt.dcp import share
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.leaves import DROP_ON_RESIZE, State, unflatten_tree
from distckpt.dcp.read_plan import Request
from distckpt.dcp.reader import CheckpointReader, Want
from distckpt.engines.base import ENGINE, MODEL, OPTIM_STATE
from distckpt.engines.rng import derive_rng, restore_rng, rng_differences
from distckpt.errors import CorruptCheckpoint, DistckptError, IncompatibleState, first_names
from distckpt.format import typed_json
from distckpt.format.manifest import Manifest
from distckpt.manager.components import EXTRA, RNG, Components, LeafStateful
from distckpt.manager.exchange import common_names, fill_small, names_of, offer_names
from distckpt.manager.matching import NAMES, Matched, match_names, refuse_misfits
from distckpt.manager.reading import Restore, group_offers, groups_with, may_share, offers, read_planned
from distckpt.manager.report import LoadOptions, LoadReport

MAX_SENTENCES = 100


def restore(agreement: Agreement, key: str, load: Restore) -> LoadReport:
    """Load one checkpoint on all ranks; returns this rank's report.

    Three rounds: after matching names and planning (a saved name is unexpected only if no rank has it, and ranks that
    want the same may read together), after reading, and after handing everything over. Raises the same kind of error on
    every rank: ``CorruptCheckpoint`` (the caller may fall back to an older checkpoint; live tensors may hold parts of
    the damaged one until then), or ``IncompatibleState``.
    """
    matched: list[Matched] = []
    planned: list[Request] = []
    saved = load.reader.manifest
    every = sorted({*saved.tensors, *saved.aliases, *saved.objects, *saved.per_rank})
    shared = may_share(agreement.world_size, load)

    def match() -> list[str]:
        found = match_names(agreement.world_size, load)
        matched.append(found)
        told = [offer_names(agreement, every, found.report.unexpected)]
        if shared and not found.problems and not (load.options.strict and found.report.missing):
            planned.extend(_plan_here(load, found, apart=True))
            told += offers(load, planned)
        return told

    def common(by_rank: Sequence[Sequence[str]]) -> list[str]:
        names = common_names(agreement, (told[0] for told in by_rank))
        if not all(len(told) > 1 for told in by_rank):  # a rank that will refuse to load would be waited for
            return [names]
        least = 0 if load.config.share_loads == "always" else share.LEAST_BYTES
        return [names, *group_offers([told[1:] for told in by_rank], least)]

    answer, *groups = _together(agreement, f"{key}/names", load, match, combine=common)
    unexpected = names_of(answer, every, matched[0].report.unexpected)

    def read() -> list[str]:
        refuse_misfits(load, matched[0], unexpected)
        if not planned:
            planned.extend(_plan_here(load, matched[0]))
        read_planned(agreement, f"{key}/bytes", load, planned, groups_with(agreement.rank, groups))
        return []

    def place() -> list[str]:
        _place_here(agreement.rank, load, matched[0])
        return matched[0].report.rederived

    _together(agreement, f"{key}/read", load, read)
    # A round of its own: engines may call collectives while they take over, so no rank may have failed before.
    matched[0].report.rederived = _together(agreement, f"{key}/place", load, place, combine=_all_said)
    return matched[0].report


def _all_said(by_rank: Sequence[Sequence[str]]) -> list[str]:
    """Every sentence once, in order of ranks; the rest of very many is only counted."""
    every = list(dict.fromkeys(sentence for said in by_rank for sentence in said))
    return every if len(every) <= MAX_SENTENCES else [*every[:MAX_SENTENCES], f"{len(every) - MAX_SENTENCES} more"]


def _together(
    agreement: Agreement,
    key: str,
    load: Restore,
    work: Callable[[], list[str]],
    combine: Callable[[Sequence[Sequence[str]]], list[str]] = lambda _: [],
) -> list[str]:
    """Do the work on every rank and return all ranks' results combined; one rank's error is every rank's."""
    cause: DistckptError | None = None
    deadline = Deadline.after(load.config.timeout_s)
    with agreement.guard(key, deadline=deadline):
        try:
            outcome = ["", "", work()]
        except (DistckptError, OSError) as error:
            cause = error if isinstance(error, DistckptError) else CorruptCheckpoint(f"{load.path}: {error}")
            kind = "corrupt" if isinstance(cause, CorruptCheckpoint) else "other"
            outcome = [kind, f"rank {agreement.rank}: {type(cause).__name__}: {cause}", []]

    def decide(payloads: list[bytes]) -> bytes:
        kinds, texts, names = zip(*(msgspec.json.decode(p) for p in payloads), strict=True)
        kind = "other" if "other" in kinds else "corrupt" if "corrupt" in kinds else ""
        return msgspec.json.encode([kind, [t for t in texts if t], [] if kind else combine(names)])

    kind, texts, combined = msgspec.json.decode(
        agreement.round(key, msgspec.json.encode(outcome), decide, deadline=deadline)
    )
    if kind:
        error_type = CorruptCheckpoint if kind == "corrupt" else IncompatibleState
        raise error_type(f"{load.path} was not loaded: " + "; ".join(texts)) from cause
    return list(combined)


def _plan_here(load: Restore, matched: Matched, *, apart: bool = False) -> list[Request]:
    wants = fill_small(_wants(matched.state, matched.extras, matched.report), load.small, load.reader.manifest)
    return load.reader.plan(wants, apart=apart)


def _place_here(rank: int, load: Restore, matched: Matched) -> None:
    report, state, reader, options = matched.report, matched.state, load.reader, load.options
    tensors = {leaf.fqn: leaf.parts[0][1] for leaf in state.tensors.values() if leaf.parts} | matched.extras
    load.engine.finish(set(report.loaded), matched.objects, optimizer=matched.optimizer)
    _load_parts(report, reader, load.components, matched.objects, tensors, rank, options)
    if options.prove:
        live = load.engine.state(optimizer=matched.optimizer)
        load.components.add_leaf_targets(live)
        _prove(report, reader, live, load.config.threads)
    report.read_bytes, report.wanted_bytes = reader.stats.read_bytes, reader.stats.wanted_bytes
    report.headers_read = reader.index.opened


def _wants(state: State, extras: dict[str, torch.Tensor], report: LoadReport) -> list[Want]:
    loaded = set(report.loaded)
    leaves = [leaf for leaf in state.tensors.values() if leaf.fqn in loaded]
    wants = [Want(leaf.fqn, box, tensor) for leaf in leaves for box, tensor in leaf.parts]
    return wants + [Want(fqn, Box.whole(tuple(t.shape)), t) for fqn, t in extras.items()]


def _load_parts(
    report: LoadReport,
    reader: CheckpointReader,
    components: Components,
    objects: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    rank: int,
    options: LoadOptions,
) -> None:
    """Give scheduler, scaler, statefuls and RNG their values; the RNG last, so that nothing after it draws."""
    manifest = reader.manifest
    own = _own_objects(reader, rank, options)
    for name in components.parts:
        part = components.parts[name]
        if isinstance(part, LeafStateful):
            report.rederived += _load_leafy(report, name, part, manifest, objects, options)
        elif name in objects:
            components.load(name, objects[name], tensors)
        elif name in manifest.per_rank and options.wants(name):
            if components.kind(name) == DROP_ON_RESIZE and manifest.world_size != report.world_size:
                report.rederived.append(f"{name}: left as it is, it means nothing on another world size")
            elif name in own:
                components.load(name, own[name], tensors)
                report.rederived += _unused(name, manifest.world_size, report.world_size)
            else:
                report.rederived.append(f"{name}: rank {rank} is new and keeps its own")
        elif name.startswith(ENGINE) and options.wants(name) and hasattr(components.parts[name], "derive"):
            report.rederived += components.parts[name].derive(manifest.step)  # another engine saved this checkpoint
    if EXTRA in objects:
        report.extra_state = unflatten_tree(objects[EXTRA], tensors)
    elif EXTRA in own:
        report.extra_state = own[EXTRA]
    if RNG in manifest.per_rank and options.wants(RNG):
        _load_rng(report, reader, own, rank)


def _load_leafy(
    report: LoadReport,
    name: str,
    part: LeafStateful,
    manifest: Manifest,
    objects: dict[str, Any],
    options: LoadOptions,
) -> list[str]:
    """Let a part with leaves of its own take over what was read; without anything saved it starts from the model."""
    if name in objects:
        return part.take_over(name, objects[name], set(report.loaded), manifest.tensors.keys())
    if not any(loaded.startswith(MODEL) for loaded in report.loaded):
        return []
    return part.begin_again(name, "not in the checkpoint" if options.wants(name) else "left out of this load")


def _own_objects(reader: CheckpointReader, rank: int, options: LoadOptions) -> dict[str, Any]:
    manifest = reader.manifest
    if rank >= len(manifest.shards) or not any(options.wants(n) for n in manifest.per_rank):
        return {}
    return {n: typed_json.decode(v) for n, v in reader.index.header(rank).objects.items() if options.wants(n)}


def _load_rng(report: LoadReport, reader: CheckpointReader, own: dict[str, Any], rank: int) -> None:
    manifest = reader.manifest
    if RNG in own:
        state = own[RNG]
        report.rederived += [f"rng of rank {rank}: {d}" for d in rng_differences(state)]
    else:
        origin = rank % len(manifest.shards)
        state = derive_rng(typed_json.decode(reader.index.header(origin).objects[RNG]), rank=rank, step=manifest.step)
        report.rederived.append(
            f"rng of rank {rank}: new rank, derived from rank {origin}'s state (rule distckpt-rng-1)"
        )
    report.rederived += _unused("rng", manifest.world_size, report.world_size)
    restore_rng(state)


def _unused(name: str, saved: int, now: int) -> list[str]:
    return [f"{name} of ranks {now}..{saved - 1}: not used, the job is smaller now"] if now < saved else []


def _prove(report: LoadReport, reader: CheckpointReader, live: State, threads: int) -> None:
    """Read the checkpoint again and compare it with the live state as it is now, bit for bit."""
    loaded = set(report.loaded)
    leaves = {fqn: leaf for fqn, leaf in live.tensors.items() if fqn in loaded}
    for alias, target in live.aliases.items():  # tied here, but stored apart: both copies must be what is live
        if alias in loaded and alias in reader.manifest.tensors and target in live.tensors:
            leaves[alias] = live.tensors[target]
    proof = CheckpointReader(reader.store, reader.manifest, reader.folder)
    wants = [Want(fqn, box, tensor) for fqn, leaf in leaves.items() for box, tensor in leaf.parts]
    stats = proof.read(wants, threads=threads, compare=True)
    if stats.mismatches:
        raise IncompatibleState(
            f"after loading {report.path} the live state differs from it in {first_names(sorted(stats.mismatches), NAMES)}; "
            "something between storage and the tensors is wrong (a hook, a cast, a wrapper): do not train on"
        )
    expected = {n for n in loaded if n.startswith((MODEL, OPTIM_STATE)) and n in reader.manifest.tensors}
    absent = expected - set(leaves)
    if absent:
        raise IncompatibleState(f"after loading, the live state lacks {first_names(sorted(absent), NAMES)}")
    report.proved = len(leaves)
