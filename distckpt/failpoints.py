"""Named places where a test can make the process die, stop, wait or fail.

A spec is ``name[@substring]:nth:action``; several are joined with ``;``. ``@substring`` limits it to hits whose
detail (usually a file name) contains the text, ``nth`` counts from 1 (0 means every hit), and the action is one of
``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``raise`` or ``raise=ENOSPC`` (OSError), ``sleep=SECONDS``. Specs come from
``DISTCKPT_FAILPOINT`` or ``arm()``. Nothing is armed in normal use, and a hit then costs one truth test.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from dataclasses import dataclass

from distckpt import clock
from distckpt.errors import ConfigError


@dataclass(slots=True)
class _Armed:
    name: str
    substring: str
    nth: int
    action: str
    hits: int = 0


def _parse(spec: str) -> list[_Armed]:
    armed = []
    for part in filter(None, (p.strip() for p in spec.split(";"))):
        fields = part.split(":")
        if len(fields) != 3 or not fields[1].isdigit():
            raise ConfigError(f"failpoint {part!r}: want name[@substring]:nth:action")
        name, _, substring = fields[0].partition("@")
        armed.append(_Armed(name, substring, int(fields[1]), fields[2]))
    return armed


_armed: list[_Armed] = _parse(os.environ.get("DISTCKPT_FAILPOINT", ""))
_lock = threading.Lock()
_trace: list[str] | None = None


def arm(spec: str) -> None:
    """Replace whatever is armed by the given spec; an empty string disarms."""
    global _armed
    _armed = _parse(spec)


def record(into: list[str] | None = None) -> list[str]:
    """Start recording hits as ``name@detail`` and return the live list (used to enumerate kill points).

    ``into``: append to this list, whose ``append`` may do more than keep (it is called before anything armed acts).
    """
    global _trace
    _trace = [] if into is None else into
    return _trace


def hit(name: str, detail: str = "") -> None:
    """Pass a named place; does what is armed for it, else nothing."""
    if _trace is not None:
        _trace.append(f"{name}@{detail}")
    if not _armed:
        return
    for point in _armed:
        if point.name == name and point.substring in detail:
            with _lock:
                point.hits += 1
                due = point.nth in (0, point.hits)
            if due:
                _act(point.action, name, detail)


def _act(action: str, name: str, detail: str) -> None:
    verb, _, argument = action.partition("=")
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif verb == "sleep":
        clock.sleep(float(argument))
    elif verb == "raise":
        code = getattr(errno, argument or "EIO")
        raise OSError(code, f"failpoint {name}: {os.strerror(code)}", detail or None)
    else:
        raise ConfigError(f"failpoint {name}: unknown action {action!r}")
