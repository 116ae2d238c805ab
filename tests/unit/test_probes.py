"""Raw probes count what they say, evict what they say, and scratch roots go without taking anything along."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from distckpt import failpoints
from distckpt.errors import ConfigError, StoreError
from distckpt.storage import MemoryStore, ObjectStore, PosixStore, open_store
from distckpt.storage.probes import Point, cold, differ, raw_read, raw_write, small_operations
from distckpt.storage.scratch import (
    PREFIX,
    remove_file,
    remove_names,
    remove_scratch,
    scratch_name,
    scratch_url,
    target_facts,
)

if TYPE_CHECKING:
    from s3_support import S3

MIB = 1 << 20


@pytest.mark.parametrize("point", [Point(1, 2 * MIB), Point(4, MIB), Point(3, 8 * MIB)])
def test_raw_writes_and_reads_move_every_byte_once_and_durably(tmp_path: Path, point: Point) -> None:
    store, nbytes = PosixStore(tmp_path), 5 * MIB + 4096
    assert raw_write(store, "raw/file", nbytes, point) > 0
    assert (store.counters["bytes_written"], store.counters["fsyncs"]) == (nbytes, 1)
    assert store.counters["folder_syncs"] >= 1
    assert store.size("raw/file") == nbytes
    assert cold(store, ["raw/file"]) in (True, False)
    assert raw_read(store, "raw/file", nbytes, point) > 0
    assert (store.counters["bytes_read"], store.counters["opens"]) == (nbytes, 2)  # one of them by size()


def test_a_raw_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    failpoints.arm("writer.chunk:2:raise=ENOSPC")
    try:
        with pytest.raises(StoreError, match="free some space"):
            raw_write(store, "raw/file", 8 * MIB, Point(2, MIB))
    finally:
        failpoints.arm("")
    assert list(store.list()) == []


def test_an_upload_has_as_many_parts_as_requests_and_so_many_in_flight(s3: S3, bucket: str) -> None:
    store = open_store(f"s3://{bucket}/run")
    s3.ask("watch", delay=0.05)
    raw_write(store, "file", 20 * MIB, Point(3, 5 * MIB))
    seen = s3.ask("seen")
    assert len([r for r in seen["requests"] if "partNumber=" in r]) == 4
    assert 2 <= seen["most"] <= 3
    s3.ask("watch", delay=0.05)
    raw_read(store, "file", 20 * MIB, Point(5, 4 * MIB))
    seen = s3.ask("seen")
    assert len([r for r in seen["requests"] if r.startswith("GET")]) == 5
    assert seen["most"] >= 3


def test_small_operations_are_counted_and_leave_nothing() -> None:
    store = MemoryStore()
    found = small_operations(store, "small/0", 8)
    assert {kind: len(times) for kind, times in found.items()} == {
        "commit": 8, "stat": 8, "open and read": 8, "list": 2, "delete": 8,
    }  # fmt: skip
    assert list(store.list()) == []
    assert "0" not in store.list_folders("small")
    assert (store.counters["creates"], store.counters["deletes"]) == (8, 8)


def test_probes_that_differ() -> None:
    assert not differ({"write": 100.0}, {"write": 110.0})
    assert differ({"write": 100.0}, {"write": 111.0})
    assert differ({"write": 121.0}, {"write": 100.0}, 0.2)
    assert not differ({"write": 119.0}, {"write": 100.0}, 0.2)


# ---------------------------------------------------------------- scratch roots


def test_a_scratch_root_goes_with_links_that_it_does_not_follow(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").write_text("kept")
    store = open_store(scratch_url(str(tmp_path), scratch_name()))
    assert isinstance(store, PosixStore)
    store.create("step-1/a/file", b"x")
    root = Path(store.root)
    (root / "step-1" / ".tmp-1-left").write_text("of a killed process")
    (root / "link").symlink_to(tmp_path / "mine")
    (root / "step-1" / "link").symlink_to(tmp_path / "mine" / "data")
    assert remove_scratch(store) == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "data").read_text() == "kept"
    assert remove_scratch(store) == []  # again, by another rank


def test_only_scratch_roots_are_removed(tmp_path: Path) -> None:
    store = PosixStore(tmp_path / "run")
    store.create("step", b"x")
    for remove in (remove_scratch, remove_names, lambda s: remove_file(s, "step")):
        with pytest.raises(ConfigError, match="not a scratch root"):
            remove(store)
    assert store.read("step") == b"x"
    with pytest.raises(StoreError, match="whole bucket"):
        ObjectStore("s3", "bucket").clear()


def test_a_bucket_s_scratch_goes_with_its_markers_and_nothing_else(s3: S3, bucket: str) -> None:
    open_store(f"s3://{bucket}/team").create("distckpt.json", b"theirs")
    store = open_store(scratch_url(f"s3://{bucket}/team/", scratch_name()))
    store.make_folder("step/attempt", exclusive=True)
    store.create("step/attempt/file", b"x")
    assert remove_scratch(store) == []
    assert s3.ask("keys", name=bucket) == ["team/distckpt.json"]


@pytest.mark.parametrize("target", ["/", "/data", "/data/", "file:///data", "s3://b", "s3://b/x/", "memory://m"])
def test_the_scratch_root_lies_below_its_target(target: str) -> None:
    inside = open_store(scratch_url(target, f"{PREFIX}0")).url
    assert inside.endswith(f"/{PREFIX}0")
    assert inside.startswith(open_store(target).url.rstrip("/") + "/")


def test_facts_of_a_target(tmp_path: Path) -> None:
    facts = target_facts(str(tmp_path))
    assert facts["writable"]
    assert facts["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="no such folder"):
        target_facts(str(tmp_path / "absent"))
