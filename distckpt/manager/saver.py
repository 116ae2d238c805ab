"""One background save at a time: a thread that outlives nothing silently."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable

from distckpt.errors import AgreementTimeout

log = logging.getLogger("distckpt")


class BackgroundSaver:
    """Runs one job at a time on its own thread and keeps its error until somebody asks.

    An interpreter that ends waits for the thread first of all, so a save in flight is committed or its failure is
    logged, never dropped. (A thread that is no daemon is waited for too, but only after ``concurrent.futures`` has
    stopped taking work, which would fail the save.)
    """

    def __init__(self, nice: int = 0) -> None:
        """``nice`` is added to the thread's nice value, and so to that of every thread which a job starts."""
        self._nice = nice
        self._hurry: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._registered = False

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Callable[[], None], name: str, hurry: Callable[[], None] = lambda: None) -> None:
        """Start a job; the one before must be over (``join`` first). ``hurry`` is called when somebody waits for it."""
        assert not self.busy, "a save is in flight"
        self._wait_at_exit()
        self._hurry = hurry
        go = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(job, go), name=f"distckpt-save-{name}", daemon=False)
        self._thread.start()
        go.set()  # the caller, which is training, goes on with the interpreter lock: starting would hand it over

    def join(self, timeout_s: float) -> None:
        """Wait for the job to end; ``AgreementTimeout`` if it does not within that many seconds."""
        if self._thread is not None:
            self._hurry()
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise AgreementTimeout(
                    f"{self._thread.name} did not end within {timeout_s:.0f} s; storage may be stuck"
                )

    def take_error(self) -> BaseException | None:
        """Return the last job's error once, and forget it."""
        error, self._error = self._error, None
        return error

    def _wait_at_exit(self) -> None:
        """Have the interpreter wait for us before it stops thread pools; these hooks run last in, first out."""
        if self._registered:
            return
        self._registered = True
        own = weakref.ref(self)

        def wait() -> None:
            saver = own()
            if saver is not None and saver._thread is not None:
                saver._thread.join()

        with contextlib.suppress(
            AttributeError, RuntimeError
        ):  # a private hook of CPython; without it, the thread's own
            threading._register_atexit(wait)  # type: ignore[attr-defined]

    def _run(self, job: Callable[[], None], go: threading.Event) -> None:
        go.wait()
        self._step_back()
        try:
            job()
        except BaseException as error:
            self._error = error
            log.error("background save failed: %s: %s", type(error).__name__, error)

    def _step_back(self) -> None:
        """Lower this thread's priority, for the CPU and (by default derived from it) for storage."""
        if self._nice and sys.platform == "linux":  # elsewhere it would be the process's
            thread = threading.get_native_id()
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + self._nice))
