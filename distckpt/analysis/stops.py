"""Signals that end a command, held back while it tidies up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; ``signum`` is its number. The conventional exit status is 128 more."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stops:
    """Turns the first signal into ``Stopped``, wherever the main thread is; later ones do nothing."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._held = 0

    def __call__(self, signum: int, frame: FrameType | None = None) -> None:
        """Handle a signal."""
        if self.signum is None:
            self.signum = signum
            if not self._held:
                raise Stopped(signum)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let nothing interrupt the block; a signal that comes meanwhile is raised at the end of ``stoppable``."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1


@contextlib.contextmanager
def stoppable() -> Iterator[Stops]:
    """Handle SIGINT, SIGTERM and SIGHUP as ``Stops`` does, and put the handlers back; in the main thread only.

    A SIGHUP that is ignored stays so: that is what nohup is for.
    """
    stops = Stops()
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    ignored = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
    before = {number: signal.signal(number, stops) for number in SIGNALS if number not in ignored}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    if stops.signum is not None:
        raise Stopped(stops.signum)
