"""What a run's folder holds, read once: job starts, saves, metrics, leftovers, sizes. Nothing is written, no tensor is read."""

from __future__ import annotations

import logging
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final

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
from distckpt.format.uncommitted import Uncommitted, uncommitted
from distckpt.format.verify import quick_check
from distckpt.manager import ranking
from distckpt.storage.base import Entry, Store

log = logging.getLogger("distckpt")
GROUPS: Final = ("model", "optimizer", "other")
"""What a checkpoint's bytes are counted as."""
_UNREADABLE: Final = (CorruptCheckpoint, UnsupportedVersion, StoreError)


@dataclass(frozen=True, slots=True)
class Row:
    """Metrics of one step as the job logged them, with the second (since the epoch) at which it did."""

    step: int
    generation: int
    epoch: float | None
    time: float
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Save:
    """One commit. ``problem``: why it cannot be used; what a manifest says is empty where that is unreadable.

    ``digest``: of the manifest's file. ``committed_at``: when the manifest appeared, by the store's clock. ``groups``: bytes
    of tensors by ``GROUPS``; ``nbytes``: of its files.
    """

    committed: Committed
    stray: bool
    committed_at: float
    digest: str = ""
    epoch: float | None = None
    time: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)
    save_id: str = ""
    engine: str = ""
    world_size: int = 0
    nbytes: int = 0
    groups: tuple[int, ...] = ()
    shards: tuple[tuple[str, int], ...] = ()
    pinned: bool = False
    problem: str | None = None

    @property
    def step(self) -> int:
        """The training step."""
        return self.committed.step

    @property
    def generation(self) -> int:
        """The job start that wrote it."""
        return self.committed.generation


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a root says about a run. ``saves`` and ``rows`` are in the order of steps.

    ``line``: rows of the lineage, those of jobs whose steps were done again later left out. ``beats``: generation to the
    second of its last heartbeat, of jobs that never said that they ended. ``storage``: (what, bytes, files).
    """

    root: str
    store: Store
    run_id: str
    created: str
    generations: tuple[Generation, ...]
    saves: tuple[Save, ...]
    rows: tuple[Row, ...]
    line: tuple[Row, ...]
    attempts: tuple[Uncommitted, ...]
    beats: Mapping[int, float]
    storage: tuple[tuple[str, int, int], ...]
    metric: tuple[str, str]
    problems: tuple[str, ...]

    @property
    def kept(self) -> list[Save]:
        """The commits that count and are whole, as far as was looked, earliest first."""
        return [save for save in self.saves if not save.stray and save.problem is None]

    @property
    def best(self) -> Save | None:
        """The best of those by the run's own metric."""
        return ranking.best(self.kept, *self.metric)

    @property
    def newest(self) -> Save | None:
        """What a job would go on from."""
        line = lineage([save.committed for save in self.kept], self.generations)
        return next((save for save in self.kept if line and save.committed == line[0]), None)


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
        lost = sorted(set(records) - {g.number for g in generations})
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
        attempts = uncommitted(store)
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
                self._rows[name] = _rows(typed_json.loads(self.store.read(name)), parsed[0], f"{self.store.url}/{name}")
            except _UNREADABLE as error:
                problems.append(f"metrics are lost: {error}")
        every = [row for name in sorted(self._rows) for row in self._rows[name]]
        return tuple(sorted(every, key=lambda row: row.step)), problems


# ---------------------------------------------------------------- parts


def finite_or_not(value: object) -> float | None:
    """Return a metric's value as a float, also NaN and infinite ones; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if str(value)[:1] != "-" else -math.inf


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


def _rows(content: Any, generation: int, where: str) -> tuple[Row, ...]:
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
