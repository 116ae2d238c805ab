"""Attempts that no manifest needs: found by name and manifest alone, without writing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distckpt.errors import CorruptCheckpoint, StoreError, UnsupportedVersion
from distckpt.format import names
from distckpt.format.lineage import Committed, list_committed, read_manifest
from distckpt.format.manifest import Manifest
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


def attempts_of(commit: Committed, manifest: Manifest) -> frozenset[str]:
    """Return the attempts (``step folder/name``) whose files a manifest needs, also those of earlier steps. Pure."""
    own = {manifest.attempt, *(shard.path.partition("/")[0] for shard in manifest.shards)}
    return frozenset({f"{commit.folder}/{attempt}" for attempt in own} | {r.attempt for r in manifest.references})


def _read_attempts(store: Store, commit: Committed) -> frozenset[str]:
    return attempts_of(commit, read_manifest(store, commit))


def uncommitted(
    store: Store, needed: Callable[[Store, Committed], Iterable[str]] = _read_attempts
) -> list[Uncommitted]:
    """Return the attempts that no manifest needs, of whatever step, by step and name. Raises ``StoreError``.

    ``needed``: the same as ``attempts_of`` from a caller who has read the manifests before.
    """
    used, unreadable = _used(store, list_committed(store), needed)
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


def _used(
    store: Store, committed: Iterable[Committed], needed: Callable[[Store, Committed], Iterable[str]]
) -> tuple[set[str], set[str]]:
    """Return the attempts that the readable manifests need, and the step folders with one that can't be read."""
    used: set[str] = set()
    unreadable: set[str] = set()
    for commit in committed:
        try:
            used.update(needed(store, commit))
        except (CorruptCheckpoint, UnsupportedVersion, StoreError):
            unreadable.add(commit.folder)
    return used, unreadable
