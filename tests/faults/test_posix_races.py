"""The POSIX store when writers die or race."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from posix_support import (
    DATA,
    NAME,
    SHARD,
    in_child,
    names,
    on_disk,
    write,
)

from distckpt import failpoints
from distckpt.errors import AlreadyExists, NotFound, StoreError
from distckpt.storage import PosixStore, Writer


@pytest.fixture(autouse=True)
def disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.fixture
def store(tmp_path: Path) -> PosixStore:
    return PosixStore(tmp_path / "root")


# -- death


POINTS = ["before_temp", "temp_written", "temp_synced", "linked", "synced"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_in_create(store: PosixStore, point: str) -> None:
    def child() -> None:
        failpoints.arm(f"create.{point}@manifest:1:kill")
        store.create(NAME, DATA)

    assert in_child(child) == -signal.SIGKILL
    if point in ("linked", "synced"):
        assert names(store) == [NAME]
        assert store.read(NAME) == DATA
        with pytest.raises(AlreadyExists):
            store.create(NAME, b"other")
    else:
        assert names(store) == []
        with pytest.raises(NotFound):
            store.read(NAME)
    store.create(NAME, DATA)
    assert store.read(NAME) == DATA
    assert names(store) == [NAME]


def test_create_passes_its_failpoints_in_order(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_trace", None)
    trace = failpoints.record()
    store.create(NAME, DATA)
    assert trace == [f"create.{point}@{NAME}" for point in POINTS]
    del trace[:]
    write(store, SHARD, b"123456", chunk=3)
    store.delete(SHARD)
    points = [
        "writer.opened",
        "writer.chunk",
        "writer.chunk",
        "writer.before_fsync",
        "writer.synced",
        "delete.before",
    ]
    assert trace == [f"{point}@{SHARD}" for point in points]


@pytest.mark.parametrize("point", ["opened", "chunk", "before_fsync", "synced"])
@pytest.mark.parametrize("action", ["kill", "raise=EIO"])
def test_writer_dies_at_a_failpoint(store: PosixStore, point: str, action: str) -> None:
    def child() -> None:
        failpoints.arm(f"writer.{point}:1:{action}")
        write(store, SHARD, DATA)

    assert in_child(child) == (-signal.SIGKILL if action == "kill" else 1)
    if action == "kill":  # an orphan: other attempts have other names, and gc removes it by its name
        assert names(store) == [SHARD]
        with pytest.raises(AlreadyExists):
            store.open_writer(SHARD, 1)
        store.delete(SHARD)
    assert on_disk(store) == []
    write(store, SHARD, DATA)


def test_litter_of_killed_creates_is_swept_by_age(store: PosixStore) -> None:
    failpoints.arm("create.temp_synced:1:kill")
    for _ in range(3):
        assert in_child(lambda: store.create(NAME, DATA)) == -signal.SIGKILL
    failpoints.arm("")
    assert len(on_disk(store)) == 3
    assert store.sweep_temporaries("step-1", 3600) == 0
    store.remove_folder("step-1")
    assert store.list_folders() == ["step-1"]  # young: may be a create in flight
    for name in os.listdir(store.path_of("step-1")):
        os.utime(store.path_of(f"step-1/{name}"), (1e9, 1e9))
    store.create("step-1/data", b"x")
    store.remove_folder("step-1")
    assert len(on_disk(store)) == 4  # not the folder's only content: left alone
    assert store.sweep_temporaries("step-1", 3600) == 3
    assert on_disk(store) == ["data"]


def test_old_litter_does_not_keep_a_folder(store: PosixStore) -> None:
    store.make_folder("step-1")
    temp = Path(store.path_of("step-1/.tmp-1-00"))
    temp.write_bytes(b"half")
    os.utime(temp, (1e9, 1e9))
    store.remove_folder("step-1")
    assert store.list_folders() == []


# -- races


@pytest.mark.parametrize("turn", range(5))
def test_racing_processes_create_one_name(store: PosixStore, turn: int) -> None:
    contents = [bytes([65 + i]) * 20_000 for i in range(6)]
    ready, go = os.pipe()
    children = []
    for content in contents:
        child = os.fork()
        if child == 0:
            code = 9
            try:
                os.close(go)
                os.read(ready, 1)  # returns when the parent closes its end
                store.create(NAME, content)
                code = 0
            except AlreadyExists:
                code = 3
            finally:
                os._exit(code)
        children.append(child)
    os.close(go)
    codes = [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children]
    os.close(ready)
    assert sorted(codes) == [0] + [3] * 5
    assert store.read(NAME) == contents[codes.index(0)]
    assert on_disk(store) == ["manifest.json"]


def test_listing_while_files_come_and_go(store: PosixStore) -> None:
    store.create("keep/file", b"x")
    stop = threading.Event()
    errors: list[BaseException] = []

    def churn() -> None:
        try:
            while not stop.is_set():
                store.replace("f/g/a", b"x")
                store.delete("f/g/a")
                store.remove_folder("f/g")
                store.remove_folder("f")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(200):
            found = names(store)
            assert set(found) <= {"keep/file", "f/g/a"}
            assert "keep/file" in found
            assert set(store.list_folders()) <= {"keep", "f"}
    finally:
        stop.set()
        thread.join(60)
    assert errors == []


def abort_it(writer: Writer) -> None:
    writer.abort()


def fail_it(writer: Writer) -> None:
    with pytest.raises(StoreError):
        writer.write_at(99, memoryview(b"outside"))


def commit_it(writer: Writer) -> None:
    with pytest.raises(StoreError) as caught:
        writer.commit()
    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize("end", [abort_it, fail_it, commit_it])
def test_ended_while_another_thread_writes(store: PosixStore, end: Callable[[Writer], None]) -> None:
    """The descriptor must not be closed (and its number reused) under a running write."""
    started, release = threading.Event(), threading.Event()
    writer = store.open_writer(SHARD, 10)
    pwrite = os.pwrite
    wrote: list[int] = []

    def slow(fd: int, data: memoryview, offset: int) -> int:
        started.set()
        release.wait(30)
        wrote.append(pwrite(fd, data, offset))
        return wrote[-1]

    os.pwrite = slow  # type: ignore[assignment]
    try:
        thread = threading.Thread(target=lambda: writer.write_at(0, memoryview(b"0123456789")))
        thread.start()
        assert started.wait(30)
        end(writer)
        assert on_disk(store) == ["shard"]
        release.set()
        thread.join(30)
    finally:
        release.set()
        os.pwrite = pwrite
    assert wrote == [10]
    assert on_disk(store) == []
    with pytest.raises(StoreError, match="dead"):
        writer.commit()


def test_abort_leaves_a_file_that_took_the_name(store: PosixStore) -> None:
    writer = store.open_writer(SHARD, 10)
    store.delete(SHARD)
    store.create(SHARD, b"somebody else's")
    writer.abort()
    assert store.read(SHARD) == b"somebody else's"
