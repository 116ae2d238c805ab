"""The only place that removes checkpoints: it executes what a policy chose, and sweeps orphans.

A checkpoint goes in this order: manifest, its folder synced, then data, then empty folders. A crash between
leaves orphans (data without a manifest), never a manifest without its data. Only names that a manifest lists
or that are strictly of our own making are deleted, one by one; whatever another manifest references stays.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from distckpt import failpoints
from distckpt.errors import CorruptCheckpoint, NotFound, StoreError, UnsupportedVersion
from distckpt.format import names
from distckpt.format.lineage import (
    Committed,
    as_committed,
    highest_generation,
    list_committed,
    read_generations,
    read_manifest,
    store_now,
)
from distckpt.format.manifest import Manifest
from distckpt.manager.gc_plan import Orphan, Removal, Snapshot, plan_gc, references
from distckpt.storage.base import Entry, Store

logger = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True)
class GcReport:
    """What was removed (in a dry run: would be). ``reasons`` says of each name in ``kept`` why it stays."""

    removed: tuple[Committed, ...]
    orphans_removed: tuple[str, ...]
    kept: tuple[str, ...]
    reasons: Mapping[str, str]
    freed_bytes: int
    dry_run: bool


def take_snapshot(store: Store) -> Snapshot:
    """Look at a store. Raises ``StoreError`` where it cannot be listed."""
    entries: list[Entry] = []
    attempts: list[str] = []
    for folder in store.list_folders(""):
        if names.parse_step_folder(folder) is None:
            continue
        below = store.list_folders(folder)
        attempts += [f"{folder}/{name}" for name in below if names.parse_attempt_name(name) is not None]
        entries += store.list(f"{folder}/")
    manifests: dict[Committed, Manifest | str] = {}
    foreign = None
    for committed in filter(None, (as_committed(entry.name) for entry in entries)):
        try:
            manifests[committed] = read_manifest(store, committed)
        except NotFound:
            continue
        except CorruptCheckpoint as error:
            manifests[committed] = str(error)
        except (UnsupportedVersion, StoreError) as error:
            manifests[committed] = foreign = str(error)
    generations = tuple(read_generations(store))
    return Snapshot(
        tuple(entries),
        tuple(attempts),
        manifests,
        generations,
        highest_generation(store),
        store_now(store),
        foreign,
    )


# ---------------------------------------------------------------- doing


@dataclass(slots=True)
class _Sweep:
    """One run: what is removed so far, and what would not go."""

    store: Store
    sizes: Mapping[str, int]
    dry_run: bool
    removed: list[Committed] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    freed: int = 0

    def delete(self, name: str) -> bool:
        """Remove one file (absent is fine); a failure is a reason, never an error."""
        if not self.dry_run:
            try:
                self.store.delete(name)
            except StoreError as error:
                self.reasons[name] = f"could not be removed: {error}"
                logger.warning("gc: %s could not be removed: %s", name, error)
                return False
        self.freed += self.sizes.get(name, 0)
        return True

    def remove_folders(self, folders: Iterable[str]) -> None:
        """Remove folders that are empty now; the store leaves others alone."""
        for folder in [] if self.dry_run else folders:
            try:
                self.store.remove_folder(folder)
            except StoreError as error:
                self.reasons[folder] = f"could not be removed: {error}"


def collect(
    store: Store,
    *,
    remove: Sequence[Committed],
    grace_s: float = 86400.0,
    current_generation: int,
    dry_run: bool,
    minimum_kept: int = 2,
) -> GcReport:
    """Remove these checkpoints, and orphans older than ``grace_s`` seconds of older generations.

    The ``minimum_kept`` newest readable commits of the lineage, pinned steps and whatever is in doubt stay,
    with the reason in the report. Safe to repeat, and to run beside saves, loads and another ``collect``.
    Raises ``StoreError`` only where the store cannot be listed; a file that cannot be deleted is reported.
    """
    snapshot = take_snapshot(store)
    plan = plan_gc(
        snapshot,
        remove,
        grace_s=grace_s,
        current_generation=current_generation,
        minimum_kept=minimum_kept,
    )
    sweep = _Sweep(store, {entry.name: entry.size for entry in snapshot.entries}, dry_run)
    known = dict(snapshot.manifests)
    for removal in plan.removals:
        _remove(sweep, removal, known, current_generation)
    _remove_orphans(sweep, plan.orphans, known)
    if not dry_run:
        if snapshot.foreign is None and snapshot.highest <= current_generation:
            _sweep_temporaries(sweep, grace_s)
        _remove_empty_steps(sweep, known)
    reasons = {**plan.reasons, **sweep.reasons}
    return GcReport(tuple(sweep.removed), tuple(sweep.orphans), tuple(sorted(reasons)), reasons, sweep.freed, dry_run)


def _remove(sweep: _Sweep, removal: Removal, known: dict[Committed, Manifest | str], current_generation: int) -> None:
    store, committed = sweep.store, removal.committed
    if not sweep.dry_run:
        late = _changed(store, committed, current_generation)
        if late is not None:
            sweep.reasons[committed.manifest_path] = late
            return
    failpoints.hit("gc.before_manifest", committed.manifest_path)
    if not sweep.delete(committed.manifest_path):
        return
    if not sweep.dry_run:
        try:
            store.sync_folder(committed.folder)
        except NotFound:
            pass
        except StoreError as error:
            # The manifest may come back after a power cut: its data must be there then.
            sweep.reasons[committed.manifest_path] = f"its removal is not durable, so the data stays: {error}"
            return
    failpoints.hit("gc.after_manifest", committed.manifest_path)
    known.pop(committed, None)
    sweep.removed.append(committed)
    needed = set() if sweep.dry_run else _referenced_now(store, known)
    if needed is None:
        sweep.reasons[committed.folder] = "its data stays: what other manifests reference is unknown"
        return
    failpoints.hit("gc.before_data", committed.folder)
    for name in removal.files:
        if name not in needed:
            sweep.delete(name)
    sweep.remove_folders((*removal.folders, committed.folder))


def _changed(store: Store, committed: Committed, current_generation: int) -> str | None:
    """Look once more, right before removing: was the step pinned or this job replaced meanwhile?"""
    try:
        newest = highest_generation(store)
        if newest > current_generation:
            return f"generation {newest} started meanwhile: only the newest job removes"
        store.size(f"{committed.folder}/{names.PINNED}")
    except NotFound:
        return None
    except StoreError as error:
        return f"the store could not be asked: {error}"
    return "it is pinned"


def _referenced_now(store: Store, known: dict[Committed, Manifest | str]) -> set[str] | None:
    """List manifests again and return what they reference; None where that is unknown. New ones are read."""
    try:
        present = list_committed(store)
    except StoreError:
        return None
    for committed in present:
        if committed not in known:
            try:
                known[committed] = read_manifest(store, committed)
            except NotFound:
                continue
            except (CorruptCheckpoint, UnsupportedVersion, StoreError):
                return None
    marked: set[str] = set()
    for committed, manifest in known.items():
        if not isinstance(manifest, str):
            marked |= references(committed, manifest)
    return marked


def _remove_orphans(sweep: _Sweep, orphans: Sequence[Orphan], known: dict[Committed, Manifest | str]) -> None:
    """Remove attempts' shards, unless a manifest turned up that needs one of them."""
    needed = set() if sweep.dry_run or not orphans else _referenced_now(sweep.store, known)
    for orphan in orphans:
        if needed is None or not needed.isdisjoint(orphan.files):
            sweep.reasons[orphan.folder] = "a manifest may reference it by now"
            continue
        deleted = [sweep.delete(name) for name in orphan.files]
        if all(deleted):
            sweep.orphans.append(orphan.folder)
        sweep.remove_folders((orphan.folder,))


def _sweep_temporaries(sweep: _Sweep, grace_s: float) -> None:
    """Remove the half made small files of killed processes, which no listing shows; only stores with folders have them."""
    remove = getattr(sweep.store, "sweep_temporaries", None)
    if remove is None:
        return
    try:
        folders = [f for f in sweep.store.list_folders("") if names.parse_step_folder(f) is not None]
        for folder in ("", "generations", "metrics", *folders):
            with contextlib.suppress(NotFound):
                remove(folder, grace_s)
    except StoreError as error:
        logger.warning("gc: temporary files could not be removed: %s", error)


def _remove_empty_steps(sweep: _Sweep, known: Mapping[Committed, Manifest | str]) -> None:
    """Remove step folders that are empty; those above the newest commit may be about to be used."""
    newest = max((c.step for c in known), default=-1)
    committed = {c.folder for c in known}
    try:
        folders = sweep.store.list_folders("")
    except StoreError:
        return
    steps = {folder: names.parse_step_folder(folder) for folder in folders}
    sweep.remove_folders(f for f, step in steps.items() if step is not None and step < newest and f not in committed)
