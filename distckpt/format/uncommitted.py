"""Attempts that no manifest needs: found by name and manifest alone, without writing anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distckpt.errors import CorruptCheckpoint, StoreError, UnsupportedVersion
from distckpt.format import names
from distckpt.format.lineage import Committed, list_committed, read_manifest
from distckpt.storage.base import Store


@dataclass(frozen=True, slots=True)
class Uncommitted:
    """An attempt folder that no manifest needs: of a save in flight, or an orphan of one that died.

    ``modified``: newest time in it by the store's clock, None if it is empty. ``in_doubt``: a manifest of the
    same step can't be read and might be the one that needs it.
    """

    folder: str
    step: int
    generation: int
    files: int
    nbytes: int
    modified: float | None
    in_doubt: bool


def uncommitted(store: Store) -> list[Uncommitted]:
    """Return the attempts that no manifest needs, of whatever step, by step and name. Raises ``StoreError``."""
    used, unreadable = _used(store, list_committed(store))
    found = []
    for folder in store.list_folders(""):
        step = names.parse_step_folder(folder)
        if step is None:
            continue
        for attempt in store.list_folders(folder):
            parsed = names.parse_attempt_name(attempt)
            if parsed is None or f"{folder}/{attempt}" in used:
                continue
            entries = list(store.list(f"{folder}/{attempt}"))
            modified = max((entry.modified for entry in entries), default=None)
            nbytes = sum(entry.size for entry in entries)
            found.append(
                Uncommitted(
                    f"{folder}/{attempt}", step, parsed[0], len(entries), nbytes, modified, folder in unreadable
                )
            )
    return found


def _used(store: Store, committed: Iterable[Committed]) -> tuple[set[str], set[str]]:
    """Return the attempts that the readable manifests need, and the step folders with one that can't be read."""
    used: set[str] = set()
    unreadable: set[str] = set()
    for commit in committed:
        try:
            manifest = read_manifest(store, commit)
        except (CorruptCheckpoint, UnsupportedVersion, StoreError):
            unreadable.add(commit.folder)
        else:
            attempts = {manifest.attempt, *(shard.path.partition("/")[0] for shard in manifest.shards)}
            used |= {f"{commit.folder}/{attempt}" for attempt in attempts}
            used |= {reference.attempt for reference in manifest.references}
    return used, unreadable
