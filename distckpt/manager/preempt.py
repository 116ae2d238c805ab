"""Preemption: a notice by signal becomes a flag that training reads at its next step boundary.

Schedulers warn before they kill: SLURM by ``--signal=USR1@120``, Kubernetes and most clouds by SIGTERM. A
handler can do nothing useful by itself (saving needs all ranks at the same step), so it notes the signal
and its time. The manager shares that note between ranks, saves once, and leaves by ``Preempted``, whose
exit code launch scripts turn into a requeue.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, Final, TypeAlias

from distckpt import clock
from distckpt.errors import ConfigError

logger = logging.getLogger("distckpt")

EXIT_PREEMPTED: Final = 85
"""Exit code of a job that saved because it was preempted and wants to run again.

Apart from 0, 1 (error), 2 (wrong use), 64–78 (sysexits), 124–127 and 128+n (shell, signals) and 255; 85 is
Linux' ERESTART.
"""

_Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
_NOTICES_ONLY: Final = frozenset({"SIGUSR1", "SIGUSR2"})


class Preempted(SystemExit):
    """Leave training after a preemption notice: ends the process with ``EXIT_PREEMPTED`` unless caught."""

    def __init__(self, reason: str = "preempted", *, step: int | None = None, path: str | None = None) -> None:
        """Keep why, and the step and path of the save made because of it (None if there was none)."""
        super().__init__(EXIT_PREEMPTED)
        self.reason, self.step, self.path = reason, step, path

    def __str__(self) -> str:
        saved = f"; saved step {self.step} at {self.path}" if self.path is not None else "; nothing was saved"
        return f"{self.reason}{saved}"


class PreemptionWatch:
    """Watch for signals from construction to ``close``; also a context manager.

    The first notice is kept in ``requested`` and ``since``, and does not reach the handler that was there
    before; further ones change neither. A SIGTERM (or any other signal but SIGUSR1 and SIGUSR2) that comes
    again ``repeat_after_s`` seconds or more after its first time means it: it goes to the previous handler,
    which by default ends the process. Sooner it is taken for the same notice, since a worker often gets it
    twice: from the scheduler and from torchrun.

    Python delivers signals to the main thread only: made on another thread, the watch logs that it cannot
    watch, and stays inert (``active`` is False), though ``notify`` still works. ``close`` puts the previous
    handlers back.
    """

    def __init__(
        self, signals: Iterable[str | signal.Signals] = ("SIGTERM", "SIGUSR1"), *, repeat_after_s: float = 5.0
    ) -> None:
        """Install the handlers. Raises ConfigError for a signal that does not exist or cannot be handled."""
        # Plain attributes, no threading.Event: Event.set takes a lock, and a handler that interrupts the main
        # thread inside that very lock would wait for itself for ever. Assignment is atomic; readers poll.
        self._requested: tuple[str, float] | None = None
        self._first: dict[int, float] = {}
        self._previous: dict[int, _Handler] = {}
        self._repeat_after_s = repeat_after_s
        numbers = [_signal_number(name) for name in signals]
        self.active = threading.current_thread() is threading.main_thread()
        if not self.active:
            logger.warning("preemption signals are not watched: only the main thread of a process can handle signals")
            return
        for number in dict.fromkeys(numbers):
            self._previous[number] = signal.signal(number, self._handle)

    @property
    def requested(self) -> str | None:
        """Name of the first signal (or what ``notify`` was given); None while there is none."""
        noted = self._requested
        return None if noted is None else noted[0]

    @property
    def since(self) -> float | None:
        """When the notice came, by ``clock.monotonic``; None while there is none."""
        noted = self._requested
        return None if noted is None else noted[1]

    def notify(self, reason: str) -> None:
        """Take a notice from elsewhere (a cloud's metadata service, another rank) as if it were a signal."""
        if self._requested is None:
            self._requested = (reason, clock.monotonic())

    def deadline(self, budget_s: float) -> clock.Deadline | None:
        """Return the time budget for the save, counted from the notice's arrival; None while there is none.

        ``budget_s`` is the time the scheduler leaves between notice and kill, less a margin (torchrun
        itself kills its workers 30 s after a SIGTERM).
        """
        since = self.since
        return None if since is None else clock.Deadline(since + budget_s, budget_s)

    def close(self) -> None:
        """Put the previous handlers back, except where somebody replaced ours meanwhile; idempotent."""
        if not self.active:
            return
        if threading.current_thread() is not threading.main_thread():
            logger.warning("preemption signals are still watched: close the watch on the main thread")
            return
        self.active = False
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                _install(number, previous)

    def __enter__(self) -> PreemptionWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, clock.monotonic()
        if not self.active:  # someone who wrapped our handler still calls it after close
            self._pass_on(number, frame)
            return
        first = self._first.setdefault(number, now)
        if now - first >= self._repeat_after_s and name not in _NOTICES_ONLY:
            self._pass_on(number, frame)
        elif self._requested is None:
            self._requested = (name, now)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Do what would have happened to this signal without the watch."""
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
        elif previous != signal.SIG_IGN:
            _install(number, previous)
            os.kill(os.getpid(), number)


def _install(number: int, previous: _Handler) -> None:
    # None: a handler that was not set from Python and cannot be named; the default action is the closest.
    signal.signal(number, signal.SIG_DFL if previous is None else previous)


def _signal_number(name: str | signal.Signals) -> signal.Signals:
    try:
        number = signal.Signals[name] if isinstance(name, str) else signal.Signals(name)
    except (KeyError, ValueError):
        raise ConfigError(
            f"preemption signal {name!r} does not exist on this system; use a name like 'SIGTERM'"
        ) from None
    if number in (signal.SIGKILL, signal.SIGSTOP):
        raise ConfigError(f"preemption signal {number.name!r}: the system lets no process handle it")
    return number
