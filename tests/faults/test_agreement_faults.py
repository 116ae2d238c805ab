"""One rank fails, dies or stops in a save: what the others are told, and when, at the level of the manager."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_job import Job, Oracle, Training, run, save
from ranks import run_ranks
from supervisor import GRACE_S, committed_on_disk, read_events

from distckpt import CheckpointConfig, CheckpointManager, failpoints, open_checkpoint
from distckpt.errors import SaveFailed

TIMEOUT_S = 2.0


def verdicts(job: Job) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for event in read_events(job.oracle, 0)[0]:
        if event["event"] in ("acknowledged", "failed"):
            found[event["rank"]].append(event)
    return found


@contextlib.contextmanager
def wake_later(oracle: Path, rank: int, seconds: float) -> Iterator[None]:
    """SIGCONT a rank so long after it was ready to be stopped, from a process outside of the job."""
    helper = os.fork()
    if helper == 0:
        try:
            end = time.monotonic() + 30
            while time.monotonic() < end:
                time.sleep(0.01)
                pids = [e["pid"] for e in read_events(oracle, 0)[0] if e["event"] == "healthy" and e["rank"] == rank]
                if pids:
                    time.sleep(seconds)
                    os.kill(pids[0], signal.SIGCONT)
                    break
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.waitpid(helper, 0)


# ---- one rank raises


def fail_once(rank: int, root: Path, oracle: Path, victim: int, where: str, background: bool) -> None:
    """Save, fail to save on one rank, save again with the same manager: training went on."""
    training = Training(rank, 2, 0)
    config = CheckpointConfig(
        root, async_save=background, preemption_signals=(), control_file=None, timeout_s=30.0, retries=0,
        max_consecutive_failures=0, threads=2, verbose=False,
    )  # fmt: skip
    out = Oracle(oracle, rank)
    with CheckpointManager(config, model=training.model, optimizer=training.optimizer) as manager:
        save(manager, training, out, 1)
        if rank == victim:
            sabotage(manager, where)
        with pytest.raises(SaveFailed):
            save(manager, training, out, 2)
        failpoints.arm("")
        manager.pipeline.__dict__.pop("_stage", None)
        save(manager, training, out, 3)


def sabotage(manager: CheckpointManager, where: str) -> None:
    def no_memory(*_: Any) -> Any:
        raise MemoryError("no room for the copy")

    if where == "staging":
        manager.pipeline._stage = no_memory  # type: ignore[method-assign]
    else:
        failpoints.arm(f"{where}:1:raise=ENOSPC")


@pytest.mark.parametrize("background", [False, True], ids=["synchronous", "background"])
@pytest.mark.parametrize(
    ("where", "victim", "cause"),
    [
        ("staging", 0, "MemoryError: no room"),
        ("staging", 1, "MemoryError: no room"),
        ("writer.chunk", 1, "No space left"),
        ("writer.before_fsync", 0, "No space left"),
        ("save.synced", 1, "No space left"),
        ("commit.before_manifest", 0, "No space left"),
    ],
)
def test_a_rank_that_raises_fails_the_save_on_all_ranks_with_its_cause(
    where: str, victim: int, cause: str, background: bool, tmp_path: Path
) -> None:
    job = Job(tmp_path / "root", tmp_path / "oracle")
    run_ranks(2, fail_once, job.root, job.oracle, victim, where, background)
    for events in verdicts(job).values():
        assert [e["event"] for e in events] == ["acknowledged", "failed", "acknowledged"]
        failed = events[1]
        assert f"rank {victim} ({socket.gethostname()})" in failed["text"]
        assert cause in failed["text"]
        assert failed["took"] < 15  # at once, and not at the deadline of 30 s
    assert committed_on_disk(job.root) == {(1, 1), (1, 3)}
    assert open_checkpoint(job.root).verify(mode="full").ok


# ---- one rank dies


@pytest.mark.parametrize("background", [False, True], ids=["synchronous", "background"])
@pytest.mark.parametrize(("victim", "point"), [(1, "writer.chunk"), (1, "save.receipt"), (0, "save.receipt")])
def test_survivors_of_a_kill_name_the_rank_that_is_missing(
    victim: int, point: str, background: bool, tmp_path: Path
) -> None:
    job = Job(tmp_path / "root", tmp_path / "oracle", 0, background, (point, 1), (victim,), timeout_s=TIMEOUT_S)
    outcomes = run_ranks(2, run, job, check=False, store_host="agent")
    assert outcomes[victim].signal == signal.SIGKILL
    last = verdicts(job)[1 - victim][-1]
    assert last["event"] == "failed"
    assert f"rank {victim} ({socket.gethostname()}, pid " in last["text"]
    assert "is missing: not heard from within 2 s" in last["text"]
    assert last["took"] <= TIMEOUT_S + GRACE_S
    assert (1, 3) not in committed_on_disk(job.root)


@pytest.mark.parametrize(
    ("point", "host"), [("create.linked", "agent"), ("create.linked", "rank0"), ("commit.after_manifest", "rank0")]
)
def test_a_leader_killed_after_the_link_has_committed(point: str, host: Any, tmp_path: Path) -> None:
    job = Job(tmp_path / "root", tmp_path / "oracle", 0, False, (point, 1), (0,), timeout_s=TIMEOUT_S)
    outcomes = run_ranks(2, run, job, check=False, store_host=host)
    assert outcomes[0].signal == signal.SIGKILL
    assert outcomes[1].ok, outcomes[1]
    assert [e["event"] for e in verdicts(job)[1]] == ["acknowledged"] * 3
    assert open_checkpoint(job.root).step == 3
    assert open_checkpoint(job.root).verify(mode="full").ok


# ---- one rank stops, and goes on when the others have given it up


@pytest.mark.parametrize(("victim", "point"), [(1, "writer.chunk"), (1, "save.receipt"), (0, "writer.chunk")])
def test_a_stopped_rank_is_given_up_in_time_and_commits_nothing_when_it_wakes(
    victim: int, point: str, tmp_path: Path
) -> None:
    job = Job(tmp_path / "root", tmp_path / "oracle", 0, False, (point, 1), (victim,), "stop", timeout_s=TIMEOUT_S)
    with wake_later(job.oracle, victim, 2 * TIMEOUT_S + 0.5):
        outcomes = run_ranks(2, run, job, check=False, store_host="agent")
    for outcome in outcomes:
        assert outcome.kind == "SaveFailed", outcome
    other = verdicts(job)[1 - victim][-1]
    assert f"rank {victim} ({socket.gethostname()}, pid " in other["text"]
    assert other["took"] <= TIMEOUT_S + GRACE_S
    assert committed_on_disk(job.root) == {(1, 1), (1, 2)}


def test_a_leader_that_stops_while_it_decides_leaves_the_others_in_doubt_not_in_error(tmp_path: Path) -> None:
    point = ("commit.before_manifest", 1)
    job = Job(tmp_path / "root", tmp_path / "oracle", 0, False, point, (0,), "stop", timeout_s=TIMEOUT_S)
    with wake_later(job.oracle, 0, TIMEOUT_S + GRACE_S):
        outcomes = run_ranks(2, run, job, check=False, store_host="agent")
    told = verdicts(job)[1][-1]
    assert told["kind"] == "CommitInDoubt"
    assert f"rank 0 ({socket.gethostname()}, pid " in told["text"]
    assert told["took"] <= TIMEOUT_S + GRACE_S
    assert outcomes[0].ok, outcomes[0]  # it woke, and did commit: this is what the other one was told to reckon with
    assert open_checkpoint(job.root).step == 3
    assert open_checkpoint(job.root).verify(mode="full").ok
