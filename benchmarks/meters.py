"""What an operation cost this process and those it started: CPU, memory, bytes and calls, from /proc.

Children that are alive (DCP's and torch_checkpointing's writers) are counted from their own files; those that ended
inside a measurement are in the parent's ``RUSAGE_CHILDREN`` once it has waited for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_libc = ctypes.CDLL(None)
IO = ("rchar", "wchar", "syscr", "syscw", "read_bytes", "write_bytes")


def descendants(root: int) -> list[int]:
    """Return the processes below ``root`` that are alive."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int(_stat(int(folder.name))[1])
    found, wave = [], [root]
    while wave:
        wave = [pid for pid, parent in parents.items() if parent in wave]
        found += wave
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@dataclass(slots=True)
class Reading:
    """Counters of this process and its descendants at one moment."""

    cpu_seconds: float = 0.0
    io: dict[str, int] = field(default_factory=dict)


def read(children: list[int]) -> Reading:
    """Read the counters now."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = Reading(own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime, dict.fromkeys(IO, 0))
    for pid in (os.getpid(), *children):
        with contextlib.suppress(OSError):
            if pid != os.getpid():
                found.cpu_seconds += sum(map(int, _stat(pid)[11:13])) / _TICKS
            for line in Path(f"/proc/{pid}/io").read_text().splitlines():
                name, _, value = line.partition(": ")
                if name in found.io:
                    found.io[name] += int(value)
    return found


class PeakMemory:
    """Most memory beyond what was held at the start: this process's own mark, and its children's at the end."""

    def __init__(self) -> None:
        gc.collect()
        _libc.malloc_trim(0)  # or memory that an earlier operation gave back only to malloc would hide a later one's
        self._before = {pid: _resident(pid, "VmRSS") for pid in (os.getpid(), *descendants(os.getpid()))}
        for pid in self._before:
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM

    def extra(self, children: list[int]) -> int:
        """Return bytes beyond the start, summed over the processes' own peaks."""
        return sum(max(0, _resident(pid, "VmHWM") - self._before.get(pid, 0)) for pid in (os.getpid(), *children))


def _resident(pid: int, which: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(which):
                return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def foreign_load() -> Iterator[dict[str, float]]:
    """Yield a dict that gets ``foreign_cores``: CPU used meanwhile by processes that are not below this one."""
    out: dict[str, float] = {}
    own, all_, started = _tree_cpu(), _machine_cpu(), os.times().elapsed
    try:
        yield out
    finally:
        wall = max(os.times().elapsed - started, 1e-3)
        out["foreign_cores"] = max(0.0, (_machine_cpu() - all_) - (_tree_cpu() - own)) / wall


def _tree_cpu() -> float:
    return read(descendants(os.getpid())).cpu_seconds


def _machine_cpu() -> float:
    """Return user, nice and system seconds of all cores; not idle, not interrupts."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return sum(map(int, fields[1:4])) / _TICKS
