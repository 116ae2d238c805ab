"""From what was typed to the root, the step, and the commits that are meant."""

from __future__ import annotations

import os
from typing import Any

from distckpt.cli.output import readable
from distckpt.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint, StoreError, UnsupportedVersion
from distckpt.format import names
from distckpt.format.catalog import Location, parse_location
from distckpt.format.lineage import Committed, lineage, list_committed, read_generations, read_manifest, strays
from distckpt.storage import PosixStore
from distckpt.storage.base import Store


def place(path: str, step: int | None = None) -> Location:
    """Return what a path and ``--step`` mean; ``CheckpointNotFound`` if no such folder exists."""
    at = parse_location(path)
    if isinstance(at.store, PosixStore) and not os.path.isdir(at.store.root):
        raise CheckpointNotFound(f"{at.store.root}: no such folder; check the path")
    if step is None:
        return at
    if at.step not in (None, step):
        raise ConfigError(f"--step {step}: the path {path} already means step {at.step}; give the root instead")
    return Location(at.store, step, at.generation)


def root_place(path: str) -> Location:
    """Return a place that must be a root with at least one job start or commit on it."""
    at = place(path)
    if at.step is not None:
        raise ConfigError(f"{path}: this command takes a root, not a step of it")
    if not list_committed(at.store) and not read_generations(at.store):
        raise CheckpointNotFound(f"{root_of(at.store)}: this is no root of checkpoints; check the path")
    return at


def root_of(store: Store) -> str:
    """Return the root as other tools take it: a local path, else a URL."""
    return str(getattr(store, "root", store.url))


def path_of(at: Location) -> str:
    """Return the path or URL that means this place."""
    root = root_of(at.store)
    if at.step is None:
        return root
    folder = f"{root}/{names.step_folder(at.step)}"
    return folder if at.generation is None else f"{folder}/{names.manifest_name(at.generation)}"


def commits(at: Location) -> list[tuple[Committed, bool]]:
    """Return the commits there, each with whether it is a stray: the lineage's newest first, then strays.

    Nothing is read but names. Raises ``CheckpointNotFound`` where there is none.
    """
    committed, generations = list_committed(at.store), read_generations(at.store)
    line = lineage(committed, generations)
    every = [*((c, False) for c in line), *((c, True) for c in strays(committed, generations))]
    found = [(c, s) for c, s in every if at.step in (None, c.step) and at.generation in (None, c.generation)]
    if not found:
        what = "no checkpoint" if at.step is None else f"no checkpoint of step {at.step}"
        there = f"; its steps are {', '.join(str(c.step) for c in line[:20])}" if line else ""
        raise CheckpointNotFound(f"{root_of(at.store)}: {what} is there{there}")
    return found


def run_metric(store: Store, line: list[Committed]) -> tuple[str, str]:
    """Return (metric, mode) that the run itself calls best by, as its newest readable manifest says."""
    for commit in line:
        try:
            provenance: Any = readable(read_manifest(store, commit).provenance)
        except (CorruptCheckpoint, UnsupportedVersion, StoreError):
            continue
        settings = provenance.get("settings") if isinstance(provenance, dict) else None
        if isinstance(settings, dict):
            name, mode = settings.get("metric_name"), settings.get("metric_mode")
            if isinstance(name, str) and mode in ("min", "max"):
                return name, mode
        break
    return "loss", "min"
