"""The POSIX store on full disks, with short writes, and what it finds out about a disk."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from posix_support import (
    DATA,
    NAME,
    SHARD,
    Injector,
    in_child,
    on_disk,
    open_descriptors,
    small_file_system,
    write,
)

from distckpt import failpoints
from distckpt.errors import StoreError
from distckpt.storage import PosixStore
from distckpt.storage.facts import posix_facts


@pytest.fixture(autouse=True)
def disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.fixture
def store(tmp_path: Path) -> PosixStore:
    return PosixStore(tmp_path / "root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[PosixStore]:
    with small_file_system(tmp_path) as store:
        yield store


# -- short writes, full disks


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_short_writes_and_reads(store: PosixStore, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:step], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:step]], offset))
    store.create(NAME, DATA)
    write(store, SHARD, DATA)
    assert store.read(NAME) == store.read(SHARD) == DATA


def test_write_that_makes_no_progress_is_an_error(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(StoreError) as caught:
        store.create(NAME, DATA)
    assert caught.value.errno == errno.EIO


def test_file_cut_short_while_it_is_read(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create(NAME, DATA)
    preadv = os.preadv

    def cut(fd: int, views: list[memoryview], offset: int) -> int:
        os.truncate(store.path_of(NAME), 100)
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(StoreError) as caught:
        store.read(NAME)
    assert caught.value.errno == errno.ENODATA


def test_stale_handle_is_opened_again(store: PosixStore) -> None:
    store.create(NAME, DATA)
    with Injector("preadv", 1, errno.ESTALE, forever=False).active():
        assert store.read(NAME) == DATA
    with Injector("preadv", 1, errno.ESTALE, forever=True).active() as injector, pytest.raises(StoreError):
        store.read(NAME)
    assert injector.calls == 3


def test_full_disk_is_known_before_the_first_byte(small_disk: PosixStore) -> None:
    before = open_descriptors()
    with pytest.raises(StoreError) as caught:
        small_disk.open_writer("shard", 2 << 20)
    assert caught.value.errno == errno.ENOSPC
    assert small_disk.path_of("shard") in str(caught.value)
    assert "free some space" in str(caught.value)
    assert on_disk(small_disk) == []
    assert open_descriptors() == before
    write(small_disk, "shard", b"x" * (1 << 19))


def test_full_disk_without_fallocate(small_disk: PosixStore) -> None:
    """Then the kernel writes short first, and says so only on the next call."""
    with Injector("posix_fallocate", 1, errno.EOPNOTSUPP, forever=True).active():
        writer = small_disk.open_writer("shard", 2 << 20)
        with pytest.raises(StoreError) as caught:
            writer.write_at(0, memoryview(bytes(2 << 20)))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(StoreError, match="dead"):
        writer.commit()
    assert on_disk(small_disk) == []
    write(small_disk, "shard", b"x" * (1 << 19))


def test_full_disk_in_create_and_replace(small_disk: PosixStore) -> None:
    small_disk.replace("beat", b"old")
    for call in (small_disk.create, small_disk.replace):
        with pytest.raises(StoreError) as caught:
            call("beat2" if call == small_disk.create else "beat", bytes(2 << 20))
        assert caught.value.errno == errno.ENOSPC
    assert small_disk.read("beat") == b"old"
    assert on_disk(small_disk) == ["beat"]
    small_disk.create("beat2", b"fits")


def test_file_size_limit(store: PosixStore) -> None:
    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for call in (lambda: store.create("m", bytes(200_000)), lambda: store.open_writer("s", 200_000)):
            with pytest.raises(StoreError) as caught:
                call()
            assert caught.value.errno == errno.EFBIG
        fallocate = Injector("posix_fallocate", 1, errno.EINVAL, forever=True)
        with fallocate.active(), pytest.raises(StoreError):
            store.open_writer("s", 200_000)
        store.create("m", bytes(50_000))

    assert in_child(child) == 0
    assert on_disk(store) == ["m"]


# -- facts


def test_facts(tmp_path: Path, small_disk: PosixStore) -> None:
    facts = posix_facts(small_disk.root)
    assert facts["fs_type"] == "tmpfs"
    assert facts["mount_point"] == os.path.realpath(small_disk.root)
    assert facts["volatile"] is True
    assert facts["writable"] is facts["hard_links"] is facts["folder_sync"] is True
    assert facts["total_bytes"] == 1 << 20
    assert 0 < int(str(facts["free_bytes"])) <= 1 << 20
    assert on_disk(small_disk) == []
    subprocess.run(["mount", "-o", "remount,ro", small_disk.root], check=True)
    assert posix_facts(small_disk.root)["writable"] is False
    with pytest.raises(StoreError) as caught:
        small_disk.create("a", b"x")
    assert caught.value.errno == errno.EROFS


def test_facts_of_a_root_that_is_not_there_yet(tmp_path: Path) -> None:
    facts = posix_facts(tmp_path / "not" / "yet")
    assert facts["path"] == os.path.realpath(tmp_path)
    assert isinstance(facts["direct_io"], bool)
    assert os.listdir(tmp_path) == []
