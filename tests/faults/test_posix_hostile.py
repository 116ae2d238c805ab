"""The POSIX store in hostile and odd folders: links, FIFOs, modes, names."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from posix_support import (
    NAME,
    SHARD,
    in_child,
    names,
    write,
)

from distckpt.errors import AlreadyExists, NotFound, StoreError
from distckpt.storage import PosixStore


@pytest.fixture
def store(tmp_path: Path) -> PosixStore:
    return PosixStore(tmp_path / "root")


# -- hostile and odd folders


@pytest.fixture
def outside(tmp_path: Path, store: PosixStore) -> Path:
    """A folder outside the root, with links to it and to its file inside the root."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(b"secret")
    store.create("real/file", b"x")
    os.symlink(folder, store.path_of("link"))
    os.symlink(folder / "secret", store.path_of("real/secret"))
    os.symlink(folder / "absent", store.path_of("real/dangling"))
    return folder


def test_links_inside_the_root_are_never_followed(store: PosixStore, outside: Path) -> None:
    for name in ("link/secret", "real/secret", "real/dangling", "link"):
        for read in (store.read, store.size, lambda n: store.read_into(n, 0, memoryview(bytearray(1)))):
            with pytest.raises(NotFound):
                read(name)
        for call in (lambda n: store.create(n, b"evil"), lambda n: store.open_writer(n, 4)):
            with pytest.raises(StoreError):
                call(name)
    for call in (
        lambda: store.create("link/new", b"x"),
        lambda: store.open_writer("link/new", 1),
        lambda: store.replace("link/secret", b"x"),
        lambda: store.make_folder("link/new"),
        lambda: store.make_folder("link"),
        lambda: store.sync_folder("link"),
    ):
        with pytest.raises(StoreError):
            call()
    store.delete("link/secret")
    store.remove_folder("link")
    assert names(store) == ["real/file"]
    assert names(PosixStore(store.path_of("real"))) == ["file"]
    assert store.list_folders() == ["real"]
    assert list(store.list("link")) == list(store.list_folders("link")) == []
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"secret": b"secret"}


def test_delete_and_replace_act_on_the_link_itself(store: PosixStore, outside: Path) -> None:
    store.replace("real/secret", b"hint")
    store.delete("link")
    store.delete("real/dangling")
    assert (outside / "secret").read_bytes() == b"secret"
    assert names(store) == ["real/file", "real/secret"]


def test_fifo_and_folder_in_a_files_place(store: PosixStore) -> None:
    store.make_folder("folder")
    os.mkfifo(store.path_of("fifo"))  # opening it without O_NONBLOCK would hang here
    for name in ("fifo", "folder"):
        with pytest.raises(NotFound):
            store.read(name)
        with pytest.raises(NotFound):
            store.size(name)
        with pytest.raises(AlreadyExists):
            store.create(name, b"x")
        with pytest.raises(AlreadyExists):
            store.open_writer(name, 1)
        with pytest.raises(StoreError):
            store.delete(name)
    assert names(store) == []
    assert store.list_folders() == ["folder"]


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "root")
    store = PosixStore(tmp_path / "root")
    store.create("a/b", b"x")
    assert (tmp_path / "real" / "a" / "b").read_bytes() == b"x"
    assert names(store) == ["a/b"]


def test_root_is_a_dangling_link_or_a_file(tmp_path: Path) -> None:
    os.symlink(tmp_path / "absent", tmp_path / "dangling")
    (tmp_path / "file").write_bytes(b"x")
    for root in ("dangling", "file"):
        with pytest.raises(StoreError) as caught:
            PosixStore(tmp_path / root).create("a", b"x")
        assert root in str(caught.value)


def test_names_that_are_no_utf8_are_listed_and_read(store: PosixStore) -> None:
    store.create("a", b"x")
    Path(os.fsdecode(os.fsencode(store.root) + b"/\xff")).write_bytes(b"y")
    assert [os.fsencode(name) for name in names(store)] == [b"a", b"\xff"]
    assert store.read(names(store)[1]) == b"y"


def test_files_have_the_modes_of_the_umask(store: PosixStore) -> None:
    def child() -> None:
        os.umask(0o077)
        store.create(NAME, b"x")
        write(store, SHARD, b"x")

    assert in_child(child) == 0
    for name, mode in [(NAME, 0o600), (SHARD, 0o600), ("step-1", 0o700)]:
        assert os.stat(store.path_of(name)).st_mode & 0o777 == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_unreadable_is_not_absent() -> None:
    """A folder that cannot be read must not look like an empty one: a job would start afresh."""
    store = PosixStore(tempfile.mkdtemp())  # not below pytest's folder, which other users cannot enter
    store.create(NAME, b"x")
    os.chmod(store.root, 0o755)
    os.chmod(store.path_of("step-1"), 0)

    def child() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        assert store.list_folders() == ["step-1"]
        for call in (
            lambda: list(store.list()),
            lambda: store.read(NAME),
            lambda: store.list_folders("step-1"),
        ):
            with pytest.raises(StoreError) as caught:
                call()
            assert caught.value.errno == errno.EACCES
            assert not isinstance(caught.value, NotFound)

    try:
        assert in_child(child) == 0
    finally:
        shutil.rmtree(store.root)
