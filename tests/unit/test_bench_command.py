"""``distckpt bench`` on a folder, a bucket, memory and a slow network: everything is measured, nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bench_support import left_in
from cli_support import run, run_json

from benchmarks.slow_store import Slowness, SlowStore
from distckpt import CheckpointConfig, failpoints
from distckpt.analysis import store_bench
from distckpt.analysis.store_bench import BenchOptions, bench_stores
from distckpt.storage import open_store
from distckpt.storage.memory import shared_store
from distckpt.storage.probes import Point

if TYPE_CHECKING:
    from s3_support import S3

MIB = 1 << 20
QUICK = ["--mbytes", "8", "--rounds", "1", "--operations", "3"]
OPERATIONS = ["commit", "stat", "open and read", "list", "delete"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "disk <b>"
    made.mkdir()
    return made


def test_folders_side_by_side_as_json(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("not to be touched")
    code, report = run_json(capsys, "bench", folder, f"file://{other}", *QUICK)
    assert (code, [t["error"] for t in report["targets"]]) == (0, ["", ""])
    assert (left_in(folder), left_in(other)) == ([], ["mine"])
    for target in report["targets"]:
        points = {(p["kind"], p["threads"], p["request"] // MIB) for p in target["curve"]}
        assert points == {(kind, *at) for kind in ("write", "read") for at in ((1, 2), (2, 2), (4, 2), (1, 8))}
        assert all(p["rate"] > 0 for p in target["curve"])
        assert {t["part"] for t in target["turns"]} == {"save", "load", "partial load"}
        for turn in target["turns"]:
            assert len(turn["raw"]) == 2
            assert turn["nbytes"] > (1 if turn["part"] == "partial load" else 7) * MIB * 0.9
            assert turn["cold"] in ((None,) if turn["part"] == "save" else (True, False))
        assert [found["operation"] for found in target["latencies"]] == OPERATIONS
        assert all(f["p50"] <= f["p95"] <= f["worst"] for f in target["latencies"])
        assert {a["setting"] for a in target["advice"]} == {"threads", "background_threads", "timeout_s"}
        assert target["facts"]["fs_type"]
    assert report["world_size"] == 1


def test_text_and_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "bench", folder, *QUICK, "--html", page, "--state-gb", 100)
    assert code == 0
    for part in ("raw write", "raw read", "save", "load", "partial load", *OPERATIONS):
        assert f"\n{part} " in out
    assert out.count("knee") >= 2
    assert "by threads" in out
    assert "timeout_s" in out
    assert "preemption_budget_s" in out
    text = page.read_text()
    assert "<svg" in text
    assert "disk &lt;b&gt;" in text
    assert left_in(folder) == []


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_json(capsys, "bench", "memory://bench-here", *QUICK)
    assert (code, report["targets"][0]["error"]) == (0, "")
    assert {t["cold"] for t in report["targets"][0]["turns"]} == {None}
    assert list(shared_store("bench-here").list()) == []


def test_a_bucket_beside_a_folder(s3: S3, bucket: str, folder: Path) -> None:
    options = BenchOptions(nbytes=8 * MIB, rounds=1, operations=2, again=0)
    report = bench_stores([f"s3://{bucket}/team", str(folder)], options)
    assert (report.ok, [t.error for t in report.targets]) == (True, ["", ""])
    far, near = report.targets
    assert (far.far, near.far) == (True, False)
    assert {(p.kind, p.threads, p.request // MIB) for p in far.curve} == {
        ("write", 1, 5), ("write", 1, 8), ("read", 1, 4), ("read", 1, 8),
    }  # fmt: skip
    assert {a.setting for a in far.advice} == {
        "threads", "DISTCKPT_STORE_PART_MIB", "DISTCKPT_STORE_IN_FLIGHT", "DISTCKPT_STORE_DEADLINE_S", "timeout_s",
    }  # fmt: skip
    assert (s3.ask("keys", name=bucket), s3.ask("uploads", name=bucket), left_in(folder)) == ([], [], [])
    sent = s3.ask("seen")["requests"]
    for what in ("/raw/00000/probe?partNumber=2", "/raw/00000/kept", "/step-0000000001/", "/small/00000-0/"):
        assert any(what in r and f"/{bucket}/team/distckpt-bench-" in r for r in sent), what


def test_a_slow_network_is_met_with_requests_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SlowStore] = []

    def slow(url: str) -> SlowStore:
        made.append(SlowStore(open_store(url), Slowness(latency_s=(0.002, 0.004), bytes_per_s=5e9, stragglers=0.0)))
        return made[-1]

    monkeypatch.setattr(store_bench, "open_store", slow)
    options = BenchOptions(nbytes=24 * MIB, rounds=1, operations=3, again=0, far_threads=(1, 6))
    (target,) = bench_stores(["memory://slow-bench"], options).targets
    assert (target.error, target.far, target.left) == ("", True, [])
    (store,) = [s for s in made if s.seen["requests"]]
    assert store.seen["most_in_flight"] >= 4
    assert {(p.threads, p.request // MIB) for p in target.curve if p.kind == "read"} >= {(1, 4), (6, 4), (1, 16)}
    assert store.counters["deletes"] > 0
    assert list(store.inner.list()) == []
    assert {a.setting for a in target.advice} == {"threads", "timeout_s"}


def test_a_target_that_fails_is_told_of_and_the_others_go_on(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    failpoints.arm("writer.chunk@raw:1:raise=ENOSPC")
    try:
        code, out, err = run(capsys, "bench", folder, other, *QUICK, "--json")
    finally:
        failpoints.arm("")
    first, second = json.loads(out)["targets"]
    assert code == 1
    assert "free some space" in first["error"]
    assert "left out from now on" in err
    assert (first["turns"], second["error"]) == ([], "")
    assert {t["part"] for t in second["turns"]} == {"save", "load", "partial load"}
    assert (left_in(folder), left_in(other)) == ([], [])


@pytest.mark.parametrize("point", ["shard.before_header", "create.before_temp@step", "delete.before@small"])
def test_an_error_anywhere_leaves_nothing(folder: Path, point: str, capsys: pytest.CaptureFixture[str]) -> None:
    failpoints.arm(f"{point}:1:raise=EIO")
    try:
        code, report = run_json(capsys, "bench", folder, *QUICK)
    finally:
        failpoints.arm("")
    assert (code, left_in(folder)) == (1, [])
    assert "failpoint" in report["targets"][0]["error"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["ftp://host/x"], "no store for ftp://"),
        (["s3:/lost/slash"], "two slashes"),
        (["s3://key:secret@bucket/x"], "credentials come from the environment"),
        (["{folder}/absent"], "no such folder"),
        (["{folder}", "{folder}/absent"], "no such folder"),
        (["{folder}", "--mbytes", "900000000"], "are needed; choose a smaller --mbytes"),
        (["{folder}", "--html", "{folder}/absent/page.html"], "--html"),
        (["{folder}", "--rounds", "0"], "--rounds"),
        ([], "URL"),
    ],
)
def test_wrong_use(folder: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "bench", *(a.format(folder=folder) for a in arguments))
    assert (code, out) == (2, "")
    assert text in err
    assert "secret" not in err
    assert left_in(folder) == []


def test_a_bucket_that_is_not_there_or_has_no_safe_commit_is_wrong_use(
    s3: S3, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "bench", "s3://typo-in-bucket/run", *QUICK)
    assert (code, "no such bucket" in err) == (2, True)
    s3.ask("fault", action="unconditional", times=0)
    code, _, err = run(capsys, "bench", f"s3://{bucket}/run", *QUICK)
    assert (code, "ignores if-none-match" in err) == (2, True)
    assert s3.ask("keys", name=bucket) == []


@pytest.mark.parametrize("field", [{"nbytes": 1000}, {"rounds": 0}, {"operations": 0}, {"timeout_s": 0}])
def test_options_are_checked(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        BenchOptions(**field)


def test_the_depth_that_is_set_is_among_those_that_are_measured(folder: Path) -> None:
    threads = CheckpointConfig("x").threads
    options = BenchOptions(nbytes=32 * MIB, rounds=1, operations=1, again=0, threads=(1,))
    (target,) = bench_stores([str(folder)], options).targets
    measured = {Point(p.threads, p.request) for p in target.curve if p.kind == "write"}
    assert measured == {Point(n, r * MIB) for n in (1, threads) for r in (2, 8, 16) if n * r <= 32}
