"""Helpers of the tests that hurt the POSIX store."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distckpt.storage import PosixStore

DATA = b"manifest " * 1000
NAME = "step-1/manifest.json"
SHARD = "step-1/g1/shard"


def write(store: PosixStore, name: str, data: bytes, chunk: int = 4000) -> None:
    writer = store.open_writer(name, len(data))
    try:
        for offset in range(0, len(data), chunk):
            writer.write_at(offset, memoryview(data)[offset : offset + chunk])
        writer.commit()
    except BaseException:
        writer.abort()
        raise
    store.sync_folder(os.path.dirname(name))


def names(store: PosixStore) -> list[str]:
    return sorted(entry.name for entry in store.list())


def on_disk(store: PosixStore) -> list[str]:
    """Every file below the root as the system shows it, temporary ones too."""
    return sorted(name for _, _, files in os.walk(store.root) for name in files)


def in_child(action: Callable[[], object]) -> int:
    """Run in a forked child; returns its exit status: 0, 1 (raised), or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class Injector:
    """Makes the n-th call of one function of ``os`` fail with an errno, once or from then on."""

    def __init__(self, function: str, nth: int, code: int, *, forever: bool) -> None:
        self.function, self.nth, self.code, self.forever = function, nth, code, forever
        self.calls = 0

    @contextmanager
    def active(self) -> Iterator[Injector]:
        original = getattr(os, self.function)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.nth or (self.forever and self.calls > self.nth):
                if self.function == "close":
                    original(*args)  # a failing close() has closed all the same
                raise OSError(self.code, os.strerror(self.code))
            return original(*args, **kwargs)

        setattr(os, self.function, call)
        try:
            yield self
        finally:
            setattr(os, self.function, original)

    @property
    def fired(self) -> bool:
        return self.calls >= self.nth


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def small_file_system(tmp_path: Path) -> Iterator[PosixStore]:
    """A store on a file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount refused: {done.stderr.strip()}")
    try:
        yield PosixStore(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
