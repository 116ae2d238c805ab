"""Lazy staging on two ranks: DDP, FSDP2 and DeepSpeed commit what a blocking save does; one rank's failure is all ranks'."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layout_models import same_bits
from manager_support import Net, manager, steps_in, train
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distckpt import failpoints, open_checkpoint
from distckpt.errors import ConfigError, SaveFailed, SnapshotFailed

LATE = "staging.copy:0:sleep=0.2"


def assert_equal_checkpoints(root: Path, steps: list[int]) -> None:
    for step in steps:
        own, other = (open_checkpoint(root / kind / f"step-{step:010d}") for kind in ("lazy", "blocking"))
        assert own.verify(mode="full").ok
        assert own.tensors.keys() == other.tensors.keys()
        assert [n for n in own.tensors if not same_bits(own.read(n), other.read(n))] == []
        assert {k: repr(v) for k, v in own.objects.items()} == {k: repr(v) for k, v in other.objects.items()}


def sharded_or_replicated(rank: int, root: Path, kind: str) -> tuple[int, int]:
    """Each save is followed at once by a whole training step; returns bytes copied at once, and of all."""
    torch.manual_seed(0)
    model: Any = Net()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    if kind == "fsdp2":  # statistics are not synchronised there
        model.norm.track_running_stats = False
        for buffer in model.buffers():
            buffer.zero_()
    with manager(root / "blocking", model, optimizer) as blocking, manager(
        root / "lazy", model, optimizer, async_save=True, lazy_staging=True
    ) as m:
        group = dist.distributed_c10d._get_default_group()
        for step in (1, 2):
            blocking.save(step=step)
            before = group._get_sequence_number_for_group()
            failpoints.arm(LATE)
            m.save(step=step)
            assert group._get_sequence_number_for_group() == before
            train(model, optimizer)
            failpoints.arm("")
            assert m.pipeline.arena.allocations == 1
        return m.pipeline.arena.copied_at_once, m.pipeline.arena.nbytes


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_torch_layouts_commit_the_state_before_the_step(kind: str, tmp_path: Path) -> None:
    copied = run_ranks(2, sharded_or_replicated, tmp_path, kind)
    assert_equal_checkpoints(tmp_path, [1, 2])
    assert sum(now for now, _ in copied) == 8 + 8 * 4 * 2  # the batch norm's buffers, once
    assert sum(held for _, held in copied) > 8 * (8 + 8 * 4 * 2)


def unlike_ranks(rank: int, root: Path) -> list[str]:
    """One rank's copy dies, then one rank's weights change behind the fence, then one rank dies for good."""
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    errors = []
    with manager(root, model, optimizer, async_save=True, lazy_staging=True, max_consecutive_failures=1, retries=2) as m:
        failpoints.arm("staging.copy:1:raise=ENOMEM" if rank == 1 else "")
        m.save(step=1)
        train(model, optimizer)  # tolerated on both, whoever knows
        m.wait()
        assert m.failures == 1
        m.failures = 0
        failpoints.arm(LATE)
        m.save(step=2)
        if rank == 0:
            with torch.no_grad():
                model.module.up.weight.add_(0)
        object.__setattr__(m.config, "max_consecutive_failures", 0)
        with pytest.raises(SnapshotFailed) as caught:
            m.wait()
        errors.append(str(caught.value))
        failpoints.arm("")
        m.save(step=3)
        train(model, optimizer)
        m.wait()
        failpoints.arm("staging.copy:1:kill" if rank == 1 else "")
        object.__setattr__(m.config, "timeout_s", 2.0)
        m.save(step=4)
        with pytest.raises(SaveFailed):
            m.wait()
    return errors


def test_ranks_fail_together(tmp_path: Path) -> None:
    values = run_ranks(2, unlike_ranks, tmp_path, expect={1: signal.SIGKILL}, store_host="agent")
    assert "rank 0" in values[0][0]
    assert "model.up.weight changed while a lazy save was under way" in values[0][0]
    assert steps_in(tmp_path) == [3]
    assert open_checkpoint(tmp_path).verify(mode="full").ok


def fsdp1(rank: int, root: Path) -> str:
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    with pytest.raises(ConfigError) as caught:
        manager(root, model, torch.optim.AdamW(model.parameters()), async_save=True, lazy_staging=True)
    return str(caught.value)


def test_fsdp1_is_refused(tmp_path: Path) -> None:
    for text in run_ranks(2, fsdp1, tmp_path):
        assert "'fsdp1' cannot say what only optimizer steps change" in text


ZERO: dict[str, tuple[str, dict[str, Any]]] = {
    "z1-bf16": ("z1", {"bf16": {"enabled": True}}),
    "z2-offload": ("z2", {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    "z3": ("z3", {"zero": {"sub_group_size": 100}}),
}


def deepspeed_job(rank: int, root: Path, kind: str, options: dict[str, Any]) -> tuple[int, int]:
    from zero_models import Job

    job = Job(kind, scheduled=True, **options)
    for number in range(2):
        job.step(number)
    with job.manager(root / "blocking") as blocking, job.manager(
        root / "lazy", async_save=True, lazy_staging=True, timeout_s=20.0
    ) as m:
        for step in (1, 2):
            blocking.save(step=step)
            failpoints.arm(LATE)
            m.save(step=step)
            now = m.pipeline.arena.copied_at_once
            job.step(10 + step)
            failpoints.arm("")
        return now, m.pipeline.arena.nbytes


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_commits_the_state_before_the_step(name: str, tmp_path: Path) -> None:
    pytest.importorskip("zero_models")
    kind, options = ZERO[name]
    copied = run_ranks(2, deepspeed_job, tmp_path, kind, options, timeout_s=90)
    assert_equal_checkpoints(tmp_path, [1, 2])
    frozen_and_buffers = (6 * 9 + 6) * 4 + 6 * 4
    assert sum(now for now, _ in copied) <= frozen_and_buffers
