"""The POSIX store when system calls fail: each call in turn, fsync, link."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from posix_support import (
    DATA,
    NAME,
    SHARD,
    Injector,
    names,
    on_disk,
    open_descriptors,
    write,
)

from distckpt import failpoints
from distckpt.errors import StoreError
from distckpt.storage import PosixStore


@pytest.fixture(autouse=True)
def disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.fixture
def store(tmp_path: Path) -> PosixStore:
    return PosixStore(tmp_path / "root")


CALLS = [
    "open",
    "mkdir",
    "pwrite",
    "fsync",
    "close",
    "link",
    "unlink",
    "posix_fallocate",
    "fstat",
    "stat",
    "dup",
]


@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EPERM])
@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("operation", ["create", "write"])
def test_nth_call_fails(tmp_path: Path, operation: str, function: str, code: int, forever: bool) -> None:
    """Whatever fails: success or a StoreError, never torn bytes under a name, and the next try works."""
    for nth in range(1, 60):
        store = PosixStore(tmp_path / f"root{nth}")
        name = NAME if operation == "create" else SHARD
        before = open_descriptors()
        caught: StoreError | None = None
        with Injector(function, nth, code, forever=forever).active() as injector:
            try:
                if operation == "create":
                    store.create(name, DATA)
                else:
                    write(store, name, DATA)
            except StoreError as error:
                caught = error
        assert open_descriptors() == before
        if caught is not None:
            assert caught.errno == code or function in ("posix_fallocate", "link")
            assert caught.filename
        if caught is None:
            assert store.read(name) == DATA
        elif operation == "create":
            if name in names(store):
                assert store.read(name) == DATA
            store.create(name, DATA)  # in doubt or not, asking again settles it
            assert store.read(name) == DATA
            assert names(store) == [name]
        elif name in names(store):  # left over: whole, unless removing it is what failed
            assert function in ("unlink", "stat", "fstat") or store.read(name) == DATA
        else:
            write(store, name, DATA)
            assert store.read(name) == DATA
        if not injector.fired:
            assert caught is None
            return
    pytest.fail("the operation never ran to its end")


def test_without_fallocate_the_file_is_truncated_to_size(store: PosixStore) -> None:
    for code in (errno.EOPNOTSUPP, errno.EINVAL):
        with Injector("posix_fallocate", 1, code, forever=True).active() as injector:
            write(store, f"a{code}", DATA)
        assert injector.fired
        assert store.read(f"a{code}") == DATA


# -- fsync


def test_fsync_error_ends_the_writer_for_good(store: PosixStore) -> None:
    writer = store.open_writer(SHARD, len(DATA))
    writer.write_at(0, memoryview(DATA))
    with Injector("fsync", 1, errno.EIO, forever=False).active() as injector:
        with pytest.raises(StoreError) as caught:
            writer.commit()
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == store.path_of(SHARD)
        assert "commit" in str(caught.value)
        for call in (writer.commit, lambda: writer.write_at(0, memoryview(b"x"))):
            with pytest.raises(StoreError, match="dead"):
                call()
        writer.abort()
        assert injector.calls == 1  # a second fsync would have answered 0, and lied
    assert names(store) == on_disk(store) == []
    write(store, SHARD, DATA)


def test_fsync_error_in_create_publishes_nothing(store: PosixStore) -> None:
    store.make_folder("step-1")
    with Injector("fsync", 1, errno.EIO, forever=False).active() as injector:
        with pytest.raises(StoreError) as caught:
            store.create(NAME, DATA)
        assert injector.calls == 1
    assert caught.value.errno == errno.EIO
    assert on_disk(store) == []


def test_folder_fsync_error_is_not_an_acknowledgement(store: PosixStore) -> None:
    store.make_folder("step-1")
    with Injector("fsync", 2, errno.EIO, forever=False).active(), pytest.raises(StoreError):
        store.create(NAME, DATA)
    assert on_disk(store) == ["manifest.json"]  # visible, yet not promised: the caller asks again
    before = store.counters["folder_syncs"]
    store.create(NAME, DATA)
    assert store.counters["folder_syncs"] == before + 2


def test_every_folder_up_to_the_root_is_synced(store: PosixStore) -> None:
    store.make_folder("")
    before = store.counters["folder_syncs"]
    store.create("a/b/c", b"x")
    # Made: a in the root, b in a. Then b, a and the root once more.
    assert store.counters["folder_syncs"] == before + 2 + 3
    before = store.counters["folder_syncs"]
    store.create("a/b/d", b"x")
    assert store.counters["folder_syncs"] == before + 3


# -- lost replies


def test_link_that_worked_but_said_no(store: PosixStore) -> None:
    failpoints.arm("create.linked:1:raise=EIO")
    store.create(NAME, DATA)
    assert store.read(NAME) == DATA
    assert on_disk(store) == ["manifest.json"]


def test_link_count_settles_it_where_the_name_cannot_be_read(store: PosixStore) -> None:
    failpoints.arm("create.linked:1:raise=EIO")
    with Injector("preadv", 1, errno.EIO, forever=True).active():
        store.create(NAME, DATA)
    assert store.read(NAME) == DATA


def test_failure_without_hard_links_leaves_no_torn_file(store: PosixStore) -> None:
    store.make_folder("step-1")
    link = Injector("link", 1, errno.EPERM, forever=True)
    fsync = Injector("fsync", 2, errno.EIO, forever=False)  # the first is of the temporary file
    with link.active(), fsync.active(), pytest.raises(StoreError) as caught:
        store.create(NAME, DATA)
    assert link.fired
    assert caught.value.errno == errno.EIO
    assert on_disk(store) == []
    store.create(NAME, DATA)


def test_link_repeated_by_the_server(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(*args: Any, **kwargs: Any) -> None:
        link(*args, **kwargs)
        link(*args, **kwargs)  # EEXIST: our own

    monkeypatch.setattr(os, "link", twice)
    store.create(NAME, DATA)
    assert store.read(NAME) == DATA
