"""From a path or URL to the checkpoints it means: a root, a step's folder, or one manifest. Never writes."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from distckpt.errors import (
    CheckpointNotFound,
    CorruptCheckpoint,
    ManifestError,
    StoreError,
    UnsupportedVersion,
)
from distckpt.format import names, typed_json
from distckpt.format.lineage import (
    Committed,
    lineage,
    list_committed,
    read_generations,
    read_manifest,
    read_root,
    strays,
)
from distckpt.format.manifest import Manifest
from distckpt.format.verify import quick_check
from distckpt.storage import check_location, open_store
from distckpt.storage.base import Store

logger = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint as its manifest describes it. ``nbytes`` is the size of its shards; ``path`` opens it.

    ``stray``: outside the lineage, never resumed from. ``problem`` says why the manifest can't be read; the
    other fields are then empty but for step and generation, which are in its name.
    """

    step: int
    generation: int
    epoch: int | float | None
    time: str
    metrics: dict[str, Any]
    nbytes: int
    world_size: int
    engine: str
    path: str
    stray: bool
    pinned: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Location:
    """What a path or URL names: a store, and a step and generation where it goes that deep."""

    store: Store
    step: int | None = None
    generation: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that was looked for, with its manifest."""

    store: Store
    committed: Committed
    manifest: Manifest


def parse_location(path_or_url: str | os.PathLike[str]) -> Location:
    """Tell a root from a step folder and a manifest, by the last components of the name alone.

    Links in a local path are followed, as it is the user's own. Raises ``ConfigError`` for an unknown scheme.
    """
    text = os.fspath(path_or_url)
    check_location(text)
    if "://" not in text:
        text = os.path.realpath(text)
    above, _, leaf = text.rstrip("/").rpartition("/")
    step = names.parse_step_folder(leaf)
    if step is not None:
        return Location(open_store(above or "/"), step)
    generation = names.parse_manifest_name(leaf)
    if generation is None:
        return Location(open_store(text))
    root, _, folder = above.rpartition("/")
    step = names.parse_step_folder(folder)
    if step is None:
        raise CheckpointNotFound(
            f"{text}: a manifest belongs in a folder named after its step ({names.step_folder(100)}), where "
            "its shards are found; give that folder"
        )
    return Location(open_store(root or "/"), step, generation)


def find_checkpoint(path_or_url: str | os.PathLike[str], *, strict: bool = False) -> Found:
    """Return the checkpoint that a path or URL means.

    A root means the newest of its lineage whose manifest is whole and whose shards have the right sizes: one
    that is damaged is passed over with a warning, or raised as ``CorruptCheckpoint`` with ``strict``. A step
    means that step (of the lineage if there are several), a manifest means itself; neither falls back to
    anything.

    Raises ``CheckpointNotFound``, ``CorruptCheckpoint``, ``UnsupportedVersion`` or ``StoreError``.
    """
    at = parse_location(path_or_url)
    _check_root(at.store)
    if at.step is None:
        committed = list_committed(at.store)
        return _newest(at.store, lineage(committed, read_generations(at.store)), committed, strict)
    chosen = _commit_of_step(at)
    return Found(at.store, chosen, read_manifest(at.store, chosen))


def _commit_of_step(at: Location) -> Committed:
    alone = [c for c in list_committed(at.store, at.step) if at.generation in (None, c.generation)]
    if len(alone) == 1:  # whatever its lineage: no other step is looked at, of which there may be hundreds
        return alone[0]
    committed = list_committed(at.store)
    line = lineage(committed, read_generations(at.store))
    ordered = [*line, *sorted(set(committed).difference(line), key=lambda c: c.generation, reverse=True)]
    matching = [c for c in ordered if c.step == at.step and at.generation in (None, c.generation)]
    if not matching:
        what = f"step {at.step}" + (f" of generation {at.generation}" if at.generation is not None else "")
        there = sorted({c.step for c in line}, reverse=True)[:20]
        raise CheckpointNotFound(f"{at.store.url}: no commit of {what} is there; steps to resume from: {there}")
    return matching[0]


def _newest(store: Store, line: list[Committed], committed: list[Committed], strict: bool) -> Found:
    if not line:
        others = f"; {len(committed)} strays of older jobs are" if committed else ""
        raise CheckpointNotFound(f"{store.url}: no checkpoint is there{others}; check the path, or train one first")
    reasons: list[str] = []
    for candidate in line:
        try:
            manifest = read_manifest(store, candidate)
            problems = quick_check(store, candidate, manifest)
        except (ManifestError, StoreError) as error:
            reasons.append(str(error))
        else:
            if not problems:
                return Found(store, candidate, manifest)
            reasons.append(f"{problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else ""))
        if strict:
            raise CorruptCheckpoint(f"{store.url}: the newest checkpoint is damaged: {reasons[-1]}")
        logger.warning("%s: passing over step %d: %s", store.url, candidate.step, reasons[-1])
    raise CorruptCheckpoint(f"{store.url}: none of {len(line)} checkpoints can be read: " + "; ".join(reasons[:5]))


def _check_root(store: Store) -> None:
    try:
        read_root(store)
    except (ManifestError, StoreError) as error:
        # Every manifest checks itself; the root file only names the run.
        logger.warning("going on without the root file: %s", error)


def list_checkpoints(path_or_url: str | os.PathLike[str], all: bool = False) -> list[CheckpointInfo]:
    """Return the checkpoints under a root (or of one step), newest first, each described by its manifest.

    Strays and those whose manifest can't be read (``problem`` says why) are listed only with ``all``, after
    the others; unreadable ones are warned about otherwise. An empty or absent root gives an empty list.
    """
    at = parse_location(path_or_url)
    _check_root(at.store)
    committed, generations = list_committed(at.store), read_generations(at.store)
    line = lineage(committed, generations)
    # A step folder with several commits means the first of these; the others need their full name.
    first: dict[int, Committed] = {}
    for c in [*line, *strays(committed, generations)]:
        first.setdefault(c.step, c)
    wanted = [
        c
        for c in (*line, *(strays(committed, generations) if all else ()))
        if at.step in (None, c.step) and at.generation in (None, c.generation)
    ]

    def describe(c: Committed) -> CheckpointInfo:
        return _describe(at.store, c, c not in line, c.folder if first[c.step] == c else c.manifest_path)

    if len(wanted) > 1:
        with ThreadPoolExecutor(8, thread_name_prefix="distckpt-list") as pool:
            infos = list(pool.map(describe, wanted))
    else:
        infos = [describe(c) for c in wanted]
    if all:
        return infos
    for info in infos:
        if info.problem is not None:
            logger.warning("not listed: %s", info.problem)
    return [info for info in infos if info.problem is None]


def _describe(store: Store, committed: Committed, stray: bool, name: str) -> CheckpointInfo:
    # A local path can be given to any other tool; other stores have only URLs.
    path = f"{getattr(store, 'root', store.url)}/{name}"
    pinned = is_pinned(store, committed)
    where = (committed.step, committed.generation)
    try:
        m = read_manifest(store, committed)
        metrics = {key: typed_json.decode(value, where=f"{path}: $.metrics") for key, value in m.metrics.items()}
    except (ManifestError, UnsupportedVersion, StoreError) as error:
        return CheckpointInfo(*where, None, "", {}, 0, 0, "", path, stray, pinned, str(error))
    nbytes = sum(shard.size for shard in m.shards)
    return CheckpointInfo(*where, m.epoch, m.time, metrics, nbytes, m.world_size, m.engine, path, stray, pinned)


def is_pinned(store: Store, committed: Committed) -> bool:
    """Whether the step is exempt from removal."""
    try:
        store.size(f"{committed.folder}/{names.PINNED}")
    except StoreError:
        return False
    return True
