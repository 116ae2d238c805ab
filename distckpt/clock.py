"""The only place that reads time, so that tests can replace it and every wait can be given a deadline."""

from __future__ import annotations

import datetime as _datetime
import time as _time
from dataclasses import dataclass


def now() -> float:
    """Return seconds since the epoch (wall clock)."""
    return _time.time()


def monotonic() -> float:
    """Return seconds of a clock that never goes back; only differences mean anything."""
    return _time.monotonic()


def sleep(seconds: float) -> None:
    """Sleep for that many seconds."""
    _time.sleep(seconds)


def utc_text(timestamp: float | None = None) -> str:
    """Return the time as ``2026-01-31T12:00:00Z`` (UTC, whole seconds)."""
    moment = _datetime.datetime.fromtimestamp(now() if timestamp is None else timestamp, _datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment handed down a call chain, so that nested waits share one budget of seconds."""

    at: float
    budget_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return a deadline that many seconds from now."""
        return cls(monotonic() + seconds, seconds)

    @property
    def left_s(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self.at - monotonic())

    @property
    def passed(self) -> bool:
        """Whether the moment is over."""
        return monotonic() >= self.at
