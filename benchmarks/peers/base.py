"""What an adapter must do: save and load a live state durably and in place, in the foreground and in the background."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.payload import Live


class Peer:
    """One way of saving. An adapter lives as long as the state it saves; every rank has one.

    ``path(root, step)`` is where a checkpoint lies. ``save`` and ``load`` are the foreground; ``begin``, ``fence``,
    ``done`` and ``finish`` the background: training may change nothing before ``begin`` returns, and no weight before
    ``fence`` returns. What is not durable when ``save`` returns is made so by ``sync``, on the clock as well.
    """

    name: ClassVar[str]
    package: ClassVar[str] = "torch"
    link: ClassVar[str] = ""
    """Where its authors recommend the settings used here."""
    durable: ClassVar[bool] = True
    """Whether its own files are synced when it says that it is done; if not, the adapter syncs them."""

    def version(self) -> str:
        """Return the version; raises what importing the library raises."""
        from importlib.metadata import version

        return version(self.package)

    def path(self, root: Path, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return root / self.name / f"{step:06d}"

    def save(self, root: Path, step: int, live: Live) -> None:
        """Save; returns when the library says it is done."""
        raise NotImplementedError

    def load(self, root: Path, step: int, live: Live) -> None:
        """Load into the live tensors: all of their bytes are in place on return."""
        raise NotImplementedError

    def resume(self, root: Path, step: int, live: Live) -> None:
        """Load as a job does that goes on saving afterwards."""
        self.load(root, step, live)

    def begin(self, root: Path, step: int, live: Live) -> None:
        """Start a background save."""
        raise NotImplementedError

    def fence(self) -> None:
        """Return when weights may change."""

    def done(self) -> bool:
        """Whether the background save is durable."""
        raise NotImplementedError

    def finish(self) -> None:
        """Wait until the background save is durable; raises its error."""
        raise NotImplementedError

    def sync(self, root: Path, step: int, rank: int, world: int) -> None:
        """Make what ``save`` wrote durable, if the library has not."""
        if not self.durable:
            sync_tree(self.path(root, step), rank, world)

    def counters(self) -> dict[str, Any]:
        """Return the library's own counters of the last operation, if it has any."""
        return {}

    def close(self) -> None:
        """End threads and processes."""


class Tail:
    """A thread that waits for a background save and then syncs its files, as a careful user of that library would."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._error = work, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    _error: BaseException | None

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for it; raises its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def files_of(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync_tree(folder: Path, rank: int = 0, world: int = 1) -> None:
    """Make every file and folder durable, each rank its share of the files; rank 0 also the folders above."""
    files = files_of(folder)
    for path in files[rank::world]:
        sync_path(path)
    if rank == 0:
        for path in {folder, folder.parent, *(p.parent for p in files)}:
            sync_path(path)


def sync_path(path: Path) -> None:
    """Make one file or folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copy_all(targets: Iterable[tuple[Any, Any]]) -> None:
    """Copy loaded tensors into the live ones."""
    for target, loaded in targets:
        target.copy_(loaded)
