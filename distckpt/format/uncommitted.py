"""Attempts that no manifest refers to: found by name and manifest alone, without writing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distckpt.errors import CorruptCheckpoint, StoreError, UnsupportedVersion
from distckpt.format import names
from distckpt.format.lineage import Committed, list_committed, read_manifest
from distckpt.storage.base import Store


@dataclass(frozen=True, slots=True)
class Uncommitted:
    """An attempt folder that no manifest refers to: of a save in flight, or an orphan of one that died.

    ``modified``: newest time in it by the store's clock, None if it is empty. ``in_doubt``: a manifest of the
    same step can't be read and might be the one that refers to it.
    """

    folder: str
    step: int
    generation: int
    files: int
    nbytes: int
    modified: float | None
    in_doubt: bool


def attempts_of(store: Store, commit: Committed) -> set[str]:
    """Return the attempts (names in its step's folder) that a manifest refers to. Raises as ``read_manifest`` does."""
    manifest = read_manifest(store, commit)
    return {manifest.attempt, *(shard.path.partition("/")[0] for shard in manifest.shards)}


def uncommitted(store: Store, referred: Callable[[Store, Committed], Iterable[str]] = attempts_of) -> list[Uncommitted]:
    """Return the attempts that no manifest refers to, by step and name. Raises ``StoreError``.

    ``referred``: who has read the manifests before need not do it again.
    """
    by_step: dict[str, list[Committed]] = {}
    for commit in list_committed(store):
        by_step.setdefault(commit.folder, []).append(commit)
    found = []
    for folder in store.list_folders(""):
        step = names.parse_step_folder(folder)
        if step is None:
            continue
        used, in_doubt = _used(store, by_step.get(folder, ()), referred)
        for attempt in store.list_folders(folder):
            parsed = names.parse_attempt_name(attempt)
            if parsed is None or attempt in used:
                continue
            entries = list(store.list(f"{folder}/{attempt}"))
            modified = max((entry.modified for entry in entries), default=None)
            nbytes = sum(entry.size for entry in entries)
            found.append(Uncommitted(f"{folder}/{attempt}", step, parsed[0], len(entries), nbytes, modified, in_doubt))
    return found


def _used(
    store: Store, committed: Iterable[Committed], referred: Callable[[Store, Committed], Iterable[str]]
) -> tuple[set[str], bool]:
    """Return the attempts that the readable manifests refer to, and whether one can't be read."""
    used: set[str] = set()
    in_doubt = False
    for commit in committed:
        try:
            used |= set(referred(store, commit))
        except (CorruptCheckpoint, UnsupportedVersion, StoreError):
            in_doubt = True
    return used, in_doubt
