"""CheckpointManager: one object per job that owns its checkpoints, on every rank."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from distckpt.clock import Deadline
from distckpt.config import CheckpointConfig
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.saving import SaveRequest, save_error
from distckpt.engines.choose import engine_for
from distckpt.errors import AgreementError, ConfigError, SaveFailed, StaleGeneration
from distckpt.format import names
from distckpt.format.lineage import Committed
from distckpt.heap import no_collections
from distckpt.manager.components import Components
from distckpt.manager.fence import StepFence
from distckpt.manager.history import MetricsHistory
from distckpt.manager.line import JobLine
from distckpt.manager.loading import Loader
from distckpt.manager.pipeline import Job, SavePipeline
from distckpt.manager.preempt import Preempted
from distckpt.manager.report import LoadOptions, LoadReport
from distckpt.manager.root import RunRoot, plain_metrics
from distckpt.manager.saver import BackgroundSaver
from distckpt.manager.schedule import Schedule
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
        self.store = open_store(config.checkpoint_dir)
        self.components = Components(config, {**self.engine.parts, **(stateful or {})}, scheduler, scaler)
        self.root = RunRoot(self.store, config)
        self.line = JobLine(config, self.root, self.agreement)
        self.schedule = Schedule(config, self.root, self.agreement)
        self.loader = Loader(config, self.agreement, self.store, self.root, self.engine, self.components)
        self.pipeline = SavePipeline(config, self.agreement, self.store, self.engine, self.components)
        self.history = MetricsHistory()
        self.failures = 0
        self._serial = next(_SERIALS) if self.agreement.world_size > 1 else 0
        self._calls = 0
        self._saver = BackgroundSaver(config.background_nice)
        self._fence = StepFence(
            config, self.engine, self.pipeline, lambda: self.failures < config.max_consecutive_failures
        )
        self._submitted = False
        self._saves = 0
        self._last_path: str | None = None

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
        except (
            SaveFailed,
            AgreementError,
        ) as error:  # the time is over: leave all the same, older checkpoints are there
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

    def fence(self) -> None:
        """Return when weights and optimizer state may be changed: call it before doing so other than by optimizer steps.

        With ``lazy_staging`` a save under way may still be copying them; without, there is nothing to wait for.
        """
        self._fence.pass_through()

    def _patience_s(self) -> float:
        return self.config.timeout_s * (self.config.retries + 1) + 60

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
        budget = self.pipeline.budget = Deadline.after(self.schedule.budget_s) if urgent else None
        self._saver.join(self._patience_s() if budget is None else budget.left_s)
        self._surface()
        self.line.ensure(self._key("generation"))
        if self._last_path is not None and self._last_path.endswith(names.step_folder(step)):
            log.info("step %d is saved already", step)
            return self._last_path
        path = f"{self._url()}/{names.step_folder(step)}"
        try:
            if self.config.save_best_only and not urgent and not self._is_best(step, metrics):
                return None
            self._saves += 1
            stored = {"epoch": epoch, "metrics": metrics, "config": model_config}
            with no_collections():  # until what was made for this save is let go of again
                if self.config.async_save and not urgent:
                    self._saver.submit(self._job(step, stored, extra_state, True), str(step), self.pipeline.hurry)
                    self._submitted = True
                else:
                    self._job(step, stored, extra_state, False)()
                    self.failures = 0
        except SaveFailed as error:
            self._failed(error)
            return None
        self.schedule.saved(step, metrics)
        self._last_path = path
        return path

    def _job(self, step: int, stored: dict[str, Any], extra_state: Any, background: bool) -> Callable[[], None]:
        """Prepare a save on the training thread; return the rest, with what goes before and after its commit."""
        generation = self.line.generation or 0
        request = SaveRequest(
            save_id=self._key("save"), step=step, generation=generation, provenance=self.line.provenance(), **stored
        )
        write: Job = self.pipeline.prepare(request, extra_state, background=background)
        rows = self.history.take()

        def job() -> None:
            if self.agreement.is_leader:
                self._log_metrics(generation, rows)  # before the commit: a crash after it must not lose them
            path = write()
            if self.agreement.is_leader:
                self.line.committed(Committed(step, generation, path))

        return job

    def _surface(self) -> None:
        error, submitted, self._submitted = self._saver.take_error(), self._submitted, False
        self.pipeline.forget()
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

    # ------------------------------------------------------------------ loading

    def resume(self, *, fresh: bool = False, **options: Any) -> LoadReport | None:
        """Load the newest checkpoint that all ranks can load, and continue its lineage.

        Returns None on a fresh start: an empty root, or ``fresh=True`` (or ``start_fresh`` in the config). If
        checkpoints exist and none can be loaded, raises ``CheckpointNotFound`` with every reason. Options: the
        fields of ``LoadOptions`` (``load_optimizer``, ``load_rng_state``, ``strict``, ``include``, ``exclude``,
        ``prove``).
        """
        self.wait()
        if fresh or self.line.fresh:
            self.line.fresh = True
            self.line.ensure(self._key("generation"))
            return None
        report = self.loader.newest(self._key("resume"), self._options(options))
        self._continue(report)
        self.line.ensure(self._key("generation"))
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
        if self.line.generation is not None:  # going back: what follows is another line than what was saved after that
            self._flush_metrics()
            self._last_path = None
        self.line.go_on_from(report.generation, report.step)
        self.pipeline.go_on_from(self.loader.loaded)
        self.history.continue_from(self.root.read_metrics(self.line.resumed_from))
        self.schedule.resumed(report.step, self.history.rows)

    def _options(self, options: Mapping[str, Any]) -> LoadOptions:
        return LoadOptions(**{"strict": self.config.strict, **options})

    # ------------------------------------------------------------------ looking

    @property
    def generation(self) -> int | None:
        """This job start's number in the lineage; None before its first save or resume."""
        return self.line.generation

    @property
    def resumed_from(self) -> tuple[int, int] | None:
        """(generation, step) of the checkpoint that this job goes on from."""
        return self.line.resumed_from

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
            self._fence.close()
            self.schedule.close()
            self.line.close()
            self.pipeline.close()
            self.agreement.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:  # the first error is the one to show
            log.error("while leaving after %s: %s", type(error).__name__, second)

    def _flush_metrics(self) -> None:
        """Write what no save has written yet."""
        rows = self.history.take()
        if self.agreement.is_leader and self.line.generation is not None and rows:
            self._saves += 1
            self._log_metrics(self.line.generation, rows)

    def _key(self, what: str) -> str:
        """Return a fresh agreement key: ranks call in the same order, so their counters agree."""
        self._calls += 1
        return f"{self._serial}.g{self.line.generation or 0}/{self._calls}-{what}"

    def _url(self) -> str:
        return self.store.url.removeprefix("file://").rstrip("/")
