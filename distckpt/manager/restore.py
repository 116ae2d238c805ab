"""Loading one committed checkpoint into live state: match names, read boxes, hand values back, prove it.

Every rank reads its own boxes; the ranks then compare outcomes in one round, so that all load the same checkpoint or
none does. What was loaded, missing, unexpected and re-derived is always reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from distckpt.boxes import Box
from distckpt.clock import Deadline
from distckpt.dcp import share
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.leaves import DROP_ON_RESIZE, State, TensorLeaf, torch_dtype, tree_refs, unflatten_tree
from distckpt.dcp.read_plan import Request
from distckpt.dcp.reader import CheckpointReader, Want
from distckpt.engines.base import ENGINE, MODEL, OPTIM_GROUPS, OPTIM_STATE, has_groups
from distckpt.engines.rng import derive_rng, restore_rng, rng_differences
from distckpt.errors import CorruptCheckpoint, DistckptError, IncompatibleState
from distckpt.format import typed_json
from distckpt.format.manifest import Manifest
from distckpt.manager.components import EXTRA, RNG, Components, LeafStateful
from distckpt.manager.exchange import common_names, fill_small, names_of, offer_names
from distckpt.manager.reading import Restore, group_offers, groups_with, may_share, offers, read_planned
from distckpt.manager.report import LoadOptions, LoadReport

MAX_SENTENCES = 100


@dataclass(slots=True)
class _Matched:
    """A load whose names are matched and whose targets exist."""

    report: LoadReport
    state: State
    extras: dict[str, torch.Tensor]
    objects: dict[str, Any]
    optimizer: bool
    problems: list[str]


def restore(agreement: Agreement, key: str, load: Restore) -> LoadReport:
    """Load one checkpoint on all ranks; returns this rank's report.

    Three rounds: after matching names and planning (a saved name is unexpected only if no rank has it, and ranks that
    want the same may read together), after reading, and after handing everything over. Raises the same kind of error on
    every rank: ``CorruptCheckpoint`` (the caller may fall back to an older checkpoint; live tensors may hold parts of
    the damaged one until then), or ``IncompatibleState``.
    """
    matched: list[_Matched] = []
    planned: list[Request] = []
    saved = load.reader.manifest
    every = sorted({*saved.tensors, *saved.aliases, *saved.objects, *saved.per_rank})
    shared = may_share(agreement.world_size, load)

    def match() -> list[str]:
        found = _match_here(agreement.rank, agreement.world_size, load)
        matched.append(found)
        told = [offer_names(agreement, every, found.report.unexpected)]
        if shared and not found.problems and not (load.options.strict and found.report.missing):
            planned.extend(_plan_here(load, found, apart=True))
            told += offers(planned)
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
        _refuse_here(load, matched[0], unexpected)
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


def _match_here(rank: int, world_size: int, load: Restore) -> _Matched:
    reader, options, manifest = load.reader, load.options, load.reader.manifest
    saved = {fqn: (entry.dtype, tuple(entry.shape)) for fqn, entry in manifest.tensors.items()}
    saved |= {alias: saved[target] for alias, target in manifest.aliases.items()}
    in_optimizer = [n for n in (*saved, *manifest.objects) if n.startswith("optim.")]
    optimizer = any(map(options.wants, in_optimizer))
    without = options.wants(OPTIM_GROUPS) and not in_optimizer and has_groups(load.engine)
    state = load.engine.prepare(saved, optimizer=optimizer)
    load.components.add_targets(state, {n: entry for n, entry in saved.items() if options.wants(n)})
    report = LoadReport(
        path=load.path,
        step=manifest.step,
        generation=manifest.generation,
        epoch=manifest.epoch,
        metrics={k: typed_json.decode(v) for k, v in manifest.metrics.items()},
        model_config=typed_json.decode(manifest.config),
        saved_world_size=manifest.world_size,
        world_size=world_size,
    )
    objects = {n: typed_json.decode(v) for n, v in manifest.objects.items() if options.wants(n)}
    if OPTIM_GROUPS in objects:
        objects[OPTIM_GROUPS] = _with_tied(objects[OPTIM_GROUPS], manifest.aliases)
    extras = _saved_part_tensors(objects, load.components, state, saved)
    _match(report, state, reader, load.components, options, set(extras))
    if without:
        report.missing = sorted([*report.missing, OPTIM_GROUPS])  # the live optimizer stays as it is, not in silence
    loaded = set(report.loaded)
    live = [leaf for leaf in state.tensors.values() if leaf.fqn in loaded]
    problems = [problem for leaf in live if (problem := _misfit(leaf, reader, options, report))]
    return _Matched(report, state, extras, objects, optimizer, problems)


def _plan_here(load: Restore, matched: _Matched, *, apart: bool = False) -> list[Request]:
    wants = fill_small(_wants(matched.state, matched.extras, matched.report), load.small, load.reader.manifest)
    return load.reader.plan(wants, apart=apart)


def _refuse_here(load: Restore, matched: _Matched, unexpected: set[str]) -> None:
    matched.report.unexpected = sorted(unexpected)
    has_optimizer = any(name.startswith("optim.") for name in matched.state.objects)
    _refuse_misfits(matched.report, matched.problems, load.options, has_optimizer)


def _place_here(rank: int, load: Restore, matched: _Matched) -> None:
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


def _with_tied(groups: list[dict[str, Any]], aliases: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return param groups that also name tied parameters by their other names, under which they may live here."""
    names: dict[str, list[str]] = {}
    for alias, target in aliases.items():
        if alias.startswith(MODEL):
            names.setdefault(target.removeprefix(MODEL), []).append(alias.removeprefix(MODEL))
    return [{**g, "params": [n for p in g["params"] for n in (p, *names.get(p, ()))]} for g in groups]


def _saved_part_tensors(
    objects: dict[str, Any], components: Components, state: State, saved: dict[str, tuple[str, tuple[int, ...]]]
) -> dict[str, torch.Tensor]:
    """Allocate host tensors for what saved parts refer to but live ones lack (also the user's extra state)."""
    extras = {}
    for name, tree in objects.items():
        if name in components.parts or name == EXTRA:
            for ref in tree_refs(tree):
                if ref not in state.tensors:
                    dtype, shape = saved[ref]
                    extras[ref] = torch.empty(shape, dtype=torch_dtype(dtype))
    return extras


def _match(
    report: LoadReport,
    state: State,
    reader: CheckpointReader,
    components: Components,
    options: LoadOptions,
    extras: set[str],
) -> None:
    """Fill loaded, missing, unexpected (here: not on this rank) and skipped."""
    manifest = reader.manifest
    saved_names = {*manifest.tensors, *manifest.aliases, *manifest.objects, *manifest.per_rank}
    live = {*state.tensors, *state.aliases, *state.objects, *components.parts, *extras}
    if options.load_rng_state and components.config.save_rng_state:
        live.add(RNG)
    optimizer_live = any(n.startswith("optim.") for n in live)
    for name in sorted(saved_names | live):
        in_optimizer = optimizer_live and name.startswith(OPTIM_STATE) and name in manifest.objects
        known = name in live or name == EXTRA or in_optimizer
        if not options.wants(name) or (name.startswith(ENGINE) and (name not in live or name not in saved_names)):
            report.skipped.append(name)  # an engine's own counters mean nothing to another engine
        elif name in saved_names and known:
            report.loaded.append(name)
        elif name in saved_names:
            report.unexpected.append(name)
        elif state.aliases.get(name) not in saved_names:  # a tied name is there under its other name
            report.missing.append(name)


def _refuse_misfits(report: LoadReport, problems: list[str], options: LoadOptions, optimizer_live: bool) -> None:
    """Raise ``IncompatibleState`` for shapes and dtypes that differ, and if strict for names on one side only."""
    problems = list(problems)
    if options.strict and report.missing:
        problems.append(f"not in the checkpoint: {_few(report.missing)}")
    if options.strict and report.unexpected:
        without = not optimizer_live and any(n.startswith("optim.") for n in report.unexpected)
        hint = (
            " (it has optimizer state, but no optimizer was given: pass one, or load_optimizer=False)"
            if without
            else ""
        )
        problems.append(f"in the checkpoint but not here: {_few(report.unexpected)}{hint}")
    if problems:
        raise IncompatibleState(
            f"checkpoint {report.path} does not fit: {'; '.join(problems[:10])}. Fix the model or the optimizer, or load "
            "less: include=/exclude= patterns, strict=False"
        )


def _misfit(leaf: TensorLeaf, reader: CheckpointReader, options: LoadOptions, report: LoadReport) -> str | None:
    entry = reader.manifest.tensors[reader.index.resolve(leaf.fqn)]
    if tuple(entry.shape) != leaf.shape:
        return f"{leaf.fqn} has shape {list(leaf.shape)} here and {entry.shape} in the checkpoint"
    if entry.dtype == leaf.dtype:
        return None
    if options.cast == "any" or (
        options.cast == "exact" and _widens(torch_dtype(entry.dtype), torch_dtype(leaf.dtype))
    ):
        report.cast.append(leaf.fqn)
        return None
    return f"{leaf.fqn} is {leaf.dtype} here and {entry.dtype} in the checkpoint (cast='any' would round it)"


def _widens(saved: torch.dtype, live: torch.dtype) -> bool:
    """Whether every value of one dtype exists in the other: within floats, complex, or integers of one signedness."""
    alike = (
        saved.is_floating_point == live.is_floating_point
        and saved.is_complex == live.is_complex
        and saved.is_signed == live.is_signed
        and torch.bool not in (saved, live)
    )
    try:
        return alike and torch.promote_types(saved, live) == live
    except RuntimeError:  # float8 kinds promote to nothing; float32 holds all of them
        return alike and live in (torch.float32, torch.float64)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


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
            f"after loading {report.path} the live state differs from it in {_few(sorted(stats.mismatches))}; something between "
            "storage and the tensors is wrong (a hook, a cast, a wrapper): do not train on"
        )
    expected = {n for n in loaded if n.startswith((MODEL, OPTIM_STATE)) and n in reader.manifest.tensors}
    absent = expected - set(leaves)
    if absent:
        raise IncompatibleState(f"after loading, the live state lacks {_few(sorted(absent))}")
    report.proved = len(leaves)
