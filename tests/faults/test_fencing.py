"""Two jobs on one root: the newer one owns it, the older one is told, and what it still commits is a stray."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_job import Job, run
from ranks import run_ranks
from supervisor import read_events
from torch import nn

from distckpt import CheckpointConfig, CheckpointManager, failpoints, list_checkpoints, open_checkpoint
from distckpt.errors import StaleGeneration
from distckpt.format.lineage import lineage, list_committed, read_generations, strays
from distckpt.storage import PosixStore


def job_on(root: Path, value: float, **options: Any) -> tuple[CheckpointManager, nn.Linear]:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    config = CheckpointConfig(
        root,
        preemption_signals=(),
        control_file=None,
        verbose=False,
        **{"max_consecutive_failures": 3, "retries": 0, **options},
    )
    return CheckpointManager(config, model=model), model


def line_of(root: Path) -> list[tuple[int, int]]:
    store = PosixStore(root)
    return [(c.generation, c.step) for c in lineage(list_committed(store), read_generations(store))]


def strays_of(root: Path) -> list[tuple[int, int]]:
    store = PosixStore(root)
    return [(c.generation, c.step) for c in strays(list_committed(store), read_generations(store))]


def test_an_older_job_may_not_commit_and_learns_who_owns_the_root(tmp_path: Path) -> None:
    old, _ = job_on(tmp_path, 1.0)
    old.save(step=1)
    old.save(step=2)
    new, model = job_on(tmp_path, 2.0)
    report = new.resume()
    assert report is not None
    assert report.step == 2
    with pytest.raises(StaleGeneration, match=r"generation 2 \(started .* on .* by pid \d+\) now owns this root"):
        old.save(step=3)  # raised although failed saves are tolerated: it cannot get better
    with torch.no_grad():
        model.weight.fill_(3.0)
    new.save(step=3)
    assert line_of(tmp_path) == [(2, 3), (1, 2), (1, 1)]
    assert strays_of(tmp_path) == []
    assert open_checkpoint(tmp_path).state_dict()["weight"].unique().item() == 3.0
    old.close()
    new.close()


def test_a_background_save_of_an_older_job_fails_at_the_next_call(tmp_path: Path) -> None:
    old, _ = job_on(tmp_path, 1.0, async_save=True)
    old.save(step=1)
    old.wait()
    new, _ = job_on(tmp_path, 2.0)
    new.resume()
    old.save(step=2)
    with pytest.raises(StaleGeneration):
        old.wait()
    old.close()
    new.close()
    assert line_of(tmp_path) == [(1, 1)]


def test_a_commit_that_slips_through_late_is_a_stray(tmp_path: Path) -> None:
    old, _ = job_on(tmp_path, 1.0)
    old.save(step=1)
    reached, go = threading.Event(), threading.Event()

    class Pause(list[str]):
        def append(self, hit: str) -> None:
            if hit.startswith("commit.before_manifest@step-0000000002") and not reached.is_set():
                reached.set()  # the fencing check is behind it
                go.wait(30)

    failpoints.record(Pause())
    try:
        late = threading.Thread(target=lambda: old.save(step=2))
        late.start()
        assert reached.wait(30)
        new, _ = job_on(tmp_path, 2.0)
        report = new.resume()
        assert report is not None
        assert report.step == 1
        new.save(step=2)
        go.set()
        late.join()
    finally:
        failpoints._trace = None
    assert line_of(tmp_path) == [(2, 2), (1, 1)]
    assert strays_of(tmp_path) == [(1, 2)]
    assert [(c.generation, c.step) for c in list_checkpoints(tmp_path)] in ([(1, 1), (2, 2)], [(2, 2), (1, 1)])
    assert {(c.generation, c.step) for c in list_checkpoints(tmp_path, all=True)} == {(1, 1), (2, 2), (1, 2)}
    third, _ = job_on(tmp_path, 0.0)
    report = third.resume()
    assert report is not None
    assert (report.generation, report.step) == (2, 2)
    for manager in (old, new, third):
        manager.close()


def test_two_jobs_of_two_ranks_each_keep_one_lineage(tmp_path: Path) -> None:
    """The first job's leader is stopped right before its commit; a second job takes over; the first one goes on."""
    root, point = tmp_path / "root", ("commit.before_manifest", 1)
    first = Job(root, tmp_path / "first", 0, False, point, (0,), "stop", timeout_s=40, endless=3)
    second = Job(tmp_path / "root", tmp_path / "second", 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            outcomes = run_ranks(2, run, first, check=False, store_host="agent", timeout_s=60)
            kinds = {o.kind for o in outcomes}
            code = 0 if kinds == {"StaleGeneration"} else 2
            if code:
                print(outcomes)
        finally:
            os._exit(code)
    leader = stopped_leader(first.oracle)
    run_ranks(2, run, second)
    os.kill(leader, signal.SIGCONT)
    assert os.waitpid(child, 0)[1] == 0
    events = read_events(first.oracle, 0)[0]
    last = {e["rank"]: e for e in events if e["event"] in ("acknowledged", "failed")}
    assert {e["kind"] for e in last.values()} == {"StaleGeneration"}
    assert last[0]["text"] == last[1]["text"]
    resumed = {e["step"] for e in read_events(second.oracle, 0)[0] if e["event"] == "resumed"}
    assert resumed == {2}
    assert line_of(tmp_path / "root")[0] == (2, 5)
    assert strays_of(tmp_path / "root") == [(1, 3)]
    for info in list_checkpoints(tmp_path / "root"):
        assert open_checkpoint(tmp_path / "root" / f"step-{info.step:010d}").verify(mode="full").ok


def stopped_leader(oracle: Path) -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for event in read_events(oracle, 0)[0]:
            if event["event"] == "healthy" and event["rank"] == 0:
                state = Path(f"/proc/{event['pid']}/stat").read_text().rpartition(")")[2].split()[0]
                if state == "T":
                    return int(event["pid"])
        time.sleep(0.01)
    raise AssertionError("the leader was never stopped")
