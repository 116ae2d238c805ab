"""The suite end to end, tiny: real ranks, real files, two peers; and what happens when a rank misbehaves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import __main__ as program
from benchmarks import jobs, report, tasks
from benchmarks.pool import Pool, RanksFailed
from benchmarks.run import Bench, Settings
from benchmarks.shapes import TensorSpec, Workload

TINY = Workload("tiny", "", tuple(TensorSpec(f"weights.{n}", (64, 256), "float32") for n in range(4)))


def process_id(worker: Any) -> int:
    return os.getpid()


def raise_on_rank_1(worker: Any) -> None:
    if worker.rank == 1:
        raise ValueError("only here")
    worker.barrier()


def die(worker: Any) -> None:
    os._exit(7)


def sleep(worker: Any) -> None:
    time.sleep(60)


def flip(worker: Any, folder: str) -> None:
    """Damage a byte of a checkpoint where its last tensor lies."""
    if worker.rank != 0:
        return
    path = next(Path(folder).glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = Bench(Settings(nbytes=TINY.nbytes, rounds=1, again=0), tmp_path_factory.mktemp("bench"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # ranks find the functions above
        yield found
    found.close()


@pytest.mark.slow
def test_two_peers_on_two_ranks_end_to_end(bench: Bench) -> None:
    root = bench.folder / "tiny"
    root.mkdir()
    here = jobs.Pass(bench, TINY, 2, root)
    peers = ("distckpt", "safetensors")
    here.saves(peers)
    here.loads(peers)
    results = report.Results(bench.rows)
    for peer in peers:
        for part in ("save", "cold load", "warm load"):
            s = results.one("tiny", part, peer, world=2)
            assert (len(s.rows) if s.only_void else len(s.rows) + s.void, s.error, s.wrong) == (2, "", ""), (peer, part)
            assert s.fraction() is not None
        assert all(r["check"] == "equal" for r in results.one("tiny", "cold load", peer, world=2).rows)
    cold = [r for r in bench.rows if r.get("part") == "cold load"]
    assert [r["resident_pages"] for r in cold] == [0] * 4
    assert cold[0]["peer"] == "distckpt"
    assert cold[0]["counters"]["wanted_bytes"] == cold[0]["counters"]["payload_bytes"] == TINY.nbytes
    saved = results.one("tiny", "save", world=2).rows
    assert saved[0]["counters"]["fsyncs"] >= 2
    assert [r["peer"] for r in bench.rows if r.get("part") == "save"] == [*peers, *reversed(peers)]


def test_damage_on_disk_is_not_taken_for_a_load(bench: Bench) -> None:
    root = bench.folder / "damage"
    root.mkdir()
    here = jobs.Pass(bench, TINY, 2, root)
    here.saves(("safetensors",))
    step, folder = here.saved["safetensors"]
    here.writer().call(flip, str(folder))
    replies = here.reader().call(tasks.load, "safetensors", root, step)
    assert any(r["check"].startswith("different: weights.") for r in replies)


def test_ranks_stay_until_one_misbehaves(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.pool.GRACE_S", 0.5)
    pool = bench.pool(2, "writer")
    first = pool.call(process_id)
    assert len(set(first)) == 2
    assert pool.call(process_id) == first
    with pytest.raises(RanksFailed, match=r"^rank 0: waits for it; rank 1: ValueError: only here$"):
        pool.call(raise_on_rank_1)
    assert not pool.alive  # rank 0 waits for a barrier that never comes
    assert not any(Path(f"/proc/{pid}").exists() for pid in first)


def test_ranks_that_die_or_hang_are_ended_and_come_back(bench: Bench) -> None:
    pool = Pool(1, "alone", bench.folder / "logs")
    with pytest.raises(RanksFailed, match="rank 0: died with status 7"):
        pool.call(die)
    with pytest.raises(RanksFailed, match="no answer within 1 s"):
        pool.call(sleep, timeout_s=1.0)
    assert (pool.alive, pool.starts) == (False, 2)


def test_the_command_writes_rows_a_page_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    arguments = ["--only", "one-big", "--peers", "distckpt,safetensors", "--mbytes", "2", "--again", "0"]
    assert program.main([*arguments, "--folder", str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "one-big" in printed
    assert "not measured in this run" in printed
    results = report.read_results(out / "results.jsonl")
    assert results.versions.keys() == {"distckpt", "safetensors"}
    assert {r["part"] for r in results.rows if r["kind"] == "row"} >= {"first save", "save", "cold load", "warm load"}
    assert "<h1>" in (out / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left of what was measured


def test_a_job_whose_ranks_die_is_left_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    every = {job.name: job for job in jobs.all_jobs()}
    dying = jobs.Job("dying", "its ranks die", lambda bench: bench.pool(1, "writer").call(die))
    monkeypatch.setattr(program, "all_jobs", lambda: [dying, every["one-big"]])
    arguments = ["--full", "--only", "dying", "--only", "one-big", "--peers", "distckpt", "--mbytes", "2"]
    out = tmp_path / "out"
    assert program.main([*arguments, "--rounds", "1", "--again", "0", "--folder", str(tmp_path), "--out", str(out)]) == 1
    assert "LEFT: dying" in capsys.readouterr().err
    ended = [row for row in report.read_results(out / "results.jsonl").rows if row["kind"] == "job"]
    assert [row["job"] for row in ended] == ["dying", "one-big"]
    assert "died with status 7" in ended[0]["error"]
    assert "error" not in ended[1]


def test_after_a_failure_processes_are_new_and_have_first_times_again() -> None:
    pool: Any = SimpleNamespace(starts=1)
    turns = jobs.Pass(SimpleNamespace(settings=Settings(rounds=1)), TINY, 1, Path())  # type: ignore[arg-type]
    seen = []
    for number, peer in turns.turns("save", ["ours", "hangs", "other"], lambda: pool):
        seen.append((number, peer))
        if seen == [(0, "ours"), (0, "hangs"), (0, "other"), (1, "ours"), (1, "hangs")]:
            turns.failed.add("hangs")
            pool.starts += 1
    assert seen[5:] == [(0, "other"), (1, "other"), (1, "other"), (0, "ours"), (1, "ours")]
    assert [number for number, _ in turns.turns("background", ["ours"], lambda: pool)] == [0, 1, 1]
