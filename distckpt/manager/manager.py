"""CheckpointManager: one object per job that owns its checkpoints, on every rank."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from distckpt import clock
from distckpt.clock import Deadline
from distckpt.config import CheckpointConfig
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.full import GatheredSource, gather_tensors
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
from distckpt.engines.choose import engine_for
from distckpt.errors import (
    AgreementError,
    CommitInDoubt,
    ConfigError,
    LayoutChanged,
    SaveFailed,
    StaleGeneration,
)
from distckpt.format import names
from distckpt.format.dtypes import itemsize
from distckpt.format.lineage import Committed, create_generation, ensure_root, heartbeat
from distckpt.manager.components import Components
from distckpt.manager.history import MetricsHistory
from distckpt.manager.loading import Loader
from distckpt.manager.preempt import Preempted
from distckpt.manager.report import LoadOptions, LoadReport
from distckpt.manager.root import RunRoot, plain_metrics
from distckpt.manager.saver import BackgroundSaver
from distckpt.manager.schedule import Schedule
from distckpt.manager.staging import StagingArena
from distckpt.storage import open_store

log = logging.getLogger("distckpt")
_SERIALS = itertools.count(1)
"""Numbers this process's managers, so that two in a row never share agreement keys (all ranks make them in one order)."""


class CheckpointManager:
    """Saves and restores a training job's whole state. Every rank makes one and calls the same methods together.

    ``model``: any ``nn.Module``, after wrapping (DDP, FSDP, parallelize_module). ``optimizer``: one or several.
    ``scheduler``, ``scaler``: anything with ``state_dict``, one or several. ``stateful``: further named objects with
    ``state_dict`` and ``load_state_dict``. ``store``: a c10d store for agreement, if not the default group's.

    Example::

        with CheckpointManager(config, model=model, optimizer=optimizer) as manager:
            report = manager.resume()
            for step in range(report.step + 1 if report else 0, steps):
                loss = train(step)
                manager.step(step, metrics={"loss": loss})
    """

    def __init__(
        self,
        config: CheckpointConfig,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        *,
        stateful: Mapping[str, Any] | None = None,
        engine: Any = None,
        store: Any = None,
    ) -> None:
        self.config = config
        self.engine = engine_for(model, optimizer, engine)
        self.agreement = Agreement.from_environment(timeout_s=config.timeout_s, store=store)
        self._saving = self.agreement.clone()  # the saving thread's own line to the other ranks
        self.store = open_store(config.checkpoint_dir)
        self.components = Components(config, {**self.engine.parts, **(stateful or {})}, scheduler, scaler)
        self.root = RunRoot(self.store, config)
        self.schedule = Schedule(config, self.root, self.agreement)
        self.loader = Loader(config, self.agreement, self.store, self.root, self.engine, self.components)
        self.generation: int | None = None
        self.resumed_from: tuple[int, int] | None = None
        self.failures = 0
        self._serial = next(_SERIALS) if self.agreement.world_size > 1 else 0
        self._calls = 0
        self._saver, self._arena = BackgroundSaver(), StagingArena()
        self._submitted = False
        self._fresh = config.start_fresh
        self._budget: Deadline | None = None  # of the save before leaving, after a preemption notice
        self._plan: AgreedPlan | None = None
        self._saves = 0
        self.history = MetricsHistory()
        self._last_path: str | None = None
        self._weights: tuple[int, str] | None = None

    # ------------------------------------------------------------------ saving

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        *,
        epoch: float | None = None,
        model_config: Any = None,
        extra_state: Any = None,
    ) -> str | None:
        """Record metrics of a step, and save if the schedule, a threshold, a request or a preemption says so.

        Call it on every rank after each step. Returns the path of a save, else None. After a preemption notice it
        saves, waits for the commit, and raises ``Preempted``, which ends the process with exit code 85.
        """
        values = plain_metrics(metrics)
        self.history.record(step, values, epoch)
        reason = self.schedule.decide(step, epoch, values)
        if reason is None:
            return None
        preempted = self.schedule.preempted
        log.info("step %d: saving (%s)", step, reason)
        if not preempted:
            return self._save(epoch, step, values, model_config, extra_state)
        try:
            path = self._save(epoch, step, values, model_config, extra_state, urgent=True)
        except StaleGeneration:
            raise
        except (SaveFailed, AgreementError) as error:  # the time is over: leave all the same, older checkpoints are there
            log.error("preempted, and step %d could not be saved: %s", step, error)
            path = None
        raise Preempted(reason, step=step, path=path)

    def save(
        self,
        epoch: float | None = None,
        step: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        model_config: Any = None,
        extra_state: Any = None,
    ) -> str | None:
        """Save now, on all ranks; returns the checkpoint's path, or None if it was not saved.

        None: ``save_best_only`` and not better, or busy with ``on_busy="skip"``, or the save failed and the policy
        is to go on. With ``async_save`` the path is that of a checkpoint which exists once ``wait()`` returns. State
        that cannot be saved at all (``IncompatibleState``, ``UnserializableState``, ``ReplicasDiffer``), and more
        than ``max_consecutive_failures`` failed saves in a row, raise.
        """
        if step is None:
            raise ConfigError("save() needs step=: the number of optimizer steps taken so far")
        values = plain_metrics(metrics)
        self.history.record(step, values, epoch)
        return self._save(epoch, step, values, model_config, extra_state)

    def wait(self) -> None:
        """Return when no save is in flight; a failed background save raises here if too many failed in a row."""
        self._saver.join(self._patience_s())
        self._surface()

    def _patience_s(self) -> float:
        return self.config.timeout_s * (self.config.retries + 1) + 60

    def _left_s(self) -> float:
        """Seconds that an attempt to save may take from now on."""
        return self.config.timeout_s if self._budget is None else min(self.config.timeout_s, max(1.0, self._budget.left_s))

    def _save(
        self,
        epoch: float | None,
        step: int,
        metrics: dict[str, Any],
        model_config: Any,
        extra_state: Any,
        *,
        urgent: bool = False,
    ) -> str | None:
        """Save under the policies; an urgent save (the job is about to be stopped) waits, and asks no policy."""
        if not urgent and self._busy(step):
            return None
        self._budget = Deadline.after(self.schedule.budget_s) if urgent else None
        self._saver.join(self._patience_s() if self._budget is None else self._budget.left_s)
        self._surface()
        self._ensure_generation()
        if self._last_path is not None and self._last_path.endswith(names.step_folder(step)):
            log.info("step %d is saved already", step)
            return self._last_path
        path = f"{self._url()}/{names.step_folder(step)}"
        try:
            if self.config.save_best_only and not urgent and not self._is_best(step, metrics):
                return None
            self._saves += 1
            job = self._prepare(epoch, step, metrics, model_config, extra_state)
            if self.config.async_save and not urgent:
                self._saver.submit(job, str(step))
                self._submitted = True
            else:
                job()
                self.failures = 0
        except SaveFailed as error:
            self._failed(error)
            return None
        self.schedule.saved(step, metrics)
        self._last_path = path
        return path

    def _prepare(
        self, epoch: float | None, step: int, metrics: dict[str, Any], model_config: Any, extra_state: Any
    ) -> Callable[[], None]:
        """Collect, plan and stage on the training thread; return the rest of the save as a job."""
        key = self._key("save")
        full = self.config.mode == "full"
        try:
            with self.agreement.guard(f"{key}/plan"):
                state = self.engine.state(optimizer=self.config.save_optimizer)
                self.components.add_to(state, extra_state)
                objects = encode_objects(state)
            first, self._plan = self._plan, None
            agreed = agree_plan(
                self.agreement, key, table_of(state), first, step=step, timeout_s=self._left_s(), full=full
            )
            with self.agreement.guard(f"{key}/begin"):
                replicas = replica_digests(state, agreed.held, self.agreement.rank) if agreed is not first else None
                source = None if full else self._stage(agreed, state)
        except AgreementError as error:
            raise save_error(step, error) from error
        self._plan = agreed
        request = SaveRequest(
            save_id=key,
            step=step,
            generation=self.generation or 0,
            epoch=epoch,
            engine=self.engine.name,
            metrics=metrics,
            config=model_config,
            provenance=self._provenance(),
            software=_software(),
            objects=objects,
            replicas=replicas,
            trained=self.engine.trained(),
        )
        rows = self.history.take()
        if source is None:
            return lambda: self._write_full(agreed, request, state, rows)
        return lambda: self._write(agreed, request, source, rows, self._saving)

    def _stage(self, agreed: AgreedPlan, state: State) -> Source:
        """Copy for a background save, or where bytes are not in host memory in order; else use them in place."""
        views = [state.tensors[piece.fqn].view(piece.box) for piece in agreed.pieces]
        if self.config.async_save or any(v.device.type != "cpu" for v in views):
            return self._arena.stage(agreed.pieces, views)
        return [host_bytes(view) for view in views].__getitem__

    def _write_full(self, agreed: AgreedPlan, request: SaveRequest, state: State, rows: list[dict[str, Any]]) -> None:
        """A full save: rank 0 writes while it gathers, the others send; always on the training thread, never retried."""
        pieces = sorted(pieces_for(agreed.written, 0), key=lambda p: -itemsize(p.dtype))  # the shard's own order
        order = [p.fqn for p in pieces if p.box.numel]
        tensors = gather_tensors(state, agreed.held, self.agreement.rank, order)
        source = GatheredSource(tensors, [p.fqn for p in agreed.pieces])
        before = (lambda: None) if self.agreement.is_leader else source.drain
        try:
            self._write(agreed, request, source, rows, self.agreement, before_write=before, threads=1, retries=0)
        finally:
            source.drain()

    def _write(
        self,
        agreed: AgreedPlan,
        request: SaveRequest,
        source: Source,
        rows: list[dict[str, Any]],
        agreement: Agreement,
        *,
        before_write: Callable[[], None] = lambda: None,
        threads: int | None = None,
        retries: int | None = None,
    ) -> None:
        """Write, commit, retry; then what follows a commit. Runs on the saving thread."""
        started = clock.monotonic()
        if agreement.is_leader:
            self._log_metrics(request.generation, rows)  # before the commit: a crash after it must not lose them
        retries = self.config.retries if retries is None else retries
        for attempt in range(retries + 1):
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
                )
                break
            except SaveFailed as error:
                final = isinstance(error, (StaleGeneration, LayoutChanged, CommitInDoubt))
                if attempt == retries or final or (self._budget is not None and self._budget.passed):
                    self._plan = None
                    raise
                log.warning("step %d: %s; trying again", request.step, error)
        log.info("step %d committed in %.2f s", request.step, clock.monotonic() - started)
        if agreement.is_leader:
            committed = Committed(request.step, request.generation, path)
            self._compare_weights(committed)
            with contextlib.suppress(OSError):
                heartbeat(self.store, request.generation)
            self.root.tidy(committed, request.generation, self.resumed_from)

    def _surface(self) -> None:
        error, submitted, self._submitted = self._saver.take_error(), self._submitted, False
        if error is None:
            if submitted:
                self.failures = 0
            return
        self._last_path = None
        self.schedule.failed()
        if not isinstance(error, SaveFailed):
            raise error
        self._failed(error)

    def _failed(self, error: SaveFailed) -> None:
        """Count a failed save; raise if it cannot get better or too many failed in a row, else warn."""
        self.failures += 1
        if isinstance(error, StaleGeneration) or self.failures > self.config.max_consecutive_failures:
            raise error
        log.error(
            "save failed (%d in a row, %d are tolerated): %s",
            self.failures,
            self.config.max_consecutive_failures,
            error,
        )

    def _busy(self, step: int) -> bool:
        """Whether this save is dropped because another is in flight on any rank: all ranks must drop the same saves."""
        if self.config.on_busy == "wait" or not self.config.async_save or not self._saves:
            return False
        try:
            busy = self.agreement.round(self._key("busy"), b"1" if self._saver.busy else b"", lambda p: max(p))
        except AgreementError as error:
            raise save_error(step, error) from error
        if busy and self.config.on_busy == "raise":
            raise SaveFailed(f"step {step}: a save is in flight; wait() first, or set on_busy='wait'")
        if busy:
            log.warning("step %d: not saved, a save is in flight (on_busy='skip')", step)
        return bool(busy)

    def _is_best(self, step: int, metrics: dict[str, Any]) -> bool:
        try:
            return self.schedule.is_best(metrics, self._key("best"))
        except AgreementError as error:
            raise save_error(step, error) from error

    def _log_metrics(self, generation: int, rows: list[dict[str, Any]]) -> None:
        """Store the metrics since the last save; what cannot be stored now is tried again with the next save."""
        try:
            self.root.write_metrics(generation, self._saves, rows)
        except OSError as error:
            log.warning("metrics are not stored yet: %s", error)
            self.history.put_back(rows)

    def _compare_weights(self, committed: Committed) -> None:
        """Warn if every trained weight is what it was at the last save (or in what was resumed): is anything training?"""
        last, self._weights = self._weights, self.root.weights(committed)
        if last is not None and self._weights is not None and last[0] != committed.step and last[1] == self._weights[1]:
            log.warning(
                "step %d: all trained weights are identical to those of step %d: was the optimizer stepped, do gradients reach "
                "the weights, is the learning rate above 0?",
                committed.step,
                last[0],
            )

    def _ensure_generation(self) -> None:
        """Take this job's generation, once; refuses to start over silently where checkpoints exist."""
        if self.generation is not None:
            return

        def create(_: list[bytes]) -> bytes:
            ensure_root(self.store)
            line = self.root.line()
            if line and self.resumed_from is None and not self._fresh:
                raise ConfigError(
                    f"{self.store.url} holds checkpoints (newest: step {line[0].step}) and this job loaded none of them; call "
                    "manager.resume() or load() first, set start_fresh=True to begin a new lineage, or use another folder"
                )
            return str(
                create_generation(self.store, resumed_from=self.resumed_from, owner=f"pid {os.getpid()}").number
            ).encode()

        try:
            self.generation = int(self.agreement.round(self._key("generation"), b"", create))
        except AgreementError as error:
            if any(failure.kind == ConfigError.__name__ for failure in error.failures):
                raise ConfigError("; ".join(failure.message for failure in error.failures)) from error
            raise

    # ------------------------------------------------------------------ loading

    def resume(self, *, fresh: bool = False, **options: Any) -> LoadReport | None:
        """Load the newest checkpoint that all ranks can load, and continue its lineage.

        Returns None on a fresh start: an empty root, or ``fresh=True`` (or ``start_fresh`` in the config). If
        checkpoints exist and none can be loaded, raises ``CheckpointNotFound`` with every reason. Options: the
        fields of ``LoadOptions`` (``load_optimizer``, ``load_rng_state``, ``strict``, ``include``, ``exclude``,
        ``prove``).
        """
        self.wait()
        if fresh or self._fresh:
            self._fresh = True
            self._ensure_generation()
            return None
        report = self.loader.newest(self._key("resume"), self._options(options))
        self._continue(report)
        self._ensure_generation()
        return report

    def load(
        self, which: str | int = "latest", *, load_optimizer: bool = True, load_rng_state: bool = True, **options: Any
    ) -> LoadReport:
        """Load ``"latest"``, ``"best"``, a step, or a path or URL of a checkpoint; raises if it cannot be loaded.

        Unlike ``resume`` it never falls back to another checkpoint. What is loaded from the job's own root is also what
        it goes on from: its next save begins a new generation there, and what was saved after that step becomes stray.
        """
        self.wait()
        chosen = self._options({"load_optimizer": load_optimizer, "load_rng_state": load_rng_state, **options})
        report, inside = self.loader.chosen(which, self._key("load"), chosen)
        if inside:
            self._continue(report)
        return report

    def _continue(self, report: LoadReport | None) -> None:
        if report is None:
            return
        if self.generation is not None:  # going back: what follows is another line than what was saved after that step
            self._flush_metrics()
            self.generation = self._last_path = None
        self._fresh = False
        if self.agreement.is_leader:
            path = f"{names.step_folder(report.step)}/{names.manifest_name(report.generation)}"
            self._weights = self.root.weights(Committed(report.step, report.generation, path))
        self.resumed_from = (report.generation, report.step)
        self.history.continue_from(self.root.read_metrics(self.resumed_from))
        self.schedule.resumed(report.step, self.history.rows)

    def _options(self, options: Mapping[str, Any]) -> LoadOptions:
        return LoadOptions(**{"strict": self.config.strict, **options})

    # ------------------------------------------------------------------ looking

    def get_latest_checkpoint(self) -> str | None:
        """Return the path of the newest checkpoint of this lineage, or None."""
        line = self.root.readable()
        return f"{self._url()}/{line[0][0].folder}" if line else None

    def get_best_checkpoint(self) -> str | None:
        """Return the path of the best checkpoint by ``metric_name``, or None where none has that metric."""
        best = self.root.best()
        return f"{self._url()}/{best.folder}" if best is not None else None

    @property
    def metrics_history(self) -> dict[str, list[Any]]:
        """Every metric's values in order of steps, those from before a resume included."""
        return self.history.by_metric()

    @property
    def metrics_rows(self) -> list[dict[str, Any]]:
        """The same as rows: ``step``, ``epoch``, ``time``, ``metrics``."""
        return list(self.history.rows)

    def pin(self, step: int, *, pinned: bool = True) -> None:
        """Exempt a checkpoint from removal by policy (rank 0 does it)."""
        if self.agreement.is_leader:
            self.root.pin(step, pinned=pinned)

    # ------------------------------------------------------------------ the rest

    def close(self) -> None:
        """Wait for the save in flight, write what is left of the metrics, restore signal handlers."""
        try:
            self.wait()
        finally:
            self._flush_metrics()
            self.schedule.close()
            self._arena.release()
            self._saving.close()
            self.agreement.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Preempted):
            self.close()
            return
        try:
            self.close()
        except Exception as second:  # the first error is the one to show
            log.error("while leaving after %s: %s", type(error).__name__, second)

    def _flush_metrics(self) -> None:
        """Write what no save has written yet."""
        rows = self.history.take()
        if self.agreement.is_leader and self.generation is not None and rows:
            self._saves += 1
            self._log_metrics(self.generation, rows)

    def _key(self, what: str) -> str:
        """Return a fresh agreement key: ranks call in the same order, so their counters agree."""
        self._calls += 1
        return f"{self._serial}.g{self.generation or 0}/{self._calls}-{what}"

    def _url(self) -> str:
        return self.store.url.removeprefix("file://").rstrip("/")

    def _provenance(self) -> dict[str, Any]:
        source = (
            None if self.resumed_from is None else {"generation": self.resumed_from[0], "step": self.resumed_from[1]}
        )
        return {"resumed_from": source, "settings": self.config.public(), **dict(self.config.extra)}


def _software() -> dict[str, str]:
    from distckpt import __version__

    return {"distckpt": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
