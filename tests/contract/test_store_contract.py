"""The contract on each store, and random sequences of calls against a model of dict and set."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from store_contract import StoreContract, names, write

from distckpt.errors import AlreadyExists, ConfigError, NotFound, StoreError
from distckpt.storage import MemoryStore, PosixStore, Store, open_store
from distckpt.storage.memory import forget


class TestPosixStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return PosixStore(tmp_path / "not" / "yet" / "there")


class TestPosixStoreWithoutHardLinks(StoreContract):
    """As on some FUSE mounts: link() is refused, so ``create`` writes under the final name."""

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        return PosixStore(tmp_path)

    def test_racing_creates_of_the_same_bytes_all_succeed(self, store: Store) -> None:
        pytest.skip("a loser may meet the winner's half-written file here, and says AlreadyExists")

    def test_counters(self, store: Store) -> None:
        store.create("a", b"12345")
        assert store.counters["creates"] == 1
        assert store.counters["bytes_written"] == 10  # once under the temporary name, once under its own


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestObjectStore(StoreContract):
    """Against a local S3 server, below a prefix."""

    strict_tree = False

    @pytest.fixture
    def store(self, bucket: str) -> Store:
        return open_store(f"s3://{bucket}/runs/a b/")

    def test_counters(self, store: Store) -> None:
        store.create("a/b", b"12345")
        write(store, "a/c", b"123")
        store.read("a/b", 1, 2)
        store.read_into("a/b", 0, memoryview(bytearray(4)))
        list(store.list())
        store.list_folders()
        store.delete("a/b")
        store.delete("a/b")  # the service does not say that there was nothing
        counted = {name: store.counters[name] for name in ("creates", "opens", "lists", "deletes")}
        assert counted == {"creates": 2, "opens": 2, "lists": 2, "deletes": 2}
        assert (store.counters["bytes_written"], store.counters["bytes_read"]) == (8, 6)


FILES = st.sampled_from(["a", "b", "f/a", "f/b", "f/g/a", "h/a", "f"])
FOLDERS = st.sampled_from(["f", "f/g", "h", "a", "e/e"])
CONTENT = st.sampled_from([b"", b"one", b"two!", b"x" * 5000])


class StoreMachine(RuleBasedStateMachine):
    """Runs the same calls on a store and on a model; subclasses give the store."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.folders: set[str] = set()

    def above(self, name: str) -> list[str]:
        parts = name.split("/")
        return ["/".join(parts[:end]) for end in range(1, len(parts))]

    def expected_error(self, name: str, *, same: bytes | None = None) -> type[StoreError] | None:
        if any(folder in self.files for folder in self.above(name)):
            return StoreError
        if name in self.folders or (name in self.files and self.files[name] != same):
            return AlreadyExists
        return None

    def put(self, name: str, data: bytes) -> None:
        self.folders |= set(self.above(name))
        self.files[name] = data

    def made_before_failing(self, name: str) -> None:
        """Folders above a refused name may have been made on the way: only up to the file in the way."""
        for folder in self.above(name):
            if folder in self.files:
                return
            self.folders.add(folder)

    @rule(name=FILES, data=CONTENT)
    def create(self, name: str, data: bytes) -> None:
        error = self.expected_error(name, same=data)
        if error is None:
            self.store.create(name, data)
            self.put(name, data)
        else:
            with pytest.raises(error):
                self.store.create(name, data)
            self.made_before_failing(name)

    @rule(name=FILES, data=CONTENT, finish=st.booleans())
    def write(self, name: str, data: bytes, finish: bool) -> None:
        error = self.expected_error(name)
        if error is not None:
            with pytest.raises(error):
                self.store.open_writer(name, len(data))
            self.made_before_failing(name)
            return
        writer = self.store.open_writer(name, len(data))
        half = len(data) // 2
        writer.write_at(half, memoryview(data)[half:])
        if finish:
            writer.write_at(0, memoryview(data)[:half])
            writer.commit()
            self.put(name, data)
        else:
            writer.abort()
            self.folders |= set(self.above(name))

    @rule(name=FILES, data=CONTENT)
    def replace(self, name: str, data: bytes) -> None:
        if name in self.folders or any(folder in self.files for folder in self.above(name)):
            with pytest.raises(StoreError):
                self.store.replace(name, data)
            self.made_before_failing(name)
        else:
            self.store.replace(name, data)
            self.put(name, data)

    @rule(name=FILES, offset=st.integers(0, 6), size=st.none() | st.integers(0, 6))
    def read(self, name: str, offset: int, size: int | None) -> None:
        if name not in self.files:
            with pytest.raises(NotFound):
                self.store.read(name, offset, size)
            return
        data = self.files[name]
        if offset + (size or 0) > len(data):
            with pytest.raises(StoreError):
                self.store.read(name, offset, size)
        else:
            end = len(data) if size is None else offset + size
            assert self.store.read(name, offset, size) == data[offset:end]

    @rule(name=FILES)
    def delete(self, name: str) -> None:
        if name in self.folders:
            with pytest.raises(StoreError):
                self.store.delete(name)
        else:
            self.store.delete(name)
            self.files.pop(name, None)

    @rule(name=FOLDERS, exclusive=st.booleans())
    def make_folder(self, name: str, exclusive: bool) -> None:
        refused = any(folder in self.files for folder in self.above(name))
        if refused or name in self.files or (exclusive and name in self.folders):
            with pytest.raises(StoreError if refused else AlreadyExists):
                self.store.make_folder(name, exclusive=exclusive)
            self.made_before_failing(name)
        else:
            self.store.make_folder(name, exclusive=exclusive)
            self.folders |= {name, *self.above(name)}

    @rule(name=FOLDERS)
    def remove_folder(self, name: str) -> None:
        self.store.remove_folder(name)
        if not any(other.startswith(name + "/") for other in (*self.files, *self.folders)):
            self.folders.discard(name)

    @invariant()
    def same_files(self) -> None:
        assert {e.name: e.size for e in self.store.list()} == {n: len(d) for n, d in self.files.items()}
        assert all(self.store.read(name) == data for name, data in self.files.items())

    @invariant()
    def same_folders(self) -> None:
        for top in ("", "f", "e", "a"):
            prefix = f"{top}/" if top else ""
            below = {n[len(prefix) :] for n in self.folders if n.startswith(prefix)}
            assert list(self.store.list_folders(top)) == sorted(n for n in below if "/" not in n)


class MemoryMachine(StoreMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()


class PosixMachine(StoreMachine):
    def __init__(self) -> None:
        super().__init__()
        in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # its fsync is free
        self.root = tempfile.mkdtemp(dir=in_memory)
        self.store = PosixStore(self.root)

    def teardown(self) -> None:
        left = [n for _, _, found in os.walk(self.root) for n in found if n.startswith(".tmp-")]
        shutil.rmtree(self.root)
        assert left == []


few = settings(max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
TestMemoryModel = MemoryMachine.TestCase
TestMemoryModel.settings = few
TestPosixModel = PosixMachine.TestCase
TestPosixModel.settings = few


# -- open_store


@pytest.fixture
def shared_name() -> Iterator[str]:
    yield "contract/run"
    forget("contract/run")


def test_open_store_takes_paths_and_file_urls(tmp_path: Path) -> None:
    folder = tmp_path / "a b%20#?ü"
    PosixStore(folder).create("x", b"1")
    for location in (folder, str(folder), folder.as_uri(), PosixStore(folder).url):
        store = open_store(location)
        assert isinstance(store, PosixStore)
        assert store.read("x") == b"1"
        assert store.root == str(folder)


def test_open_store_of_a_relative_path_stays_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("run")
    monkeypatch.chdir("/")
    store.create("x", b"1")
    assert (tmp_path / "run" / "x").read_bytes() == b"1"


def test_a_url_that_lost_a_slash_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="two slashes"):
        open_store(Path("s3://bucket/run"))
    assert list(tmp_path.iterdir()) == []


def test_open_store_touches_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "run")
    assert names(store) == []
    assert list(tmp_path.iterdir()) == []


def test_memory_stores_are_shared_by_name(shared_name: str) -> None:
    store = open_store(f"memory://{shared_name}")
    store.create("a", b"x")
    assert open_store(f"memory://{shared_name}/").read("a") == b"x"
    assert names(open_store("memory://contract/other")) == []
    forget("contract/other")


@pytest.mark.parametrize(
    "url",
    ["", "ftp://host/x", "file://host/x", "file://", "memory://", "a\0b", "s3://", "s3:///x", "s3:/b/x", "gs://b/a//b",
     "az://b/../x", "s3://b/x?region=y", "s3://key:secret@b/x"],
)  # fmt: skip
def test_open_store_refuses(url: str) -> None:
    with pytest.raises(ConfigError):
        open_store(url)
