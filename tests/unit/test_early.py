"""Reading before the plan is made: a hint that costs nothing where it is not taken, and hides no damage."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import CheckpointConfig, CheckpointManager
from distckpt.dcp import early
from distckpt.dcp.reader import CheckpointReader
from distckpt.errors import CorruptCheckpoint
from distckpt.storage import direct, posix_reader
from distckpt.storage.base import PlainReader, open_reader
from distckpt.storage.posix import PosixStore
from distckpt.storage.probes import evict

MIB = 1 << 20
NBYTES = 12 * MIB


def resident(path: Path) -> int:
    with open(path, "rb") as file, contextlib.closing(direct.Residency(file.fileno(), path.stat().st_size)) as pages:
        return pages.pages()


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(NBYTES))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    if evict([path]):
        pytest.skip("this file system keeps no file out of memory")
    return path


def test_a_file_is_brought_into_memory_until_it_is_told_to_stop(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posix_reader, "WINDOW", MIB)
    stop = threading.Event()
    stop.set()
    with contextlib.closing(open_reader(PosixStore(cold.parent), "file")) as reader:
        reader.read_early(stop)
        assert resident(cold) == 0
        stop.clear()
        reader.read_early(stop)
        deadline = time.monotonic() + 20  # the last windows are on their way
        while resident(cold) < NBYTES // 4096 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert resident(cold) == NBYTES // 4096


def test_a_store_that_cannot_does_nothing(cold: Path) -> None:
    PlainReader(PosixStore(cold.parent), "file").read_early(threading.Event())
    assert resident(cold) == 0


def model(fill: float) -> nn.Module:
    module = nn.Module()
    for number in range(6):
        module.register_parameter(f"p{number}", nn.Parameter(torch.full((MIB // 2,), fill + number)))
    return module


def manager(root: Path, module: nn.Module) -> CheckpointManager:
    return CheckpointManager(
        CheckpointConfig(root, verbose=False, preemption_signals=(), control_file=None), model=module
    )


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    with manager(tmp_path, model(1.0)) as m:
        m.save(step=1)
    (found,) = tmp_path.glob("step-*/*/*.safetensors")
    if evict([found]):
        pytest.skip("this file system keeps no file out of memory")
    return found


def plan_late(monkeypatch: pytest.MonkeyPatch, shard: Path) -> list[int]:
    """Have the plan wait until something was read early; returns how many pages there were each time."""
    seen: list[int] = []
    real = CheckpointReader.plan

    def plan(self: CheckpointReader, wants: Any, **options: Any) -> Any:
        deadline = time.monotonic() + 20
        while resident(shard) < MIB // 4096 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(resident(shard))
        return real(self, wants, **options)

    monkeypatch.setattr(CheckpointReader, "plan", plan)
    return seen


def test_a_load_takes_what_was_read_early(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "MANY", 1)
    seen = plan_late(monkeypatch, shard)
    live = model(0.0)
    with manager(tmp_path, live) as m:
        assert m.load(1).read_bytes == NBYTES
    assert seen[0] >= MIB // 4096
    assert all(torch.equal(p, q) for p, q in zip(live.parameters(), model(1.0).parameters(), strict=True))
    assert not any(thread.name == "distckpt-early" for thread in threading.enumerate())


def test_damage_in_what_was_read_early_is_found(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(shard.read_bytes())
    data[-NBYTES + 100] ^= 1
    shard.write_bytes(data)
    evict([shard])
    monkeypatch.setattr(early, "MANY", 1)
    seen = plan_late(monkeypatch, shard)
    with manager(tmp_path, model(0.0)) as m, pytest.raises(CorruptCheckpoint, match="do not match their digest"):
        m.load(1)
    assert seen[0] >= MIB // 4096


def test_few_tensors_or_another_size_of_the_job_read_nothing_early(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(posix_reader.PosixReader, "read_early", lambda *_: asked.append(1))
    with manager(tmp_path, model(0.0)) as m:
        m.load(1)
        assert not asked
        monkeypatch.setattr(early, "MANY", 1)
        reader = CheckpointReader(m.store, m.loader.loaded, shard.parent.parent.name)  # type: ignore[arg-type]
        with early.reading_early(reader, 0, 2):
            pass
        assert not asked
        m.load(1)
    assert asked == [1]
