"""The fence of lazy saves: weights do not change before the save under way has copied them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from distckpt.config import CheckpointConfig
from distckpt.engines.base import Engine, StepBound
from distckpt.errors import ConfigError, SnapshotFailed
from distckpt.manager.pipeline import SavePipeline

log = logging.getLogger("distckpt")


class StepFence:
    """Stands before every optimizer step while ``lazy_staging`` is on; ``pass_through`` also serves user code.

    Where a copy has failed, the save that needs it will, and counts then. The fence raises only if ``tolerated`` says that
    this failure will be one too many: a tolerated one must not end training.
    """

    def __init__(
        self, config: CheckpointConfig, engine: Engine, pipeline: SavePipeline, tolerated: Callable[[], bool]
    ) -> None:
        self._pipeline = pipeline
        self._tolerated = tolerated
        self.close: Callable[[], None] = lambda: None
        """Take the hook away."""
        if not config.lazy_staging:
            return
        if not isinstance(engine, StepBound):
            raise ConfigError(
                f"lazy_staging=True: engine {engine.name!r} cannot say what only optimizer steps change, or hold steps up "
                "(FSDP1 makes copies of its own; use fully_shard); set lazy_staging=False"
            )
        self.close = engine.before_step(self.pass_through)

    def pass_through(self) -> None:
        """Return when weights and optimizer state may be changed."""
        try:
            self._pipeline.settle()
        except SnapshotFailed as error:
            if not self._tolerated():
                raise
            log.error("training goes on, the save in flight will fail: %s", error)
