"""Two-rank jobs on an S3 bucket: saved, killed at any step of a commit, resumed, damaged, tidied, listed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cli_support import run as command
from cli_support import run_json as command_json
from crash_job import Job, Training
from crash_job import run as crash_run
from supervisor import read_events

from distckpt import CheckpointConfig, CheckpointManager, list_checkpoints, open_checkpoint
from distckpt.dcp import DistckptStorageReader, DistckptStorageWriter
from distckpt.format.catalog import find_checkpoint
from distckpt.manager.gc import collect
from distckpt.storage import open_store

if TYPE_CHECKING:
    from s3_support import S3

KILLS = [  # who dies, at which failpoint's n-th hit, in the third save of its job
    ((1,), ("writer.chunk", 2)),
    ((0,), ("create.before_temp", 1)),
    ((0, 1), ("create.linked", 1)),
]


@pytest.fixture
def root(bucket: str) -> str:
    return f"s3://{bucket}/team/run"


def crash_job(rank: int, fields: dict[str, Any]) -> None:
    crash_run(rank, Job(**fields))


def start(s3: S3, **fields: Any) -> list[Any]:
    return s3.ranks.run_ranks(2, crash_job, fields, check=False, timeout_s=60, store_host="agent")


def committed(root: str) -> list[tuple[int, int]]:
    return [(c.generation, c.step) for c in list_checkpoints(root)]


def test_jobs_that_are_killed_on_a_bucket_lose_nothing_and_go_on(
    s3: S3, bucket: str, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held: dict[tuple[int, int], dict[int, Any]] = {}
    acknowledged: set[tuple[int, int]] = set()
    read_to, oracle = 0, tmp_path / "oracle.jsonl"
    for number, (victims, point) in enumerate([*KILLS, ((), None)]):
        before = committed(root)
        background = bool(number % 2)
        outcomes = start(
            s3,
            root=root,
            oracle=oracle,
            number=number,
            background=background,
            point=point,
            victims=victims,
            timeout_s=1.5,
        )
        assert {o.rank for o in outcomes if o.signal == signal.SIGKILL} == set(victims), outcomes
        assert not any(o.timed_out for o in outcomes)
        events, read_to = read_events(oracle, read_to)
        resumed = [e for e in events if e["event"] == "resumed"]
        assert len(resumed) == 2
        for event in resumed:
            assert event["step"] == (before[0][1] if before else None)
            if before:
                assert event["digests"] == held[event["source"], event["step"]][event["rank"]]
                assert not event["fallbacks"]
        for event in events:
            if event["event"] == "begin":
                held.setdefault((event["generation"], event["step"]), {})[event["rank"]] = event["digests"]
            if event["event"] == "acknowledged":
                acknowledged.add((event["generation"], event["step"]))
        after = committed(root)
        assert max(acknowledged) in after
        assert set(after) <= held.keys()
        assert all(open_checkpoint(c.path).verify("full").ok for c in list_checkpoints(root))
    assert not any(o.signal or o.error for o in outcomes)

    code, out, _ = command(capsys, "ls", root)
    assert (code, f"step {after[0][1]}" in out or str(after[0][1]) in out) == (0, True)
    code, out, _ = command(capsys, "doctor", root)
    assert code == 1  # the killed jobs left their heartbeats
    assert "jobs were alive" in out
    report = collect(open_store(root), remove=[], grace_s=0.0, current_generation=len(KILLS) + 2, dry_run=False)
    assert committed(root) == after
    shards = [k for k in s3.ask("keys", name=bucket) if k.endswith(".safetensors")]
    assert len(shards) == 2 * len(after), report
    assert not [k for k in s3.ask("keys", name=bucket) if "probe" in k]


def save_two(rank: int, root: str) -> dict[int, dict[str, str]]:
    training, held = Training(rank, 2, 0), {}
    with manager_of(root, training) as manager:
        for step in (1, 2):
            training.train(step)
            held[step] = training.digests()
            assert manager.save(step=step, extra_state={"note": step}) == f"{root}/step-{step:010}"
    return held


def resume_one(rank: int, root: str) -> tuple[int, dict[str, str]]:
    training = Training(rank, 2, 1)
    with manager_of(root, training) as manager:
        report = manager.resume()
        assert report is not None
        return report.step, training.digests()


def manager_of(root: str, training: Training) -> CheckpointManager:
    config = CheckpointConfig(root, preemption_signals=(), verbose=False, threads=2, timeout_s=30.0)
    return CheckpointManager(config, model=training.model, optimizer=training.optimizer)


def test_damage_on_a_bucket_is_named_and_passed_over(
    s3: S3, bucket: str, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    held = s3.ranks.run_ranks(2, save_two, root)
    code, found = command_json(capsys, "doctor", root)
    assert (code, found["facts"]["storage"]["conditional_put"]) == (0, True)
    assert command(capsys, "show", f"{root}/step-0000000001")[0] == 0
    shard = find_checkpoint(root).manifest.shards[1]
    s3.ask("flip", name=bucket, key=f"team/run/step-0000000002/{shard.path}", offset=shard.size - 1)
    assert command(capsys, "verify", root, "--mode", "quick")[0] == 0  # headers and sizes are right
    code, report = command_json(capsys, "verify", root, "--mode", "full")
    assert code == 1
    assert shard.path in json.dumps(report)
    assert '"rank": 1' in json.dumps(report)
    for rank, (step, digests) in enumerate(s3.ranks.run_ranks(2, resume_one, root)):
        assert (step, digests) == (1, held[rank][1])


def dcp_round_trip(rank: int, root: str) -> None:
    state = {"w": torch.arange(1000.0) + rank * 0, "epoch": 3}
    dcp.save(state, storage_writer=DistckptStorageWriter(root, step=5))
    state = {"w": torch.zeros(1000), "epoch": 0}
    dist.barrier()
    dcp.load(state, storage_reader=DistckptStorageReader(root))
    assert torch.equal(state["w"], torch.arange(1000.0))
    assert state["epoch"] == 3


def test_dcp_saves_to_a_bucket_and_anyone_opens_it(s3: S3, root: str) -> None:
    s3.ranks.run_ranks(2, dcp_round_trip, root)
    for place in (root, f"{root}/", f"{root}/step-0000000005", open_checkpoint(root).store.url):
        checkpoint = open_checkpoint(place)
        assert (checkpoint.step, checkpoint.path) == (5, f"{root}/step-0000000005")
    assert torch.equal(checkpoint.read("w"), torch.arange(1000.0))
    assert checkpoint.verify("full").ok


# ---------------------------------------------------------------- how many requests


@pytest.fixture
def small(root: str) -> Iterator[tuple[CheckpointManager, torch.nn.ParameterDict]]:
    """A manager of 800 small tensors in one process."""
    model = torch.nn.ParameterDict({f"p{i:04}": torch.nn.Parameter(torch.full((999,), float(i))) for i in range(800)})
    config = CheckpointConfig(root, preemption_signals=(), control_file=None, verbose=False, timeout_s=30.0)
    with CheckpointManager(config, model=model) as manager:
        yield manager, model


def test_requests_follow_bytes_and_not_tensors(
    s3: S3, root: str, small: tuple[CheckpointManager, torch.nn.ParameterDict]
) -> None:
    manager, model = small
    s3.ask("watch")
    manager.save(step=1)
    first = s3.ask("seen")["requests"]
    s3.ask("watch")
    manager.save(step=2)
    second = s3.ask("seen")["requests"]
    for parameter in model.values():
        torch.nn.init.zeros_(parameter)
    s3.ask("watch")
    manager.load("latest")
    load = s3.ask("seen")["requests"]
    assert all(bool((parameter == i).all()) for i, parameter in enumerate(model.values()))
    data = [r for r in load if r.endswith(".safetensors")]
    assert len([r for r in data if r.startswith("GET")]) <= 3  # header, its rest, and 3 MB of data in one
    assert (len(first), len(second), len(load)) <= (60, 45, 25), (first, second, load)
    s3.ask("watch")
    offline = open_checkpoint(root).state_dict()
    assert len(offline) == 800
    assert len(s3.ask("seen")["requests"]) <= 25


def test_every_command_takes_a_url(s3: S3, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s3.ranks.run_ranks(2, save_two, root)
    step = f"{root}/step-0000000001"
    assert [c["step"] for c in command_json(capsys, "ls", f"{root}/")[1]["checkpoints"]] == [2, 1]
    for place in (root, step, find_checkpoint(step).store.url):
        assert command(capsys, "show", place)[0] == 0
        assert command(capsys, "verify", place)[0] == 0
    assert command(capsys, "pin", root, "--step", "1")[0] == 0
    assert "pinned" in command(capsys, "ls", root)[1]
    assert command(capsys, "unpin", root, "--step", "1")[0] == 0
    assert command(capsys, "gc", root)[0] == 0
    weights = tmp_path / "weights.pt"
    torch.save({"w": torch.arange(5000.0)}, weights)
    assert command(capsys, "convert", weights, f"{root}-imported")[0] == 0
    assert torch.equal(open_checkpoint(f"{root}-imported").state_dict()["w"], torch.arange(5000.0))
    assert command(capsys, "convert", f"{root}-imported", tmp_path / "out.pt", "--to", "torch")[0] == 0
    assert torch.equal(torch.load(tmp_path / "out.pt")["w"], torch.arange(5000.0))
    code, _, error = command(capsys, "ls", "s3:/lost/slash")
    assert (code, "two slashes" in error) == (2, True)
    code, _, error = command(capsys, "ls", f"{root}?region=here")
    assert (code, "environment" in error) == (2, True)
    code, _, error = command(capsys, "ls", "s3://typo-in-bucket/run")
    assert (code, "no such bucket" in error) == (1, True)


# ---------------------------------------------------------------- what is removed, and loads that wait for a network


def save_four(rank: int, root: str) -> dict[str, str]:
    training = Training(rank, 2, 0)
    with manager_of(root, training) as manager:
        for step in (1, 2, 3, 4):
            training.train(step)
            manager.save(step=step)
    return training.digests()


def test_what_gc_removes_from_a_bucket_is_gone_with_its_folders(
    s3: S3, bucket: str, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    held = s3.ranks.run_ranks(2, save_four, root)
    assert command(capsys, "gc", root, "--keep-last", "2")[0] == 0
    assert [step for _, step in committed(root)] == [4, 3, 2, 1]  # a dry run
    assert command(capsys, "gc", root, "--keep-last", "2", "--yes")[0] == 0
    assert [step for _, step in committed(root)] == [4, 3]
    keys = s3.ask("keys", name=bucket)
    assert {key.split("/")[2] for key in keys if "/step-" in key} == {"step-0000000003", "step-0000000004"}
    assert command(capsys, "verify", root, "--mode", "full")[0] == 0
    for rank, (step, digests) in enumerate(s3.ranks.run_ranks(2, resume_one, root)):
        assert (step, digests) == (4, held[rank])


def one_tensor(root: str, fill: float, **more: Any) -> tuple[CheckpointManager, torch.nn.ParameterDict]:
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.full((10 << 20,), fill))})
    config = CheckpointConfig(
        root, preemption_signals=(), control_file=None, verbose=False, timeout_s=40.0, threads=16, **more
    )
    return CheckpointManager(config, model=model), model


def load_shared(rank: int, root: str) -> int:
    manager, model = one_tensor(root, 0.0, share_loads="always")
    with manager:
        report = manager.load("latest")
    assert bool((model["w"] == 7.0).all())
    return report.read_bytes


def test_loads_have_as_many_ranges_in_flight_as_they_may_and_ranks_share_them(s3: S3, root: str) -> None:
    """A disk is busy with six reads; where each answer takes its time, the other threads count too."""
    manager, model = one_tensor(root, 7.0)
    with manager:
        manager.save(step=1)
        torch.nn.init.zeros_(model["w"])
        s3.ask("watch", delay=0.15)
        manager.load("latest")
        alone = s3.ask("seen")
    assert bool((model["w"] == 7.0).all())
    assert len(shard_reads(alone)) <= 40 // 4 + 3  # of 4 MiB, and the header
    assert alone["most"] > 6
    s3.ask("watch")
    read = s3.ranks.run_ranks(2, load_shared, root)
    assert 40 << 20 <= sum(read) <= (40 << 20) * 1.05
    assert len(shard_reads(s3.ask("seen"))) <= 40 // 4 + 2 * 3


def shard_reads(seen: dict[str, Any]) -> list[str]:
    return [r for r in seen["requests"] if r.startswith("GET") and r.endswith(".safetensors")]
