"""What ``doctor`` finds: storage that is not fit, two jobs on one root, strays, orphans, damage, clocks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import builders
import pytest

from distckpt.format import names
from distckpt.format.doctor import (
    LIVE_S,
    DoctorReport,
    clock_finding,
    diagnose,
    job_findings,
    size_text,
    storage_findings,
)
from distckpt.format.lineage import Generation, create_generation, ensure_root, heartbeat
from distckpt.format.uncommitted import uncommitted
from distckpt.storage import open_store
from distckpt.storage.base import Store

GIB = 2**30
GOOD: dict[str, Any] = {
    "path": "/data", "fs_type": "ext4", "mount_point": "/data", "free_bytes": 100 * GIB, "total_bytes": 200 * GIB,
    "volatile": False, "writable": True, "hard_links": True, "direct_io": True, "folder_sync": True,
}  # fmt: skip
SMALL = {"model.w": builders.some_tensors()["model.embed.weight"]}


def levels(findings: Any) -> dict[str, str]:
    """Return check to level; of several findings of one check the last."""
    return {finding.check: finding.level for finding in findings}


def texts(report: DoctorReport, check: str) -> list[str]:
    return [finding.text for finding in report.findings if finding.check == check]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two jobs: the first saved 10 and 20, the second resumed from 10 and saved 15."""
    store = open_store(tmp_path / "root")
    ensure_root(store)
    create_generation(store, resumed_from=None, owner="first")
    for step in (10, 20):
        builders.build_checkpoint(store, step, 1, tensors=SMALL)
    create_generation(store, resumed_from=(1, 10), owner="second")
    builders.build_checkpoint(store, 15, 2, tensors=SMALL)
    return store


# ---------------------------------------------------------------- judgements


def test_a_good_disk_has_nothing_but_ok() -> None:
    assert set(levels(storage_findings(GOOD, GIB)).values()) == {"ok"}


@pytest.mark.parametrize(
    ("change", "check", "level", "word"),
    [
        ({"fs_type": "tmpfs", "volatile": True}, "file system", "warning", "memory"),
        ({"fs_type": "overlay", "volatile": True}, "file system", "warning", "container"),
        ({"fs_type": "fuse.sshfs", "volatile": True}, "file system", "warning", "FUSE"),
        ({"writable": False}, "writable", "problem", "/data"),
        ({"hard_links": False}, "link()", "warning", "in place"),
        ({"direct_io": False}, "O_DIRECT", "note", "page cache"),
        ({"folder_sync": False}, "fsync", "warning", "power cut"),
        ({"free_bytes": GIB // 2}, "space", "problem", "512.0 MiB of 200.0 GiB"),
        ({"free_bytes": GIB * 3 // 2}, "space", "warning", "1.0 GiB"),
    ],
)
def test_each_weakness_of_storage_is_named(change: dict[str, Any], check: str, level: str, word: str) -> None:
    found = [f for f in storage_findings({**GOOD, **change}, GIB) if f.check == check]
    assert [f.level for f in found] == [level]
    assert word in found[0].text


def test_where_nothing_can_be_written_nothing_else_is_claimed() -> None:
    unknown = {"writable": False, "hard_links": None, "direct_io": None, "folder_sync": None}
    assert [f.check for f in storage_findings({**GOOD, **unknown}, None)] == ["file system", "writable"]


def record(number: int) -> Generation:
    return Generation(number, "00000000", "node7", f"user{number}", "2026-01-31T12:00:00Z", None)


@pytest.mark.parametrize(
    ("live", "level", "words"),
    [
        ([], "ok", ["none seems to run"]),
        ([3], "ok", ["running", "user3", "node7"]),
        ([2], "warning", ["user2", "user3", "replaced"]),
        ([2, 3], "problem", ["2 jobs", "user2", "user3"]),
    ],
)
def test_jobs_on_one_root(live: list[int], level: str, words: list[str]) -> None:
    (finding,) = job_findings({2: record(2), 3: record(3)}, live)
    assert finding.level == level
    assert all(word in finding.text for word in words)


@pytest.mark.parametrize(
    ("skew", "level", "word"), [(0.2, "ok", ""), (90, "warning", "ahead"), (-90, "warning", "behind")]
)
def test_clock_skew(skew: float, level: str, word: str) -> None:
    finding = clock_finding(skew)
    assert finding.level == level
    assert word in finding.text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20 - 1, "1.0 MiB"), (3 * 2**40, "3.0 TiB")],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


# ---------------------------------------------------------------- whole roots


def test_a_root_in_order(store: Store) -> None:
    report = diagnose(store)
    assert report.ok
    assert "step 15 of generation 2" in texts(report, "checkpoints")[0]
    assert [text[:7] for text in texts(report, "stray")] == ["step 20"]
    assert report.facts["strays"] == [f"{names.step_folder(20)}/{names.manifest_name(1)}"]
    assert abs(report.facts["clock_skew_s"]) < 3600


def test_two_live_jobs_are_a_problem(store: Store) -> None:
    heartbeat(store, 2)
    assert diagnose(store).ok
    heartbeat(store, 1)
    report = diagnose(store)
    assert not report.ok
    assert report.facts["live"] == [1, 2]


def test_a_job_is_forgotten_after_a_while(store: Store, tmp_path: Path) -> None:
    heartbeat(store, 1)
    alive = next((tmp_path / "root/generations").glob("*.alive"))
    past = alive.stat().st_mtime - 2 * LIVE_S
    os.utime(alive, (past, past))
    assert diagnose(store).facts["live"] == []


def test_damage_is_named_and_an_older_one_takes_over(store: Store, tmp_path: Path) -> None:
    newest = builders.Committed(15, 2, f"{names.step_folder(15)}/{names.manifest_name(2)}")
    shard = tmp_path / "root" / builders.shard_paths(store, newest)[1]
    os.truncate(shard, shard.stat().st_size - 1)
    report = diagnose(store)
    assert not report.ok
    assert shard.name in texts(report, "damage")[0]
    assert "step 10 of generation 1" in texts(report, "checkpoints")[0]


def test_unreadable_manifests_and_records_are_problems(store: Store, tmp_path: Path) -> None:
    (tmp_path / "root" / names.step_folder(10) / names.manifest_name(1)).write_bytes(b"{}")
    (tmp_path / "root" / names.generation_file(1)).write_bytes(b"torn")
    report = diagnose(store)
    assert levels(report.findings)["damage"] == "problem"
    assert names.generation_file(1) in texts(report, "generation")[0]


def test_orphans_are_told_from_attempts_that_may_be_in_flight(store: Store) -> None:
    builders.prepare(store, 30, 1, tensors=SMALL, nonce="aaaaaaaa")
    builders.prepare(store, 40, 2, tensors=SMALL, nonce="bbbbbbbb")
    report = diagnose(store)
    assert report.ok
    assert report.facts["orphans"] == ["step-0000000030/g000001-aaaaaaaa"]
    assert report.facts["uncommitted"] == ["step-0000000040/g000002-bbbbbbbb"]
    assert {a.generation: (a.files, a.in_doubt) for a in uncommitted(store)} == {1: (2, False), 2: (2, False)}


def test_an_attempt_beside_an_unreadable_manifest_is_in_doubt(store: Store, tmp_path: Path) -> None:
    (tmp_path / "root" / names.step_folder(10) / names.manifest_name(1)).write_bytes(b"{}")
    (attempt,) = uncommitted(store)
    assert (attempt.step, attempt.in_doubt) == (10, True)
    assert diagnose(store).facts["orphans"] == []


def test_a_root_to_be_leaves_no_trace(tmp_path: Path) -> None:
    report = diagnose(open_store(tmp_path / "not" / "yet"))
    assert report.ok
    assert "does not exist" in texts(report, "root")[0]
    assert list(tmp_path.iterdir()) == []
    assert "no job" in texts(diagnose(open_store(tmp_path)), "root")[0]
    assert list(tmp_path.iterdir()) == []


def test_looking_changes_nothing(store: Store, tmp_path: Path) -> None:
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    diagnose(store)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_memory_store_has_no_file_system() -> None:
    store = open_store("memory://doctor")
    builders.build_checkpoint(store, 1, tensors=SMALL)
    report = diagnose(store)
    assert report.ok
    assert "file system" not in levels(report.findings)
