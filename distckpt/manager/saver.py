"""One background save at a time: a thread that outlives nothing silently."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from distckpt.errors import AgreementTimeout

log = logging.getLogger("distckpt")


class BackgroundSaver:
    """Runs one job at a time on its own thread and keeps its error until somebody asks.

    The thread is not a daemon: an interpreter that ends waits for it, so a save in flight is committed or its
    failure is logged, never dropped.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Callable[[], None], name: str) -> None:
        """Start a job; the one before must be over (``join`` first)."""
        assert not self.busy, "a save is in flight"
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"distckpt-save-{name}", daemon=False)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the job to end; ``AgreementTimeout`` if it does not within that many seconds."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise AgreementTimeout(f"{self._thread.name} did not end within {timeout_s:.0f} s; storage may be stuck")

    def take_error(self) -> BaseException | None:
        """Return the last job's error once, and forget it."""
        error, self._error = self._error, None
        return error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
            log.error("background save failed: %s: %s", type(error).__name__, error)
