"""Removal: orphans, strangers, and whatever is in doubt, which stays."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import prepare, shard_paths
from collecting import DAY, all_whole, collected, files, later, orphan, steps

from distckpt import failpoints
from distckpt.errors import StoreError
from distckpt.format import names
from distckpt.format.commit import commit
from distckpt.format.digest import digest
from distckpt.format.lineage import create_generation, list_committed
from distckpt.format.verify import verify
from distckpt.manager import gc
from distckpt.manager.gc import take_snapshot
from distckpt.manager.gc_plan import plan_gc
from distckpt.storage.base import Store
from distckpt.storage.memory import MemoryStore
from distckpt.storage.posix import PosixStore


@pytest.fixture(params=["memory", "posix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else PosixStore(tmp_path / "root")


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_orphans_go_when_old_and_of_an_older_job(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    steps(store, 100, 300, generation=3)
    old, current = orphan(store, 200, 1), orphan(store, 250, 3)
    beside = orphan(store, 300, 2)
    before = files(store)
    report = collected(store, [], current_generation=3)
    assert report.orphans_removed == ()
    assert files(store) == before
    assert "grace" in report.reasons[old]
    assert "running job" in report.reasons[current]
    later(monkeypatch, store, DAY + 60)
    report = collected(store, [], current_generation=3)
    assert report.orphans_removed == (old, beside)
    assert before - files(store) == {n for n in before if n.startswith((old, beside))}
    assert "step-0000000200" not in store.list_folders("")
    assert report.kept == (current,)
    assert all_whole(store)


def test_an_orphan_that_is_committed_meanwhile_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    steps(store, 300, generation=2)
    manifest = prepare(store, 200, 1)
    later(monkeypatch, store, 2 * DAY)

    def committing_plan(*args: object, **options: object) -> object:
        plan = plan_gc(*args, **options)  # type: ignore[arg-type]
        commit(store, manifest, check_fencing=False)
        return plan

    monkeypatch.setattr(gc, "plan_gc", committing_plan)
    report = collected(store, [], current_generation=2)
    assert report.orphans_removed == ()
    assert f"step-0000000200/{manifest.attempt}" in report.reasons
    assert all_whole(store)
    assert len(list_committed(store)) == 2


def test_age_is_counted_by_the_newest_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    steps(store, 300, generation=2)
    folder = orphan(store, 200, 1)
    snapshot = take_snapshot(store)
    entries = tuple(
        dataclasses.replace(e, modified=e.modified - (2 * DAY if "00000-of" in e.name else 0)) for e in snapshot.entries
    )
    plan = plan_gc(dataclasses.replace(snapshot, entries=entries), [], grace_s=DAY, current_generation=2)
    assert plan.orphans == ()
    assert folder in plan.reasons


def test_empty_attempt_folders_go(store: Store) -> None:
    steps(store, 300, generation=2)
    store.make_folder("step-0000000200/g000001-00000000")
    store.make_folder("step-0000000250")
    store.make_folder("step-0000000400")
    assert collected(store, [], current_generation=2).orphans_removed == ("step-0000000200/g000001-00000000",)
    # A folder above the newest commit may be the next save's.
    assert store.list_folders("") == ["generations", "step-0000000300", "step-0000000400"]


def test_strangers_are_never_touched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, *_ = steps(store, 100, 200, 300)
    folder = orphan(store, 150, 0)
    attempt = shard_paths(store, one)[0].rpartition("/")[0]
    strangers = {
        "step-0000000100/notes.txt",
        f"{attempt}/mine.pt",
        f"{folder}/mine.pt",
        "step-100/g000000-00000000/00000-of-00001.safetensors",
        "step-0000000150/g0-00000000/00000-of-00001.safetensors",
        "other/g000000-00000000/00000-of-00001.safetensors",
    }
    for name in strangers:
        store.create(name, b"keep")
    kept = {"step-0000000100/evaluations/mmlu.json"}
    store.create(*kept, b"{}")
    later(monkeypatch, store, 2 * DAY)
    report = collected(store, [one])
    assert report.removed == (one,)
    assert report.orphans_removed == (folder,)
    assert strangers | kept <= files(store)
    assert f"{attempt}/mine.pt" in report.reasons
    assert not kept & set(report.reasons)
    assert not [n for n in files(store) if n.startswith(attempt) and n != f"{attempt}/mine.pt"]


def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PosixStore(tmp_path / "root")
    one, *_ = steps(store, 100, 200, 300)
    outside = tmp_path / "outside" / "g000000-00000000"
    outside.mkdir(parents=True)
    precious = outside / "00000-of-00001.safetensors"
    precious.write_bytes(b"precious")
    Path(store.path_of("step-0000000150")).symlink_to(outside.parent)
    shard = Path(store.path_of(shard_paths(store, one)[0]))
    shard.unlink()
    shard.symlink_to(precious)
    later(monkeypatch, store, 2 * DAY)
    assert collected(store, [one]).removed == (one,)
    assert precious.read_bytes() == b"precious"
    assert Path(store.path_of("step-0000000150")).is_symlink()


# ---------------------------------------------------------------- doubt


def test_nothing_of_a_step_with_an_unreadable_manifest_goes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create_generation(store, resumed_from=None)
    one, *_ = steps(store, 100, 200, 300)
    folder = orphan(store, 100, 0)
    store.create(f"{one.folder}/{names.manifest_name(2)}", b"torn")
    later(monkeypatch, store, 2 * DAY)
    before = files(store)
    report = collected(store, [one], current_generation=2)
    assert (report.removed, report.orphans_removed) == ((), ())
    assert files(store) == before
    assert {one.manifest_path, folder, f"{one.folder}/{names.manifest_name(2)}"} <= set(report.reasons)


def test_a_newer_format_or_an_unreadable_disk_stops_everything(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _, _, four = steps(store, 100, 200, 300, 400)
    data = store.read(four.manifest_path)
    body = data.partition(b'"body":')[2][:-2].replace(b'"version":[1,0]', b'"version":[3,0]')
    store.delete(four.manifest_path)
    store.create(four.manifest_path, b'{"digest":"xxh3-128:' + digest(body).encode() + b'","body":' + body + b"}\n")
    report = collected(store, [one])
    assert report.removed == ()
    assert "3.0" in report.reasons[one.manifest_path]
    store.delete(four.manifest_path)
    store.create(four.manifest_path, data)
    read = type(store).read

    def fails(self: Store, name: str, offset: int = 0, size: int | None = None) -> bytes:
        if name == four.manifest_path:
            raise StoreError(errno.EIO, "broken", name)
        return read(self, name, offset, size)

    monkeypatch.setattr(type(store), "read", fails)
    assert collected(store, [one]).removed == ()
    monkeypatch.undo()
    assert collected(store, [one]).removed == (one,)


def test_what_cannot_be_deleted_is_reported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, *_ = steps(store, 100, 200, 300, 400)
    delete = type(store).delete
    stuck = shard_paths(store, two)[0]

    def fails(self: Store, name: str) -> None:
        if name in (one.manifest_path, stuck):
            raise StoreError(errno.EACCES, "denied", name)
        delete(self, name)

    monkeypatch.setattr(type(store), "delete", fails)
    report = collected(store, [one, two])
    assert report.removed == (two,)
    assert set(report.kept) == {one.manifest_path, stuck}
    assert verify(store, one, mode="full").ok


def test_an_unsynced_manifest_removal_keeps_the_data(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, *_ = steps(store, 100, 200, 300)
    shards = shard_paths(store, one)

    def fails(self: Store, name: str) -> None:
        raise StoreError(errno.EIO, "fsync", name)

    monkeypatch.setattr(type(store), "sync_folder", fails)
    report = collected(store, [one])
    assert set(shards) <= files(store)
    assert "durable" in report.reasons[one.manifest_path]
