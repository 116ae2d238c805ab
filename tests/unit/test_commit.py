"""The commit: what each error while publishing means, and that nothing but the manifest makes a step exist."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from builders import build_checkpoint, prepare

from distckpt import failpoints
from distckpt.errors import AlreadyExists, CommitInDoubt, NotFound, SaveFailed, StaleGeneration, StoreError
from distckpt.format import names
from distckpt.format.commit import begin_attempt, commit, is_committed
from distckpt.format.lineage import create_generation, list_committed, read_manifest
from distckpt.format.manifest import encode_manifest
from distckpt.storage.base import Store
from distckpt.storage.memory import MemoryStore
from distckpt.storage.posix import PosixStore

PATH = "step-0000000100/manifest-g000001.json"


@pytest.fixture(params=["memory", "posix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else PosixStore(tmp_path / "root")


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


class Faulty(MemoryStore):
    """A memory store whose ``create``, ``read`` and ``sync_folder`` can be told what to do for manifests."""

    def __init__(self) -> None:
        super().__init__("faulty")
        self.on_create: Callable[[str, bytes], None] | None = None
        self.on_read: Callable[[str], None] | None = None
        self.on_sync: Callable[[str], None] | None = None

    def create(self, name: str, data: bytes) -> None:
        if self.on_create is not None and "manifest-" in name:
            return self.on_create(name, data)
        return super().create(name, data)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        if self.on_read is not None and "manifest-" in name:
            self.on_read(name)
        return super().read(name, offset, size)

    def sync_folder(self, name: str) -> None:
        if self.on_sync is not None:
            self.on_sync(name)
        super().sync_folder(name)


def broken(*_: object) -> None:
    raise StoreError(errno.EIO, "broken", "somewhere")


def test_begin_attempt_is_exclusive(store: Store) -> None:
    attempt = begin_attempt(store, step=100, generation=3, nonce="1a2b3c4d")
    assert attempt == "g000003-1a2b3c4d"
    assert store.list_folders("step-0000000100") == [attempt]
    assert list_committed(store) == []
    with pytest.raises(AlreadyExists):
        begin_attempt(store, step=100, generation=3, nonce="1a2b3c4d")
    begin_attempt(store, step=100, generation=3, nonce="00000000")


def test_only_the_manifest_makes_it_exist(store: Store) -> None:
    manifest = prepare(store, 100)
    assert list_committed(store) == []
    assert not is_committed(store, 100, 1, manifest.save_id)
    assert commit(store, manifest) == PATH
    (found,) = list_committed(store)
    assert read_manifest(store, found) == manifest
    assert is_committed(store, 100, 1, manifest.save_id)
    assert not is_committed(store, 100, 1, "another save")
    assert not is_committed(store, 100, 2, manifest.save_id)


def test_committing_the_same_bytes_twice_is_one_commit(store: Store) -> None:
    manifest = prepare(store, 100)
    assert commit(store, manifest) == commit(store, manifest)
    assert len(list_committed(store)) == 1


def test_another_save_of_the_step_loses_and_learns_who_won(store: Store) -> None:
    winner, loser = prepare(store, 100), prepare(store, 100)
    commit(store, winner)
    with pytest.raises(SaveFailed, match=winner.save_id):
        commit(store, loser)
    assert not is_committed(store, 100, 1, loser.save_id)
    # Another generation's commit of the same step stands beside it.
    commit(store, prepare(store, 100, generation=2))
    assert [c.generation for c in list_committed(store)] == [1, 2]


def test_of_racing_commits_one_wins(store: Store) -> None:
    manifests = [prepare(store, 100, tensors={}) for _ in range(6)]
    barrier = threading.Barrier(len(manifests))
    won: list[str] = []
    lost: list[SaveFailed] = []

    def run(index: int) -> None:
        barrier.wait()
        try:
            commit(store, manifests[index])
            won.append(manifests[index].save_id)
        except SaveFailed as error:
            lost.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(manifests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == len(manifests) - 1
    assert is_committed(store, 100, 1, won[0])


def test_something_unreadable_under_the_name_is_never_replaced(store: Store) -> None:
    manifest = prepare(store, 100)
    store.create(PATH, b"torn")
    with pytest.raises(SaveFailed, match="unreadable"):
        commit(store, manifest)
    assert store.read(PATH) == b"torn"
    assert not is_committed(store, 100, 1, manifest.save_id)


def test_a_newer_job_fences_an_older_one(store: Store) -> None:
    create_generation(store, resumed_from=None)
    manifest = prepare(store, 100)
    create_generation(store, resumed_from=None, host="node7", owner="alice")
    with pytest.raises(StaleGeneration, match=r"generation 2.*node7.*alice"):
        commit(store, manifest)
    assert list_committed(store) == []
    commit(store, manifest, check_fencing=False)
    commit(store, prepare(store, 100, generation=2))


def test_lost_reply_is_a_commit() -> None:
    store = Faulty()
    manifest = prepare(store, 100)

    def stored_and_lost(name: str, data: bytes) -> None:
        MemoryStore.create(store, name, data)
        raise StoreError(errno.ECONNRESET, "reply lost", name)

    store.on_create = stored_and_lost
    assert commit(store, manifest) == PATH
    assert is_committed(store, 100, 1, manifest.save_id)


@pytest.mark.parametrize("kind", [StoreError, AlreadyExists])
def test_nothing_stored_raises_the_stores_error(kind: type[StoreError]) -> None:
    """An answer of "exists" where nothing is stored (a 409) is no commit and no loss either."""
    store = Faulty()
    manifest = prepare(store, 100)

    def refuse(name: str, data: bytes) -> None:
        raise kind(errno.EEXIST, "refused", name)

    store.on_create = refuse
    with pytest.raises(kind, match="refused"):
        commit(store, manifest)
    assert list_committed(store) == []
    store.on_create = None
    commit(store, manifest)


def test_exists_with_our_own_bytes_is_a_commit() -> None:
    store = Faulty()
    manifest = prepare(store, 100)

    def exists(name: str, data: bytes) -> None:
        MemoryStore.create(store, name, data)
        raise AlreadyExists(errno.EEXIST, "exists", name)

    store.on_create = exists
    assert commit(store, manifest) == PATH


def test_unreadable_afterwards_is_doubt() -> None:
    store = Faulty()
    manifest = prepare(store, 100)
    store.on_create, store.on_read = broken, broken
    with pytest.raises(CommitInDoubt, match="unknown"):
        commit(store, manifest)
    MemoryStore.create(store, PATH, encode_manifest(manifest))
    with pytest.raises(StoreError):
        is_committed(store, 100, 1, manifest.save_id)


def test_visible_but_not_durable_is_doubt() -> None:
    """The folder's fsync failed after the link: readers may see the commit, but it must not be acknowledged."""
    store = Faulty()
    manifest = prepare(store, 100)

    def linked(name: str, data: bytes) -> None:
        MemoryStore.create(store, name, data)
        raise StoreError(errno.EIO, "fsync of the folder", name)

    store.on_create, store.on_sync = linked, broken
    with pytest.raises(CommitInDoubt, match="durable"):
        commit(store, manifest)
    assert is_committed(store, 100, 1, manifest.save_id)


@pytest.mark.parametrize(
    "point", ["commit.before_manifest", "create.before_temp", "create.linked", "commit.after_manifest"]
)
def test_an_error_at_each_point_is_answered_by_storage(store: Store, point: str) -> None:
    manifest = prepare(store, 100)
    failpoints.arm(f"{point}:1:raise=EIO")
    stored = point in ("create.linked", "commit.after_manifest")
    if stored:
        assert commit(store, manifest) == PATH
    else:
        with pytest.raises(OSError, match="failpoint"):
            commit(store, manifest)
    assert is_committed(store, 100, 1, manifest.save_id) is stored
    # Whatever happened, the same commit can be tried again.
    failpoints.arm("")
    assert commit(store, manifest) == PATH


def test_failpoints_are_passed_in_order(store: Store) -> None:
    manifest = prepare(store, 100)
    trace = failpoints.record()
    commit(store, manifest)
    hits = [hit for hit in trace if hit.startswith(("commit.", "create.linked"))]
    assert hits == [f"commit.before_manifest@{PATH}", f"create.linked@{PATH}", f"commit.after_manifest@{PATH}"]


def test_a_manifest_that_readers_would_refuse_is_not_written(store: Store) -> None:
    manifest = msgspec.structs.replace(prepare(store, 100), world_size=0)
    with pytest.raises(Exception, match="world_size"):
        commit(store, manifest)
    assert list_committed(store) == []


def test_posix_commit_syncs_every_folder(tmp_path: Path) -> None:
    store = PosixStore(tmp_path / "root")
    manifest = prepare(store, 100)
    before = store.counters.copy()
    commit(store, manifest)
    assert store.counters["folder_syncs"] - before["folder_syncs"] >= 2  # step folder and root
    assert store.counters["fsyncs"] - before["fsyncs"] == 1  # the manifest


def test_reading_a_manifest_checks_its_name(store: Store) -> None:
    committed = build_checkpoint(store, 100)
    data = store.read(committed.manifest_path)
    moved = f"step-0000000200/{names.manifest_name(1)}"
    store.create(moved, data)
    assert not is_committed(store, 200, 1, read_manifest(store, committed).save_id)
    with pytest.raises(NotFound):
        store.size("step-0000000200/manifest-g000002.json")
    assert data == encode_manifest(read_manifest(store, committed))
