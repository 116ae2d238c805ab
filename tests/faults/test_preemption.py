"""A preemption notice on any one rank: one agreed save at the next step boundary, exit code 85, within a budget."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_job import Training
from ranks import run_ranks

from distckpt import CheckpointConfig, CheckpointManager, clock, failpoints, open_checkpoint
from distckpt.manager.preempt import EXIT_PREEMPTED, Preempted


def manager_of(root: Path, training: Training, **options: Any) -> CheckpointManager:
    config = CheckpointConfig(
        root,
        **{
            "timeout_s": 60.0,
            "control_file": None,
            "verbose": False,
            "threads": 2,
            "max_consecutive_failures": 0,
            **options,
        },
    )
    return CheckpointManager(config, model=training.model, optimizer=training.optimizer)


def preempted(
    rank: int, root: Path, victim: int, name: str, background: bool
) -> tuple[int | None, Any, str, dict[str, str]]:
    """Train until the notice, which comes in the middle of step 3 on one rank; then try to go on for ever."""
    training = Training(rank, 2, 0)
    with manager_of(root, training, async_save=background, save_every_steps=2) as manager:
        manager.resume()
        for step in range(1, 100):
            training.train(step)
            if step == 3 and rank == victim:
                os.kill(os.getpid(), signal.Signals[name])
            try:
                manager.step(step, metrics={"loss": 1.0 / step})
            except Preempted as left:
                return left.step, left.code, left.reason, training.digests()
    raise AssertionError("the notice was not heard")


def resumed(rank: int, root: Path) -> tuple[int | None, dict[str, str]]:
    training = Training(rank, 2, 0)
    with manager_of(root, training) as manager:
        report = manager.resume()
    assert report is not None
    return report.step, training.digests()


@pytest.mark.parametrize("background", [False, True], ids=["synchronous", "background"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_on_one_rank_is_one_save_on_all(victim: int, name: str, background: bool, tmp_path: Path) -> None:
    ends = run_ranks(2, preempted, tmp_path, victim, name, background)
    for step, code, reason, _ in ends:
        assert (step, code) == (3, EXIT_PREEMPTED)
        assert reason == f"preempted: {name} on rank {victim}"
    assert open_checkpoint(tmp_path).verify(mode="full").ok
    for rank, (step, found) in enumerate(run_ranks(2, resumed, tmp_path)):
        assert step == 3
        assert found == ends[rank][3]


# ---- the budget


def hindered(rank: int, root: Path) -> tuple[Any, Any, float, int]:
    """The save after the notice takes longer than the budget, on one rank."""
    training = Training(rank, 2, 0)
    with manager_of(root, training, save_every_steps=1, preemption_budget_s=1.5, retries=5) as manager:
        manager.step(1)
        training.train(2)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            failpoints.arm("writer.chunk:1:sleep=4")
        begun = failpoints.record()
        started = time.monotonic()
        with pytest.raises(Preempted) as left:
            manager.step(2)
        took = time.monotonic() - started
    return left.value.code, left.value.path, took, sum(hit.startswith("save.begin@") for hit in begun)


def test_a_save_that_does_not_fit_the_budget_is_given_up_and_not_repeated(tmp_path: Path) -> None:
    for code, path, took, attempts in run_ranks(2, hindered, tmp_path):
        assert (code, path) == (EXIT_PREEMPTED, None)
        assert attempts == 1
        assert took < 1.5 + 5 + 4  # of a timeout of 60 s with 5 retries
    assert open_checkpoint(tmp_path).step == 1


def tightest(rank: int, root: Path) -> float:
    training = Training(rank, 2, 0)
    with manager_of(root, training, preemption_budget_s=1000.0) as manager:
        if rank == 1:  # its notice came 700 s ago: a step took that long
            watch = manager.schedule.watch
            assert watch is not None
            watch._requested = ("SIGTERM", clock.monotonic() - 700)
        assert manager.schedule.decide(1, None, {}) is not None
        return manager.schedule.budget_s


def test_the_budget_counts_from_the_earliest_signal_on_all_ranks(tmp_path: Path) -> None:
    for left in run_ranks(2, tightest, tmp_path):
        assert 200 < left <= 300


# ---- under torchrun

SCRIPT = """
    import os, sys, time
    from pathlib import Path
    import torch, torch.distributed as dist
    from distckpt import CheckpointConfig, CheckpointManager

    dist.init_process_group("gloo")
    out = Path(sys.argv[1])
    model = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.fill_(1.0), model.bias.fill_(2.0)
    with CheckpointManager(CheckpointConfig(out / "root", verbose=False, timeout_s=30), model=model) as manager:
        manager.resume()
        (out / f"ready{dist.get_rank()}").touch()
        try:
            for step in range(1, 2000):
                time.sleep(0.01)
                manager.step(step)
        except SystemExit as left:
            (out / f"left{dist.get_rank()}").write_text(f"{left.code} {left.step}")
            raise
"""


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(tmp_path),
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield job
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def test_sigterm_to_torchrun_saves_on_all_ranks(torchrun: subprocess.Popen[str], tmp_path: Path) -> None:
    end = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert torchrun.poll() is None, torchrun.communicate()[0]
        assert time.monotonic() < end, "torchrun did not start"
        time.sleep(0.02)
    torchrun.send_signal(signal.SIGTERM)
    output = torchrun.communicate(timeout=60)[0]
    left = [(tmp_path / f"left{rank}").read_text() for rank in (0, 1)]
    assert left[0] == left[1], output
    code, step = map(int, left[0].split())
    assert code == EXIT_PREEMPTED
    assert open_checkpoint(tmp_path / "root").step == step
    assert not re.search(r"Traceback.*distckpt", output), output
