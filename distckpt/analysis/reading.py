"""Reads a run's folder into a ``Run``: nothing is written, no tensor is read, and damage is told instead of raised."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from distckpt.analysis.record import GROUPS, Row, Run, Save, finite_or_not
from distckpt.boxes import Box
from distckpt.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    NotFound,
    StoreError,
    UnsupportedVersion,
)
from distckpt.format import names, typed_json
from distckpt.format.catalog import parse_location
from distckpt.format.digest import digest
from distckpt.format.dtypes import itemsize
from distckpt.format.lineage import (
    MAX_MANIFEST_BYTES,
    Committed,
    Generation,
    as_committed,
    lineage,
    read_generations,
    read_root,
)
from distckpt.format.manifest import Manifest, decode_manifest
from distckpt.format.uncommitted import Uncommitted, attempts_of, uncommitted
from distckpt.format.verify import quick_check
from distckpt.storage.base import Entry, Store

_UNREADABLE: Final = (CorruptCheckpoint, UnsupportedVersion, StoreError)


class RunReader:
    """Reads one run, as often as wanted; what never changes (manifests, files of metrics) is read once."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        at = parse_location(path)
        if at.step is not None:
            raise ConfigError(f"{os.fspath(path)}: this is a step of a run; give the run's folder")
        self.store = at.store
        self._saves: dict[str, Save] = {}
        self._rows: dict[str, tuple[Row, ...]] = {}

    def read(self) -> Run:
        """Return what is there now. Raises ``CheckpointNotFound`` where no job ever started, ``StoreError``."""
        store, problems = self.store, []
        entries = {entry.name: entry for entry in store.list("")}
        generations = read_generations(store)
        commits = [c for c in map(as_committed, entries) if c is not None]
        records = [n for n in map(names.parse_generation_file, entries) if n is not None]
        if not commits and not records:
            raise CheckpointNotFound(f"{_root(store)}: no run is there; check the path")
        lost = sorted(set(records) - {g.number for g in generations} - {c.generation for c in commits})
        problems += [f"the record of job start {number} cannot be read" for number in lost]
        run_id, created = "", ""
        try:
            root = read_root(store) or {}
            run_id, created = str(root.get("run_id", "")), str(root.get("created", ""))
        except _UNREADABLE as error:
            problems.append(str(error))
        saves = self._read_saves(commits, generations, entries)
        rows, damaged = self._read_rows(entries)
        problems += damaged
        attempts = uncommitted(store, self._referred)
        return Run(
            _root(store), store, run_id, created, tuple(generations), saves, rows, _on_line(rows, generations),
            tuple(attempts), _beats(entries.values()), _storage(entries.values(), saves, attempts), _metric(saves),
            tuple(problems),
        )  # fmt: skip

    def _read_saves(
        self, commits: Sequence[Committed], generations: Sequence[Generation], entries: Mapping[str, Entry]
    ) -> tuple[Save, ...]:
        line = set(lineage(commits, generations))

        def read(commit: Committed) -> Save | None:
            at = entries[commit.manifest_path].modified
            known = self._saves.get(commit.manifest_path)
            try:
                save = known or _read_save(self.store, commit, at)
            except NotFound:
                return None  # removed since it was listed
            except _UNREADABLE as error:
                save = Save(commit, False, at, problem=str(error))
            if save.problem is None:
                self._saves[commit.manifest_path] = save
            pinned = f"{commit.folder}/{names.PINNED}" in entries
            return replace(
                save, stray=commit not in line, pinned=pinned, problem=save.problem or self._missing(save, entries)
            )

        with ThreadPoolExecutor(8, thread_name_prefix="distckpt-run") as pool:
            found = [save for save in pool.map(read, commits) if save is not None]
        return tuple(sorted(found, key=lambda save: (save.step, save.generation)))

    def _referred(self, store: Store, commit: Committed) -> set[str]:
        known = self._saves.get(commit.manifest_path)
        return attempts_of(store, commit) if known is None else {path.split("/")[1] for path, _ in known.shards}

    def _missing(self, save: Save, entries: Mapping[str, Entry]) -> str | None:
        """Return what is wrong with the files: sizes from the listing; only a doubt asks the storage again."""
        if all(path in entries and entries[path].size == size for path, size in save.shards):
            return None
        problems = quick_check(self.store, save.committed)
        return f"{problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else "") if problems else None

    def _read_rows(self, entries: Iterable[str]) -> tuple[tuple[Row, ...], list[str]]:
        problems = []
        for name in entries:
            parsed = names.parse_metrics_file(name)
            if parsed is None or name in self._rows:
                continue
            try:
                self._rows[name] = _rows(self.store.read(name), parsed[0], name)
            except _UNREADABLE as error:
                problems.append(f"metrics are lost: {error}")
        every = [row for name in sorted(self._rows) for row in self._rows[name]]
        return tuple(sorted(every, key=lambda row: row.step)), problems


# ---------------------------------------------------------------- parts


def _root(store: Store) -> str:
    return str(getattr(store, "root", store.url))


def _read_save(store: Store, commit: Committed, at: float) -> Save:
    where = f"{store.url}/{commit.manifest_path}"
    if store.size(commit.manifest_path) > MAX_MANIFEST_BYTES:
        raise CorruptCheckpoint(f"{where}: too large for a manifest")
    data = store.read(commit.manifest_path)
    m = decode_manifest(data, where=where, step=commit.step, generation=commit.generation)
    metrics = {name: typed_json.decode(value, where=f"{where}: $.metrics") for name, value in m.metrics.items()}
    provenance = typed_json.decode(m.provenance, where=f"{where}: $.provenance")
    return Save(
        commit, False, at, digest(data), m.epoch, m.time, metrics, provenance if isinstance(provenance, Mapping) else {},
        m.software, m.save_id, m.engine, m.world_size, sum(shard.size for shard in m.shards), _groups(m),
        tuple((f"{commit.folder}/{shard.path}", shard.size) for shard in m.shards),
    )  # fmt: skip


def _groups(manifest: Manifest) -> tuple[int, ...]:
    found = dict.fromkeys(GROUPS, 0)
    for fqn, entry in manifest.tensors.items():
        first = fqn.partition(".")[0]
        group = {"model": "model", "optim": "optimizer"}.get(first, "other")
        found[group] += Box.whole(tuple(entry.shape)).numel * itemsize(entry.dtype)
    return tuple(found.values())


def _rows(data: bytes, generation: int, where: str) -> tuple[Row, ...]:
    content = typed_json.loads(data, where=where)
    try:
        return tuple(
            Row(int(r["step"]), generation, finite_or_not(r.get("epoch")), float(r["time"]), dict(r["metrics"]))
            for r in content
        )
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise CorruptCheckpoint(f"{where}: not metrics as a job writes them: {cause!r}") from cause


def _on_line(rows: Sequence[Row], generations: Sequence[Generation]) -> tuple[Row, ...]:
    """Return the rows that count: a row belongs to the lineage where a commit of its step and generation would."""
    line = set(lineage({Committed(row.step, row.generation, "") for row in rows}, generations))
    return tuple(row for row in rows if Committed(row.step, row.generation, "") in line)


def _beats(entries: Iterable[Entry]) -> dict[int, float]:
    found = {}
    for entry in entries:
        number = names.parse_generation_file(f"{entry.name.removesuffix('.alive')}.json")
        if number is not None and entry.name.endswith(".alive"):
            found[number] = entry.modified
    return found


def _storage(
    entries: Iterable[Entry], saves: Sequence[Save], attempts: Sequence[Uncommitted]
) -> tuple[tuple[str, int, int], ...]:
    """Return bytes and files by what they are for."""
    kept = {path for save in saves if not save.stray for path, _ in save.shards}
    strays = {path for save in saves if save.stray for path, _ in save.shards} - kept
    leftovers = {attempt.folder for attempt in attempts}
    found: dict[str, list[int]] = {}
    for entry in entries:
        folder, _, leaf = entry.name.rpartition("/")
        if entry.name in kept:
            what = "checkpoints"
        elif entry.name in strays:
            what = "strays (never resumed from)"
        elif folder in leftovers:
            what = "attempts that were not committed"
        elif folder.endswith(f"/{names.EVALUATIONS}"):
            what = "evaluations"
        elif folder == "metrics":
            what = "metrics"
        elif (
            names.parse_manifest_name(leaf) is not None
            or folder == "generations"
            or leaf in (names.ROOT_FILE, names.PINNED)
        ):
            what = "manifests and records"
        else:
            what = "other files"
        total = found.setdefault(what, [0, 0])
        total[0] += entry.size
        total[1] += 1
    return tuple((what, nbytes, files) for what, (nbytes, files) in sorted(found.items(), key=lambda item: -item[1][0]))


def _metric(saves: Sequence[Save]) -> tuple[str, str]:
    """Return (metric, mode) that the run itself calls best by, as its newest readable manifest says."""
    for save in sorted(saves, key=lambda save: (save.generation, save.step), reverse=True):
        settings = save.provenance.get("settings")
        if save.problem is None and isinstance(settings, Mapping):
            name, mode = settings.get("metric_name"), settings.get("metric_mode")
            if isinstance(name, str) and mode in ("min", "max"):
                return name, mode
    return "loss", "min"
