"""Background saves at the end of a process, and on several ranks: nothing is lost, ranks act alike, no collective runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layout_models import same_bits, whole
from manager_support import Net, Part, manager, mutate, snapshot, steps_in, train, wait_for
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distckpt import failpoints, open_checkpoint, resume_training
from distckpt.errors import ReplicasDiffer, SaveFailed
from distckpt.manager import pipeline, state_copy
from distckpt.manager.manager import CheckpointManager

SCRIPT = """
import sys, torch
sys.path[:0] = {path!r}
from distckpt import CheckpointConfig, CheckpointManager
model = torch.nn.Linear(3000, 3000)
m = CheckpointManager(CheckpointConfig({root!r}, async_save=True, threads=3), model)
m.save(step=1)
model.weight.data.zero_()
assert m._saver.busy
{end}
"""


def test_the_interpreter_does_not_end_before_the_save(tmp_path: Path) -> None:
    ends = {"falls off": "", "exits": "sys.exit(7)", "raises": "raise RuntimeError('over')"}
    codes = {"falls off": 0, "exits": 7, "raises": 1}
    env = {**os.environ, "DISTCKPT_FAILPOINT": "save.begun:0:sleep=0.5", "OMP_NUM_THREADS": "1"}
    running = {}
    for name, end in ends.items():
        script = SCRIPT.format(path=[str(Path.cwd())], root=str(tmp_path / name), end=end)
        running[name] = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)
    for name, process in running.items():
        _, errors = process.communicate(timeout=60)
        assert process.returncode == codes[name], errors
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.step == 1, errors
        assert checkpoint.read("model.weight").abs().max() > 0


def sharded(rank: int, root: Path) -> int:
    """FSDP2 on 2 ranks: no collective of any kind in three background saves, the right values in each."""
    torch.manual_seed(0)
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    shadow = Part({n: p.detach().clone() for n, p in model.named_parameters()})  # an EMA, say: sharded tensors
    for buffer in model.buffers():  # batch norm statistics are not synchronised by FSDP2
        buffer.zero_()
    m = manager(root, model, optimizer, stateful={"shadow": shadow}, async_save=True, save_every_steps=1)
    group = dist.distributed_c10d._get_default_group()
    wanted = {}
    for step in (1, 2, 3):
        wanted[step] = {n: whole(t).clone() for n, t in snapshot(model, optimizer).items()}
        before = group._get_sequence_number_for_group()
        failpoints.arm("writer.chunk:0:sleep=0.1")
        assert m.step(step, metrics={"loss": 1.0}) is not None
        mutate(model, optimizer)
        m.wait()
        failpoints.arm("")
        assert group._get_sequence_number_for_group() == before
    assert m.pipeline.arena.allocations == 1
    m.close()
    for state in shadow.state.values():
        state.zero_()
    report = resume_training(root, model, optimizer, stateful={"shadow": shadow}, prove=True)  # at once after the other
    for name, value in snapshot(model, optimizer).items():
        assert same_bits(whole(value), wanted[3][name]), name
    first = wanted[1]["model.up.weight"]
    assert same_bits(whole(shadow.state["up.weight"]), first)
    dist.barrier()
    for step in (1, 2, 3):
        checkpoint = open_checkpoint(root / f"step-{step:010d}")
        for name, value in wanted[step].items():
            assert same_bits(checkpoint.read(name), value), (step, name)
    return len(report.loaded)


def test_fsdp2_saves_use_no_collective_and_hold_the_values_at_save_time(tmp_path: Path) -> None:
    first, second = run_ranks(2, sharded, tmp_path)
    assert first == second > 20


def busy_on_one_rank(rank: int, root: Path) -> list[Any]:
    """Rank 1 is still writing when rank 0 is idle again: both must skip, both must go on."""
    model = DistributedDataParallel(torch.nn.Linear(300, 300))
    out: list[Any] = []
    with manager(root, model, async_save=True, on_busy="skip") as m:
        m.save(step=1)
        m.wait()
        failpoints.arm("save.verdict:0:sleep=1.0" if rank == 1 else "")
        m.save(step=2)
        if rank == 0:
            wait_for(lambda: not m._saver.busy)
        dist.barrier()
        out.append(m.save(step=3) is None)
        failpoints.arm("")
        m.wait()
        with torch.no_grad():
            model.module.bias += 1
        out.append(m.save(step=4) is None)
    return out


def fails_on_one_rank(rank: int, root: Path) -> str:
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.AdamW(model.parameters())
    with manager(root, model, optimizer, async_save=True, retries=0) as m:
        failpoints.arm("writer.opened:1:raise=ENOSPC" if rank == 1 else "")
        m.save(step=1)
        with pytest.raises(SaveFailed) as caught:
            m.wait()
        failpoints.arm("")
        train(model, optimizer)  # batch norm statistics differ between ranks now, as DDP leaves them
        m.save(step=2)
        m.wait()
        if rank == 1:
            with torch.no_grad():
                model.module.up.weight[0, 0] += 1
    other = CheckpointManager(m.config, model, optimizer)
    with other as m:
        m.resume(prove=True)
        with torch.no_grad():
            model.module.down.bias += rank
        m.save(step=3)
        with pytest.raises(ReplicasDiffer, match=r"model.down.bias \(ranks \[0\] / \[1\]\)"):
            m.wait()
        with torch.no_grad():
            model.module.down.bias -= rank
    return str(caught.value)


def test_ranks_skip_and_fail_together(tmp_path: Path) -> None:
    assert run_ranks(2, busy_on_one_rank, tmp_path / "busy") == [[True, False]] * 2
    assert steps_in(tmp_path / "busy") == [1, 2, 4]
    first, second = run_ranks(2, fails_on_one_rank, tmp_path / "fails")
    assert first == second
    assert "rank 1" in first
    assert "No space left" in first
    assert steps_in(tmp_path / "fails") == [2]


def changed_while_copying(rank: int, root: Path) -> list[Any]:
    """Pipeline stages: the copy begins by the plan of the save before, and holds only if that is still every rank's."""
    model = torch.nn.Sequential()
    model.add_module(f"stage{rank}", torch.nn.Linear(100, 100))
    moved: list[str] = []
    stopped: list[int] = []
    move, stop, agree = state_copy.move, state_copy.StateCopy.stop, pipeline.agree_plan
    out: list[Any] = []

    def counted(target: int, source: int, nbytes: int) -> None:
        moved.append(threading.current_thread().name)
        move(target, source, nbytes)

    def late(*args: Any, **options: Any) -> Any:
        wait_for(lambda: len(moved) >= 2)  # weight and bias, before any rank knows what the others have
        return agree(*args, **options)

    with pytest.MonkeyPatch.context() as patch, manager(root, model, async_save=True) as m:
        patch.setattr(state_copy, "move", counted)
        patch.setattr(state_copy.StateCopy, "stop", lambda copy: stopped.append(1) or stop(copy))
        for step in (1, 2, 3, 4, 5):
            fill(model, step)
            moved.clear()
            if step == 2:
                patch.setattr(pipeline, "agree_plan", late)
            elif step == 3:
                patch.setattr(pipeline, "agree_plan", agree)
                if rank == 1:
                    model.add_module("more", torch.nn.Linear(10, 10))
                    fill(model, step)
            elif step == 4:
                with pytest.raises(SaveFailed, match="different steps"):
                    m.save(step=40 + rank)
                out.append([t.name for t in threading.enumerate() if t.name == "distckpt-stage"])
            assert m.save(step=step) is not None
            fill(model, -1.0)
            m.wait()
            out.append((step, set(moved) == {"distckpt-stage"}, len(stopped)))
    return out


def fill(model: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_a_copy_begun_before_the_ranks_agree_is_made_again_if_they_have_another_plan(tmp_path: Path) -> None:
    first, second = run_ranks(2, changed_while_copying, tmp_path)
    assert [told[2] for told in first if len(told) == 3] == [0, 0, 1, 2, 2]  # another's table had changed; no agreement
    assert [told[2] for told in second if len(told) == 3] == [0, 0, 0, 1, 1]  # its own: nothing was begun
    assert first[1][1] and second[1][1]  # all of it while the ranks agreed
    assert [told for told in first + second if len(told) != 3] == [[], []]  # nobody copies any more
    for step in (1, 2, 3, 4, 5):
        checkpoint = open_checkpoint(tmp_path / f"step-{step:010d}")
        assert len(checkpoint.tensors) == (4 if step < 3 else 6)
        for name in checkpoint.tensors:
            assert (checkpoint.read(name) == step).all(), (step, name)
