"""A job's place in the lineage of its root: its generation, what it goes on from, its heartbeat, what follows a commit."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import Any

from distckpt.config import CheckpointConfig
from distckpt.dcp.agreement import Agreement
from distckpt.errors import AgreementError, ConfigError
from distckpt.format import names
from distckpt.format.lineage import Committed, create_generation, ensure_root, heartbeat, stop_heartbeat
from distckpt.manager.root import RunRoot

log = logging.getLogger("distckpt")

HEARTBEAT_S = 60.0
"""How often a job says that it is alive; ``distckpt doctor`` and ``gc`` take ten missed ones for its end."""


class JobLine:
    """One job start's line. ``resumed_from`` is (generation, step); ``fresh``: start over where checkpoints exist."""

    def __init__(self, config: CheckpointConfig, root: RunRoot, agreement: Agreement) -> None:
        self.config = config
        self.root = root
        self.agreement = agreement
        self.generation: int | None = None
        self.resumed_from: tuple[int, int] | None = None
        self.fresh = config.start_fresh
        self._weights: tuple[int, str] | None = None
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def ensure(self, key: str) -> None:
        """Take this job's generation, once, on all ranks; refuses to start over silently where checkpoints exist."""
        if self.generation is not None:
            return
        try:
            self.generation = int(self.agreement.round(key, b"", self._create))
        except AgreementError as error:
            if any(failure.kind == ConfigError.__name__ for failure in error.failures):
                raise ConfigError("; ".join(failure.message for failure in error.failures)) from error
            raise
        self._start_beating(self.generation)

    def go_on_from(self, generation: int, step: int) -> None:
        """Continue from a checkpoint; a job that has a generation already takes a new one with its next save."""
        self.close()
        self.generation, self.fresh = None, False
        self.resumed_from = (generation, step)
        if self.agreement.is_leader:
            path = f"{names.step_folder(step)}/{names.manifest_name(generation)}"
            self._weights = self.root.weights(Committed(step, generation, path))

    def committed(self, committed: Committed) -> None:
        """Do what follows a commit (leader): warn about weights that stand still, tidy the root."""
        last, self._weights = self._weights, self.root.weights(committed)
        if last is not None and self._weights is not None and last[0] != committed.step and last[1] == self._weights[1]:
            log.warning(
                "step %d: all trained weights are identical to those of step %d: was the optimizer stepped, do gradients "
                "reach the weights, is the learning rate above 0?",
                committed.step,
                last[0],
            )
        self.root.tidy(committed, committed.generation, self.resumed_from)

    def provenance(self) -> dict[str, Any]:
        """Return what a manifest says of where its state comes from."""
        origin = self.resumed_from
        source = None if origin is None else {"generation": origin[0], "step": origin[1]}
        return {"resumed_from": source, "settings": self.config.public(), **dict(self.config.extra)}

    def close(self) -> None:
        """Stop the heartbeat and take its file away: the job is over, or goes on as another generation."""
        self._stop.set()
        if self._beating is not None and self.generation is not None:
            self._beating.join(1.0)
            with contextlib.suppress(OSError):
                stop_heartbeat(self.root.store, self.generation)
        self._beating = None

    def _create(self, _: list[bytes]) -> bytes:
        store = self.root.store
        ensure_root(store)
        line = self.root.line()
        if line and self.resumed_from is None and not self.fresh:
            raise ConfigError(
                f"{store.url} holds checkpoints (newest: step {line[0].step}) and this job loaded none of them; call "
                "manager.resume() or load() first, set start_fresh=True to begin a new lineage, or use another folder"
            )
        record = create_generation(store, resumed_from=self.resumed_from, owner=f"pid {os.getpid()}")
        return str(record.number).encode()

    def _start_beating(self, generation: int) -> None:
        if not self.agreement.is_leader:
            return
        self._stop = threading.Event()
        self._beating = threading.Thread(
            target=self._beat, args=(generation, self._stop), name="distckpt-heartbeat", daemon=True
        )
        self._beating.start()

    def _beat(self, generation: int, stop: threading.Event) -> None:
        while True:
            with contextlib.suppress(OSError):  # a hint: a store that refuses it will refuse a save loudly enough
                heartbeat(self.root.store, generation)
            if stop.wait(HEARTBEAT_S):
                return
