"""Choosing what to load, together: newest valid first with fallbacks, or exactly what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import msgspec

from distckpt.clock import Deadline
from distckpt.config import CheckpointConfig
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.reader import CheckpointReader
from distckpt.dcp.warming import Warming, files_of
from distckpt.engines.base import OPTIM_GROUPS, Engine, has_no_optimizer
from distckpt.engines.step_hook import pass_fences
from distckpt.errors import (
    AgreementError,
    CheckpointNotFound,
    CorruptCheckpoint,
    DistckptError,
    IncompatibleState,
    UnsupportedVersion,
)
from distckpt.format.catalog import find_checkpoint
from distckpt.format.lineage import Committed, lineage, list_committed, read_generations, read_manifest_bytes
from distckpt.format.manifest import Manifest, reread_manifest
from distckpt.heap import no_collections
from distckpt.manager.components import Components
from distckpt.manager.display import progress_bar, show_resume
from distckpt.manager.exchange import Opening, read_small
from distckpt.manager.reading import Restore
from distckpt.manager.report import LoadOptions, LoadReport
from distckpt.manager.restore import restore
from distckpt.manager.root import RunRoot
from distckpt.storage import open_store
from distckpt.storage.base import Store

log = logging.getLogger("distckpt")


class Loader:
    """Loads checkpoints on all ranks. The leader reads names and manifests; every rank reads its own tensors."""

    def __init__(
        self,
        config: CheckpointConfig,
        agreement: Agreement,
        store: Store,
        root: RunRoot,
        engine: Engine,
        components: Components,
    ) -> None:
        self.config = config
        self.agreement = agreement
        self.store = store
        self.root = root
        self.engine = engine
        self.components = components
        self.loaded: Manifest | None = None
        """Manifest of what was loaded last."""

    @no_collections()
    def newest(self, key: str, options: LoadOptions) -> LoadReport | None:
        """Load the newest checkpoint of the lineage that every rank can load; None where there is none at all."""
        names = self._ask(
            f"{key}/line",
            lambda: msgspec.json.encode([[c.step, c.generation, c.manifest_path] for c in self.root.line()]),
        )
        line = [Committed(*c) for c in msgspec.json.decode(names)]
        fallbacks: list[str] = []
        for number, committed in enumerate(line):
            try:
                report = self._load(
                    self.store, committed, f"{key}/{number}", options, self._path(self.store, committed)
                )
            except CorruptCheckpoint as error:
                log.warning("falling back to an older checkpoint: %s", error)
                fallbacks.append(str(error))
                continue
            report.fallbacks = fallbacks
            show_resume(report, self.config.verbose and self.agreement.is_leader)
            return report
        if line:
            reasons = "\n  ".join(fallbacks)
            raise CheckpointNotFound(
                f"{self.store.url} has {len(line)} checkpoints and none can be loaded; nothing was started over. Repair or move "
                f"them, or begin a new lineage with resume(fresh=True). Reasons:\n  {reasons}"
            )
        return None

    @no_collections()
    def chosen(self, which: str | int, key: str, options: LoadOptions) -> tuple[LoadReport, bool]:
        """Load what was asked for; returns the report and whether it lies in this manager's own root."""

        def choose() -> bytes:
            url, committed = self._find(which)
            return msgspec.json.encode([url, committed.step, committed.generation, committed.manifest_path])

        url, *parts = msgspec.json.decode(self._ask(f"{key}/which", choose))
        inside = url == self.store.url
        store = self.store if inside else open_store(url)
        committed = Committed(*parts)
        return self._load(store, committed, key, options, self._path(store, committed)), inside

    def _find(self, which: str | int) -> tuple[str, Committed]:
        if isinstance(which, int):
            return self.store.url, self.root.find(which)
        if which == "best":
            best = self.root.best()
            if best is None:
                raise CheckpointNotFound(
                    f"{self.store.url}: no checkpoint has metric {self.config.metric_name!r}; set metric_name, or load by step"
                )
            return self.store.url, best
        if which == "latest":
            line = lineage(list_committed(self.store), read_generations(self.store))
            if not line:
                raise CheckpointNotFound(f"{self.store.url} holds no committed checkpoint")
            return self.store.url, line[0]
        found = find_checkpoint(which, strict=True)
        return found.store.url, found.committed

    def _load(self, store: Store, committed: Committed, key: str, options: LoadOptions, path: str) -> LoadReport:
        def read() -> bytes:
            try:
                data, found = read_manifest_bytes(store, committed)
            except CorruptCheckpoint as error:
                return b"-" + str(error).encode()
            readers.append(CheckpointReader(store, found, committed.folder))
            small = read_small(readers[0]) if self.agreement.world_size > 1 else {}
            return b"+" + msgspec.msgpack.encode(Opening.of(data, found, small))

        readers: list[CheckpointReader] = []  # the leader's

        answer = self._ask(f"{key}/manifest", read)
        if answer[:1] == b"-":
            raise CorruptCheckpoint(answer[1:].decode())
        opening = msgspec.msgpack.decode(memoryview(answer)[1:], type=Opening)
        manifest = reread_manifest(opening.manifest, where=f"{path}/{committed.manifest_path.rpartition('/')[2]}")
        reader = readers[0] if readers else CheckpointReader(store, manifest, committed.folder)
        bar: AbstractContextManager[Callable[[int], None]] = progress_bar(
            f"loading step {committed.step}",
            manifest.nbytes // self.agreement.world_size,
            enabled=self.config.verbose and self.agreement.is_leader,
        )
        pass_fences()  # another manager of this process may be copying the same tensors
        with self._warming(store, committed, manifest, options) as warming, bar as progress:
            small = opening.small(manifest)
            load = Restore(reader, self.engine, self.components, self.config, options, path, progress, small, warming)
            report = restore(self.agreement, key, load)
        self.loaded = manifest
        return report

    def _warming(self, store: Store, committed: Committed, manifest: Manifest, options: LoadOptions) -> Warming:
        """Begin to fetch what this rank will want, if it wants everything."""
        agreement = self.agreement
        without = has_no_optimizer(self.engine) and OPTIM_GROUPS in manifest.objects
        if without or not options.everything:
            return Warming(store, [])
        return Warming(store, files_of(manifest, committed.folder, agreement.rank, agreement.world_size))

    def _ask(self, key: str, answer: Callable[[], bytes]) -> bytes:
        """Return the leader's answer on every rank; its errors are raised on all in their own kind."""
        try:
            return self.agreement.round(key, b"", lambda _: answer(), deadline=Deadline.after(self.config.timeout_s))
        except AgreementError as error:
            kinds: tuple[type[DistckptError], ...] = (
                CheckpointNotFound,
                CorruptCheckpoint,
                IncompatibleState,
                UnsupportedVersion,
            )
            names = {f.kind for f in error.failures}
            for kind in kinds:
                if kind.__name__ in names:
                    raise kind("; ".join(f.message for f in error.failures)) from error
            raise

    def _path(self, store: Store, committed: Committed) -> str:
        return f"{store.url.removeprefix('file://').rstrip('/')}/{committed.folder}"
