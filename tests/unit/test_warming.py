"""Fetching ahead: what is fetched and what not, in which order it is read then, and that nothing waits for it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distckpt.dcp import warming
from distckpt.dcp.warming import Warming, files_of
from distckpt.format.manifest import MeshEntry, ShardEntry, TensorEntry
from distckpt.storage.base import PlainReader, open_reader
from distckpt.storage.memory import MemoryStore
from distckpt.storage.posix import PosixStore
from distckpt.storage.probes import evict

MIB = 1 << 20
FETCHED = "bytes_fetched_ahead"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEP": MIB, "AHEAD": 2 * MIB, "LEAST": 0}.items():
        monkeypatch.setattr(warming, name, value)


def store_with(root: Path, *sizes: int) -> tuple[PosixStore, list[tuple[str, int]]]:
    """Return a store with cold files of so many bytes."""
    files = [(f"file-{number}", size) for number, size in enumerate(sizes)]
    for name, size in files:
        (root / name).write_bytes(os.urandom(size))
    os.sync()
    evict([root / name for name, _ in files])
    return PosixStore(root), files


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def test_files_are_fetched_to_their_ends_and_what_memory_has_is_not_fetched_again(tmp_path: Path) -> None:
    store, files = store_with(tmp_path, 5 * MIB + 17, 3 * MIB)
    with Warming(store, files) as warm:
        until(lambda: store.counters[FETCHED] == 8 * MIB + 17)
        until(lambda: not warm._thread.is_alive())
    for name, _ in files:
        (tmp_path / name).read_bytes()
    with Warming(store, files) as warm:
        until(lambda: not warm._thread.is_alive())
    assert store.counters[FETCHED] == 8 * MIB + 17
    reader = open_reader(store, "file-1")
    target = bytearray(3 * MIB)
    assert reader.read_cached(0, 3 * MIB, lambda: [memoryview(target)])
    assert target == (tmp_path / "file-1").read_bytes()
    reader.close()


def test_no_more_than_the_limit_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "MOST", 5 * MIB)
    store, files = store_with(tmp_path, 3 * MIB, 8 * MIB, 8 * MIB)
    with Warming(store, files) as warm:
        until(lambda: not warm._thread.is_alive())
    assert store.counters[FETCHED] == 5 * MIB
    monkeypatch.setattr(warming, "LEAST", 64 * MIB)
    evict([tmp_path / name for name, _ in files])
    with Warming(store, files):
        pass
    assert store.counters[FETCHED] == 5 * MIB


def test_nothing_is_fetched_once_reading_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, files = store_with(tmp_path, 8 * MIB)
    asked, go_on = threading.Semaphore(0), threading.Semaphore(0)

    class Held:
        def fetch_ahead(self, offset: int, nbytes: int) -> bool:
            asked.release()
            assert go_on.acquire(timeout=20)
            return reader.fetch_ahead(offset, nbytes)

        def __getattr__(self, name: str) -> Any:
            return getattr(reader, name)

    reader = open_reader(store, "file-0")
    monkeypatch.setattr(warming, "open_reader", lambda *_: Held())
    with Warming(store, files) as warm:
        assert asked.acquire(timeout=20)
        warm.stop()
        go_on.release()
        until(lambda: not warm._thread.is_alive())
    assert store.counters[FETCHED] == MIB


def test_a_store_that_does_not_answer_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "_END_S", 0.05)
    store, files = store_with(tmp_path, 8 * MIB)
    silent = threading.Event()

    def opened(store: PosixStore, name: str) -> PlainReader:
        silent.wait(20)
        return PlainReader(store, name)

    monkeypatch.setattr(warming, "open_reader", opened)
    with Warming(store, files) as warm:
        assert warm.spread([]) == []
    assert warm._thread.is_alive()
    silent.set()
    until(lambda: not warm._thread.is_alive())


def test_what_cannot_be_read_or_kept_is_left_to_who_reads(tmp_path: Path) -> None:
    store, files = store_with(tmp_path, 2 * MIB)
    with Warming(store, [("absent", 9 * MIB), ("file-0", 7 * MIB), *files]) as warm:
        until(lambda: not warm._thread.is_alive())
    memory = MemoryStore()
    memory.create("file", bytes(2 * MIB))
    with Warming(memory, [("file", 2 * MIB)]) as warm:
        until(lambda: not warm._thread.is_alive())
    assert memory.counters[FETCHED] == 0
    assert not warm._reached


class Asked(msgspec.Struct, frozen=True):
    """What a request is to ``spread``."""

    path: str
    start: int
    stop: int


def test_requests_that_memory_answers_lie_evenly_between_the_others(tmp_path: Path) -> None:
    store, files = store_with(tmp_path, 3 * MIB)
    requests: list[Any] = [Asked("file-0", at * MIB, (at + 1) * MIB) for at in range(9)] + [Asked("other", 0, MIB)]
    with Warming(store, files) as warm:
        until(lambda: not warm._thread.is_alive())
    order = warm.spread(requests)
    assert sorted(order, key=requests.index) == requests
    warm_at = [place for place, request in enumerate(order) if request.path == "file-0" and request.stop <= 3 * MIB]
    assert warm_at == [1, 5, 8]
    cold = [request for request in order if order.index(request) not in warm_at]
    assert cold == [request for request in requests if request in cold]  # the disk sees them in their order
    assert Warming(store, []).spread(requests) == requests


def test_which_files_a_rank_will_want_whole(plain_manifest: Callable[..., Any]) -> None:
    cut = plain_manifest(4, {"weight": ["S(0)"], "norm": ["R"]}, {"weight": [1000, 1000], "norm": [10]})
    assert files_of(cut, "step-1", 2, 4) == [("step-1/a/shard-2", 4 * MIB)]
    assert files_of(cut, "step-1", 1, 2) == files_of(cut, "step-1", 1, 8) == []
    assert [name for name, _ in files_of(cut, "step-1", 0, 1)] == [f"step-1/a/shard-{n}" for n in range(4)]
    alike = plain_manifest(4, {"weight": ["R"], "norm": ["R"]}, {"weight": [1000, 1000], "norm": [10]})
    assert files_of(alike, "step-1", 2, 4) == []  # ranks may share the reading of these


@pytest.fixture
def plain_manifest() -> Callable[..., Any]:
    class Manifest(msgspec.Struct):
        meshes: list[MeshEntry]
        tensors: dict[str, TensorEntry]
        shards: list[ShardEntry]
        nbytes: int

    def make(world: int, placements: dict[str, list[str]], shapes: dict[str, list[int]]) -> Manifest:
        tensors = {n: TensorEntry(dtype="float32", shape=shapes[n], mesh=0, placements=p) for n, p in placements.items()}
        shards = [ShardEntry(path=f"a/shard-{n}", size=4 * MIB, header="") for n in range(world)]
        return Manifest([MeshEntry(shape=[world], ranks=[[0, world]])], tensors, shards, 4 * MIB * world)

    return make
