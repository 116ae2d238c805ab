"""From live state to a committed checkpoint: collect, plan and stage on the training thread, the rest as a job."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from distckpt import clock
from distckpt.clock import Deadline
from distckpt.config import CheckpointConfig
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.full import GatheredSource, gather_tensors
from distckpt.dcp.incremental import Chain
from distckpt.dcp.leaves import State
from distckpt.dcp.planner import pieces_for
from distckpt.dcp.replicas import host_bytes, replica_digests
from distckpt.dcp.saving import (
    AgreedPlan,
    SaveRequest,
    agree_plan,
    encode_objects,
    save_error,
    table_of,
    write_and_commit,
)
from distckpt.dcp.writer import Source
from distckpt.engines.base import Engine
from distckpt.errors import AgreementError, CommitInDoubt, LayoutChanged, SaveFailed, StaleGeneration
from distckpt.format.dtypes import itemsize
from distckpt.manager.components import Components
from distckpt.manager.staging import StagingArena
from distckpt.storage.base import Store

log = logging.getLogger("distckpt")

Job = Callable[[], str]
"""The rest of a save; returns the manifest's name on the store. Runs on the saving thread, or at once."""


class SavePipeline:
    """Prepares saves one after another; keeps the plan and the staging memory from one to the next.

    ``budget`` bounds the save in hand, besides ``timeout_s``: the time left before the job is stopped.
    """

    def __init__(
        self, config: CheckpointConfig, agreement: Agreement, store: Store, engine: Engine, components: Components
    ) -> None:
        self.config = config
        self.agreement = agreement
        self.store = store
        self.engine = engine
        self.components = components
        self.budget: Deadline | None = None
        self.arena = StagingArena()
        self.chain = Chain(store, agreement.rank) if config.incremental else None
        self._saving = agreement.clone()  # the saving thread's own line to the other ranks
        self._plan: AgreedPlan | None = None

    def prepare(self, request: SaveRequest, extra_state: Any) -> Job:
        """Collect, plan and stage; ``request`` lacks only what is collected here, and its id is fresh.

        When this returns, the live state may change (except in a full save, whose job runs at once).
        """
        key, full = request.save_id, self.config.mode == "full"
        try:
            with self.agreement.guard(f"{key}/plan"):
                state = self.engine.state(optimizer=self.config.save_optimizer)
                self.components.add_to(state, extra_state)
                objects = encode_objects(state)
            first, self._plan = self._plan, None
            agreed = agree_plan(
                self.agreement, key, table_of(state), first, step=request.step, timeout_s=self._left_s(), full=full
            )
            with self.agreement.guard(f"{key}/begin"):
                replicas = replica_digests(state, agreed.held, self.agreement.rank) if agreed is not first else None
                source = None if full else self._stage(agreed, state)
        except AgreementError as error:
            raise save_error(request.step, error) from error
        self._plan = agreed
        filled = replace(
            request,
            engine=self.engine.name,
            software=_software(),
            objects=objects,
            replicas=replicas,
            trained=self.engine.trained(),
        )
        if source is None:
            return lambda: self._write_full(agreed, filled, state)
        return lambda: self._write(agreed, filled, source, self._saving)

    def close(self) -> None:
        """Give memory and connection back."""
        self.arena.release()
        self._saving.close()

    def _stage(self, agreed: AgreedPlan, state: State) -> Source:
        """Copy for a background save, or where bytes are not in host memory in order; else use them in place."""
        views = [state.tensors[piece.fqn].view(piece.box) for piece in agreed.pieces]
        if self.config.async_save or any(v.device.type != "cpu" for v in views):
            return self.arena.stage(agreed.pieces, views)
        return [host_bytes(view) for view in views].__getitem__

    def _write_full(self, agreed: AgreedPlan, request: SaveRequest, state: State) -> str:
        """Write on rank 0 while it gathers and the others send; always on the training thread, never retried."""
        pieces = sorted(pieces_for(agreed.written, 0), key=lambda p: -itemsize(p.dtype))  # the shard's own order
        order = [p.fqn for p in pieces if p.box.numel]
        tensors = gather_tensors(state, agreed.held, self.agreement.rank, order)
        source = GatheredSource(tensors, [p.fqn for p in agreed.pieces])
        before = (lambda: None) if self.agreement.is_leader else source.drain
        try:
            return self._write(agreed, request, source, self.agreement, before_write=before, threads=1, retries=0)
        finally:
            source.drain()

    def _write(
        self,
        agreed: AgreedPlan,
        request: SaveRequest,
        source: Source,
        agreement: Agreement,
        *,
        before_write: Callable[[], None] = lambda: None,
        threads: int | None = None,
        retries: int | None = None,
    ) -> str:
        """Write and commit, again from the same copy where that can help."""
        started = clock.monotonic()
        retries = self.config.retries if retries is None else retries
        attempt = 0
        while True:
            tried = request if attempt == 0 else replace(request, save_id=f"{request.save_id}.retry{attempt}")
            try:
                path = write_and_commit(
                    agreement,
                    self.store,
                    agreed,
                    tried,
                    source,
                    threads=threads or self.config.threads,
                    timeout_s=self._left_s(),
                    before_write=before_write,
                    block=self.config.block_bytes,
                    chain=self.chain,
                )
            except SaveFailed as error:
                final = isinstance(error, (StaleGeneration, LayoutChanged, CommitInDoubt))
                if attempt == retries or final or (self.budget is not None and self.budget.passed):
                    self._plan = None
                    raise
                log.warning("step %d: %s; trying again", request.step, error)
                attempt += 1
                continue
            log.info("step %d committed in %.2f s", request.step, clock.monotonic() - started)
            return path

    def _left_s(self) -> float:
        """Seconds that an attempt to save may take from now on."""
        if self.budget is None:
            return self.config.timeout_s
        return min(self.config.timeout_s, max(1.0, self.budget.left_s))


def _software() -> dict[str, str]:
    from distckpt import __version__

    return {"distckpt": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
