"""Signals, full disks and errors at chosen places of a bench, and what it leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from distckpt import failpoints
from distckpt.cli.main import main


def left_in(folder: str | os.PathLike[str]) -> list[str]:
    """Everything below a folder."""
    top = Path(folder)
    return sorted(path.relative_to(top).as_posix() for path in top.rglob("*"))


class At(list[str]):
    """Does something once, at the n-th hit of a failpoint; what is recorded is not kept."""

    def __init__(self, point: str, nth: int, action: Callable[[], object]) -> None:
        super().__init__()
        self.point, self.nth, self.action, self.hits = point, nth, action, 0

    def append(self, hit: str) -> None:
        if hit.startswith(self.point):
            self.hits += 1
            if self.hits == self.nth:
                self.action()


def do_at(point: str, nth: int, action: Callable[[], object]) -> None:
    """Arrange for an action in this process; for one that ends soon."""
    failpoints.record(At(point, nth, action))


def signalled(rank: int, folder: str, number: int, point: str, nth: int) -> tuple[int, list[str]]:
    """Run a bench that gets a signal at a failpoint; its exit status, and what is left."""
    do_at(point, nth, lambda: os.kill(os.getpid(), signal.Signals(number)))
    code = main(["bench", folder, "--mbytes", "8", "--rounds", "1", "--operations", "3"])
    return code, left_in(folder)
