"""The manager's view of its root on storage: which checkpoints count, their metrics, what may go, the metrics log."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from distckpt.config import CheckpointConfig
from distckpt.errors import CorruptCheckpoint, NotFound, StoreError, UnsupportedVersion
from distckpt.format import names, typed_json
from distckpt.format.lineage import (
    Committed,
    Generation,
    lineage,
    list_committed,
    read_generations,
    read_manifest,
)
from distckpt.format.manifest import Manifest
from distckpt.format.verify import quick_check
from distckpt.manager import gc
from distckpt.manager.keep_policy import KeepLast, Kept, plan_removal, protected
from distckpt.manager.ranking import best
from distckpt.storage.base import Store

log = logging.getLogger("distckpt")
MAX_METRICS_BYTES = 256 << 20


class RunRoot:
    """Reads and tidies one root. Any rank may read; only the leader calls what writes or removes."""

    def __init__(self, store: Store, config: CheckpointConfig) -> None:
        self.store = store
        self.config = config
        self._manifests: dict[str, Manifest] = {}
        self._minimum = 1 if config.keep_policy is None and config.save_total_limit == 1 else 2
        if self._minimum == 1:
            warnings.warn(
                "save_total_limit=1 keeps a single checkpoint: if it is damaged there is nothing to fall back to; 2 or more "
                "is safer",
                stacklevel=4,
            )

    def line(self) -> list[Committed]:
        """Return the commits that count, newest first (by name: not yet read)."""
        return lineage(list_committed(self.store), read_generations(self.store))

    def manifest(self, committed: Committed) -> Manifest:
        """Return a manifest, from memory if it was read before (manifests never change)."""
        found = self._manifests.get(committed.manifest_path)
        if found is None:
            found = self._manifests[committed.manifest_path] = read_manifest(self.store, committed)
        return found

    def readable(self) -> list[tuple[Committed, Manifest]]:
        """Return the commits that count and whose manifests are whole, newest first; others are warned about."""
        out = []
        for committed in self.line():
            try:
                out.append((committed, self.manifest(committed)))
            except (CorruptCheckpoint, UnsupportedVersion, StoreError) as error:
                log.warning("%s is not usable: %s", committed.manifest_path, error)
        return out

    def kept(self, readable: Sequence[tuple[Committed, Manifest]] | None = None) -> list[Kept]:
        """Return the commits as policies see them."""
        pairs = self.readable() if readable is None else readable
        return [Kept(c.step, c.generation, m.epoch, decode_metrics(m.metrics), self._is_pinned(c)) for c, m in pairs]

    def best(self) -> Committed | None:
        """Return the best commit by the configured metric and tie-breaks; None where none has the metric."""
        pairs = self.readable()
        chosen = best(self.kept(pairs), self.config.metric_name, self.config.metric_mode, tuple(self.config.tie_breaks))
        if chosen is None:
            return None
        return next(c for c, _ in pairs if (c.step, c.generation) == (chosen.step, chosen.generation))

    def find(self, step: int) -> Committed:
        """Return the commit of a step on this line; ``CheckpointNotFound`` lists what there is."""
        from distckpt.errors import CheckpointNotFound

        line = self.line()
        for committed in line:
            if committed.step == step:
                return committed
        raise CheckpointNotFound(
            f"{self.store.url} has no checkpoint of step {step}; there are {[c.step for c in line][:20]}"
        )

    def _is_pinned(self, committed: Committed) -> bool:
        try:
            self.store.size(f"{committed.folder}/{names.PINNED}")
        except NotFound:
            return False
        return True

    def pin(self, step: int, *, pinned: bool) -> None:
        """Make a step exempt from removal, or lift that."""
        path = f"{self.find(step).folder}/{names.PINNED}"
        if pinned:
            self.store.replace(path, b"")
        else:
            self.store.delete(path)

    def tidy(self, newest: Committed, generation: int, resumed_from: tuple[int, int] | None) -> gc.GcReport | None:
        """After a commit: check it, then remove what the keep policy lets go. Failures are logged, never fatal."""
        try:
            problems = quick_check(self.store, newest)
            if problems:
                log.error("nothing is removed: the new checkpoint does not check: %s", problems[0])
                return None
            return gc.collect(
                self.store,
                remove=self._removable(resumed_from),
                grace_s=self.config.orphan_grace_s,
                current_generation=generation,
                dry_run=False,
                minimum_kept=self._minimum,
            )
        except (CorruptCheckpoint, UnsupportedVersion, OSError) as error:
            log.warning("tidying %s failed and is tried again after the next save: %s", self.store.url, error)
            return None

    def _removable(self, resumed_from: tuple[int, int] | None) -> list[Committed]:
        policy = self.config.keep_policy
        if policy is None and self.config.save_total_limit is None:
            return []
        pairs = self.readable()
        kept = self.kept(pairs)
        keep = (policy or KeepLast(self.config.save_total_limit or 1))(kept)
        chosen = best(kept, self.config.metric_name, self.config.metric_mode, tuple(self.config.tie_breaks))
        safe = protected(kept, resumed_from=resumed_from, best=chosen, minimum=self._minimum)
        _, removed = plan_removal(kept, keep, safe)
        gone = {(k.step, k.generation) for k in removed}
        return [c for c, _ in pairs if (c.step, c.generation) in gone]

    def weights(self, committed: Committed) -> tuple[int, str] | None:
        """Return (step, fingerprint of all trained weights) of a commit; None where it has none or cannot be read."""
        try:
            provenance = typed_json.decode(self.manifest(committed).provenance)
        except (CorruptCheckpoint, UnsupportedVersion, OSError) as error:
            log.debug("%s: no weights fingerprint: %s", committed.manifest_path, error)
            return None
        found = provenance.get("weights") if isinstance(provenance, dict) else None
        return (committed.step, found) if isinstance(found, str) else None

    def write_metrics(self, generation: int, serial: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store the metrics recorded since the last save; they outlive their checkpoints."""
        if rows:
            self.store.create(names.metrics_file(generation, serial), typed_json.dumps(list(rows)))

    def read_metrics(self, upto: tuple[int, int] | None = None) -> list[dict[str, Any]]:
        """Return the metrics of this line, oldest first: of each generation up to where the next one resumed.

        ``upto`` is (generation, step), the end of the line; None takes the newest generation whole.
        """
        limits = _limits(read_generations(self.store), upto)
        rows: list[dict[str, Any]] = []
        files = sorted(
            (parsed, entry.name)
            for entry in self.store.list("metrics")
            if (parsed := names.parse_metrics_file(entry.name)) is not None and parsed[0] in limits
        )
        for (generation, _), name in files:
            limit = limits[generation]
            try:
                found = typed_json.loads(self.store.read(name))
            except (CorruptCheckpoint, StoreError) as error:
                log.warning("%s: metrics are lost: %s", name, error)
                continue
            rows += [row for row in found if limit is None or row["step"] <= limit]
        return rows

    def take_request(self) -> bool:
        """Whether somebody created the control file; takes it away."""
        name = self.config.control_file
        if name is None:
            return False
        try:
            self.store.size(name)
            self.store.delete(name)
        except OSError:
            return False
        return True


def plain_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return metrics as plain numbers: tensors and NumPy scalars of one element become Python's.

    Raises ``UnserializableState`` for a value that could not be stored, here rather than at the next save.
    """
    plain = {}
    for name, value in (metrics or {}).items():
        one = callable(getattr(value, "item", None)) and getattr(value, "size", None) is not None and _count(value) == 1
        plain[name] = value.item() if one else value
        typed_json.encode(plain[name], where=f"$.metrics.{name}")
    return plain


def _count(value: Any) -> int:
    return int(value.numel() if callable(getattr(value, "numel", None)) else value.size)


def decode_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest's metrics as numbers."""
    return {name: typed_json.decode(value) for name, value in metrics.items()}


def _limits(generations: Sequence[Generation], upto: tuple[int, int] | None) -> dict[int, int | None]:
    """Return generation to the last step that counts (None: all), walking resumed-from links back."""
    records = {g.number: g for g in generations}
    limits: dict[int, int | None] = {}
    number, limit = upto if upto is not None else (max(records, default=0), None)
    while number and number not in limits:
        limits[number] = limit
        record = records.get(number)
        if record is None or record.resumed_from is None:
            break
        number, limit = record.resumed_from
    return limits
