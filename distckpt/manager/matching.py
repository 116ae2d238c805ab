"""Matching a checkpoint's names with what is live: what can be loaded, what is missing, what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distckpt.dcp.leaves import State, TensorLeaf, torch_dtype, tree_refs
from distckpt.dcp.reader import CheckpointReader
from distckpt.engines.base import ENGINE, MODEL, OPTIM_GROUPS, OPTIM_STATE, has_groups
from distckpt.errors import IncompatibleState, first_names
from distckpt.format import typed_json
from distckpt.manager.components import EXTRA, RNG, Components
from distckpt.manager.reading import Restore
from distckpt.manager.report import LoadOptions, LoadReport

NAMES = 6
"""Names that a message shows of a list of them."""


@dataclass(slots=True)
class Matched:
    """A load whose names are matched and whose targets exist."""

    report: LoadReport
    state: State
    extras: dict[str, torch.Tensor]
    objects: dict[str, Any]
    optimizer: bool
    problems: list[str]


def match_names(world_size: int, load: Restore) -> Matched:
    """Make the targets of a load and match names, shapes and dtypes on this rank; nothing is refused yet."""
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
    return Matched(report, state, extras, objects, optimizer, problems)


def refuse_misfits(load: Restore, matched: Matched, unexpected: set[str]) -> None:
    """Report ``unexpected``, names that no rank has a place for, and raise ``IncompatibleState`` if this load may not go on.

    Shapes and dtypes that differ always end it; names on one side only if it is strict.
    """
    report, options = matched.report, load.options
    report.unexpected = sorted(unexpected)
    problems = list(matched.problems)
    if options.strict and report.missing:
        problems.append(f"not in the checkpoint: {first_names(report.missing, NAMES)}")
    if options.strict and report.unexpected:
        problems.append(f"in the checkpoint but not here: {first_names(report.unexpected, NAMES)}{_hint(matched)}")
    if problems:
        raise IncompatibleState(
            f"checkpoint {report.path} does not fit: {'; '.join(problems[:10])}. Fix the model or the optimizer, or load "
            "less: include=/exclude= patterns, strict=False"
        )


def _hint(matched: Matched) -> str:
    """Say so where it is the optimizer that nobody has given."""
    saved = any(name.startswith("optim.") for name in matched.report.unexpected)
    if not saved or any(name.startswith("optim.") for name in matched.state.objects):
        return ""
    return " (it has optimizer state, but no optimizer was given: pass one, or load_optimizer=False)"


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
