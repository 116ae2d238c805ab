"""From live state to a committed checkpoint: collect, plan and stage on the training thread, the rest as a job."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from distckpt import clock
from distckpt.clock import Deadline
from distckpt.config import CheckpointConfig
from distckpt.dcp.agreed import AgreedPlan, agree_plan
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.buffers import HostBytes
from distckpt.dcp.full import GatheredSource, gather_tensors
from distckpt.dcp.incremental import Chain
from distckpt.dcp.leaves import State
from distckpt.dcp.planner import pieces_for
from distckpt.dcp.replicas import tensor_claims
from distckpt.dcp.saving import SaveRequest, encode_objects, save_error, table_of, write_and_commit
from distckpt.dcp.tables import Table
from distckpt.dcp.writer import Source
from distckpt.engines.base import Engine, StepBound
from distckpt.errors import (
    AgreementError,
    CommitInDoubt,
    LayoutChanged,
    SaveFailed,
    SnapshotFailed,
    StaleGeneration,
)
from distckpt.format.dtypes import itemsize
from distckpt.format.manifest import Manifest
from distckpt.manager.components import Components
from distckpt.manager.staging import StagingArena
from distckpt.manager.state_copy import StateCopy
from distckpt.storage.base import Store

log = logging.getLogger("distckpt")

PAUSE = 1.0
"""A lazy copy rests as long as it works, unless training waits for it."""
FINAL = (StaleGeneration, LayoutChanged, SnapshotFailed, CommitInDoubt)
"""Failures that writing the same copy again cannot help."""

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
        self._chain = Chain(store, agreement.rank) if config.incremental else None
        self._resumed: Manifest | None = None  # of the checkpoint that was loaded last, until the next save
        self._saving = agreement.clone()  # the saving thread's own line to the other ranks
        self._plan: AgreedPlan | None = None
        self._copy: StateCopy | None = None
        self._restless: set[str] = set()  # found changed in the middle of a lazy copy: from then on copied at once

    def go_on_from(self, manifest: Manifest | None) -> None:
        """Take the manifest of what was loaded: the next save may use its plan and refer to its blocks."""
        self._resumed = manifest
        if self._chain is not None and manifest is not None:
            self._chain.go_on_from(manifest)

    def prepare(self, request: SaveRequest, extra_state: Any, *, background: bool) -> Job:
        """Collect, plan and stage; ``request`` lacks only what is collected here, and its id is fresh.

        When this returns, the live state may change, except in a full save, whose job runs at once, and for what a lazy
        save (``lazy_staging``, in the background) leaves for its job to copy: ``settle`` waits for that.
        """
        key, full = request.save_id, self.config.mode == "full"
        lazy = background and self.config.lazy_staging
        first, self._plan = self._plan, None
        begun: StateCopy | None = None
        try:
            with self.agreement.guard(f"{key}/plan"):
                state = self.engine.state(optimizer=self.config.save_optimizer)
                self.components.add_to(state, extra_state)
                objects, table = encode_objects(state), table_of(state)
                if first is not None and first.table == table.digest and not (full or lazy):
                    begun = self._start(first, state)
            agreed = self._agree(request, table, first)
            with self.agreement.guard(f"{key}/begin"):
                if begun is not None and agreed is not first:
                    begun.stop()
                    begun = None
                replicas = tensor_claims(state, agreed.held, self.agreement.rank) if agreed is not first else {}
                copy = self._begin(agreed, state) if lazy else None
                source = None if full or lazy else self._stage(agreed, state, begun)
        except BaseException as error:
            if begun is not None:
                begun.stop()
            if isinstance(error, AgreementError):
                raise save_error(request.step, error) from error
            raise
        self._plan = agreed
        filled = replace(
            request,
            engine=self.engine.name,
            software=_software(),
            objects=objects,
            replicas=replicas,
            trained=self.engine.trained(),
        )
        if copy is not None:
            self._copy = copy
            return lambda: self._copy_and_write(agreed, filled, copy)
        if source is None:
            return lambda: self._write_full(agreed, filled, state)
        threads = self._background_threads if background else self.config.threads
        return lambda: self._write(agreed, filled, source, self._saving, threads=threads)

    def settle(self) -> None:
        """Return when the live state may be changed; ``SnapshotFailed`` if the save under way has lost it."""
        copy = self._copy
        if copy is not None:
            try:
                copy.settle(self.config.timeout_s)
            finally:
                self.forget()

    def hurry(self) -> None:
        """Have a lazy copy under way take no more rests: somebody waits for the save."""
        copy = self._copy
        if copy is not None:
            copy.hurry()

    def forget(self) -> None:
        """Let go of the last lazy copy, and so of the tensors that it was made from: it is over, and was told of."""
        self._copy = None

    def close(self) -> None:
        """Give memory and connection back."""
        self.arena.release()
        self._saving.close()

    def _start(self, plan: AgreedPlan, state: State) -> StateCopy | None:
        """Begin to stage by the plan of the save before while the ranks find out whether it still is everyone's."""
        views = _views(plan, state)
        return self.arena.start(plan.placed, views) if self._stages(views) else None

    def _agree(self, request: SaveRequest, table: Table, first: AgreedPlan | None) -> AgreedPlan:
        resumed, self._resumed = self._resumed, None
        return agree_plan(
            self.agreement,
            request.save_id,
            table,
            first,
            step=request.step,
            timeout_s=self._left_s(),
            full=self.config.mode == "full",
            resumed=resumed,
        )

    def _stages(self, views: Sequence[torch.Tensor]) -> bool:
        """Whether to copy: for a background save, or where bytes are not in host memory in order; else they are used in place."""
        return self.config.async_save or not all(view.is_cpu for view in views)

    def _stage(self, agreed: AgreedPlan, state: State, begun: StateCopy | None) -> Source:
        if begun is not None:
            return self.arena.complete(begun)
        views = _views(agreed, state)
        return self.arena.stage(agreed.placed, views) if self._stages(views) else HostBytes(views)

    def _begin(self, agreed: AgreedPlan, state: State) -> StateCopy:
        """Copy what forward and backward passes may change; return what is left to copy before the next step."""
        assert isinstance(self.engine, StepBound)
        settled = (self.engine.settled(state) | self.components.settled(state)) - self._restless
        return self.arena.begin(agreed.placed, _views(agreed, state), settled)

    def _copy_and_write(self, agreed: AgreedPlan, request: SaveRequest, copy: StateCopy) -> str:
        """Copy while training goes on, then write; a copy that went wrong fails the save on all ranks."""
        try:
            copy.complete(PAUSE, self.config.timeout_s)
            check, threads = copy.check, self._background_threads
            return self._write(
                agreed, request, copy.staged, self._saving, threads=threads, before_write=check, check=check
            )
        finally:
            self._restless.update(copy.changed)
            if not copy.failed:  # a failed one is the fence's to tell of
                self.forget()

    @property
    def _background_threads(self) -> int:
        return min(self.config.threads, self.config.background_threads)

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
        threads: int,
        before_write: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
        retries: int | None = None,
    ) -> str:
        """Write and commit, again from the same copy where that can help; ``check`` raises if the copy is no good."""
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
                    threads=threads,
                    timeout_s=self._left_s(),
                    before_write=before_write,
                    before_receipt=check,
                    block=self.config.block_bytes,
                    chain=self._chain,
                )
            except SaveFailed as error:
                if attempt == retries or isinstance(error, FINAL) or (self.budget is not None and self.budget.passed):
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


def _views(agreed: AgreedPlan, state: State) -> list[torch.Tensor]:
    return [state.tensors[piece.fqn].view(piece.box) for piece in agreed.pieces]


def _software() -> dict[str, str]:
    from distckpt import __version__

    return {"distckpt": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
