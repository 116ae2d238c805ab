"""A tiny two-rank training job for the crash tests: it resumes, saves, and dies where it is told to.

Everything that the outside has to know (what each rank held, what was acknowledged, how long a verdict took, which
failpoints were passed) is appended to a file outside the checkpoint root before the next thing happens, so that it
survives the job. The file is the supervisor's oracle.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers and DTensor import it at their first use: once here, not in every rank
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distckpt import CheckpointConfig, CheckpointManager, failpoints
from distckpt.dcp import writer
from distckpt.format import digest as digests
from distckpt.manager.report import LoadReport

LIMIT = 2  # checkpoints that the job keeps
HEALTHY = 2  # saves of each job before the one that may go wrong: the third removes an old checkpoint


@dataclass(frozen=True)
class Job:
    """What one job does. ``point``: failpoint and its n-th hit at which the victims die, in the save after HEALTHY.

    ``victims`` are the ranks that die: one rank, or all of them at the moment the first of them gets there. With
    ``endless`` it saves until it is killed from outside, at most that many times.
    """

    root: Path
    oracle: Path
    number: int = 0
    background: bool = False
    point: tuple[str, int] | None = None
    victims: tuple[int, ...] = ()
    action: str = "kill"
    timeout_s: float = 2.0
    endless: int = 0
    trace: bool = False
    cut: Callable[[], None] = lambda: None
    incremental: bool = False
    """Save incrementally a model of which a part is frozen, and of one tensor only some rows change."""


class Oracle:
    """Appends events to the file, one write each.

    A kill may cut one off where a page of the file ends, so each begins with a line of its own.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.rank = rank
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def tell(self, event: str, **fields: Any) -> None:
        os.write(self.fd, b"\n" + json.dumps({"event": event, "rank": self.rank, **fields}).encode() + b"\n")


class Watched(list[str]):
    """A record of failpoint hits that the oracle hears of; at one of them it kills all ranks at once.

    ``cut``: cut the power of the file system there first (see ``test_power_cut``).
    """

    def __init__(
        self,
        oracle: Oracle,
        point: tuple[str, int] | None = None,
        pids: tuple[int, ...] = (),
        cut: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.oracle, self.point, self.pids, self.cut, self.count = oracle, point, pids, cut, 0

    def append(self, hit: str) -> None:
        self.oracle.tell("hit", at=hit)
        if self.point is None or hit.partition("@")[0] != self.point[0]:
            return
        self.count += 1
        if self.count == self.point[1]:
            self.cut()
            for pid in sorted(self.pids, key=lambda pid: pid == os.getpid()):
                os.kill(pid, signal.SIGKILL)


class Stage(nn.Module):
    """A sharded parameter, a replicated one, and one that only this rank has; ``frozen``: also one that stands still."""

    def __init__(self, rank: int, world: int, frozen: bool = False) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (world,))
        rows = torch.arange(1003).chunk(world)[rank].numel()
        local = torch.zeros(rows, 4)
        self.sharded = nn.Parameter(
            DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(1003, 4), stride=(4, 1))
        )
        self.shared = nn.Parameter(torch.zeros(300))
        self.register_parameter(f"own{rank}", nn.Parameter(torch.zeros(77, dtype=torch.bfloat16)))
        if frozen:
            self.shared_frozen = nn.Parameter(torch.arange(30_000.0), requires_grad=False)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Training:
    """Model and optimizer, whose values depend on all steps and job numbers so far, in bits."""

    def __init__(self, rank: int, world: int, number: int, frozen: bool = False) -> None:
        self.rank, self.number, self.frozen = rank, number, frozen
        self.model = Stage(rank, world, frozen)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def train(self, step: int) -> None:
        for position, (name, parameter) in enumerate(self.model.named_parameters()):
            if not parameter.requires_grad:
                continue
            own = self.rank if name != "shared" else 0
            grad = torch.empty_like(parameter)
            values = torch.arange(local(grad).numel(), dtype=torch.float32).reshape(local(grad).shape)
            local(grad).copy_(torch.sin(values + step * 1.3 + self.number * 0.7 + own * 0.1 + position))
            if self.frozen and name == "sharded":
                local(grad)[100:] = 0  # only the first rows of each rank change
            parameter.grad = grad
        self.optimizer.step()

    def digests(self) -> dict[str, str]:
        """Digest of what this rank holds of each tensor, by the name it is stored under."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[f"model.{name}"] = digest_of(local(parameter.detach()))
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optim.state.{name}.{key}"] = digest_of(local(value))
        return found


def digest_of(tensor: torch.Tensor) -> str:
    return digests.digest(memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B"))


def run(rank: int, job: Job) -> None:
    """One rank of one job. Raises what the manager raises; the oracle knows the rest."""
    logging.getLogger("distckpt").setLevel(logging.CRITICAL)
    writer.REQUEST = 4096  # small state in several requests: more places to die at
    oracle = Oracle(job.oracle, rank)
    training = Training(rank, dist.get_world_size(), job.number, job.incremental)
    config = CheckpointConfig(
        job.root, save_total_limit=LIMIT, async_save=job.background, preemption_signals=(), control_file=None,
        timeout_s=60.0, retries=0, max_consecutive_failures=0, orphan_grace_s=0.0, threads=2, verbose=False,
        incremental=job.incremental, block_bytes=4096 if job.incremental else 1 << 20,
    )  # fmt: skip
    manager = CheckpointManager(config, model=training.model, optimizer=training.optimizer)
    report = manager.resume()
    tell_resumed(oracle, manager, training, report)
    step, took = (report.step if report else 0), 0.0
    for _ in range(HEALTHY):
        step, took = step + 1, save(manager, training, oracle, step + 1)
    manager.wait()
    oracle.tell("healthy", step=step, pid=os.getpid(), took=took)
    hurry(manager, job.timeout_s)
    arm(job, oracle, manager)
    for _ in range(job.endless or 1):
        step += 1
        save(manager, training, oracle, step)
    manager.close()
    oracle.tell("over", step=step)


def tell_resumed(oracle: Oracle, manager: CheckpointManager, training: Training, report: LoadReport | None) -> None:
    if report is None:
        oracle.tell("resumed", step=None, generation=manager.generation)
    else:
        oracle.tell(
            "resumed", step=report.step, source=report.generation, generation=manager.generation,
            digests=training.digests(), fallbacks=report.fallbacks,
        )  # fmt: skip


def save(manager: CheckpointManager, training: Training, oracle: Oracle, step: int) -> float:
    """Train a step and save it; the oracle hears of the attempt, then of the verdict. Returns the seconds it took."""
    training.train(step)
    oracle.tell("begin", step=step, generation=manager.generation, digests=training.digests())
    started = time.monotonic()
    try:
        path = manager.save(step=step)
        manager.wait()
        assert path is not None
    except Exception as error:
        took = time.monotonic() - started
        oracle.tell("failed", step=step, kind=type(error).__name__, text=str(error), took=took)
        raise
    took = time.monotonic() - started
    oracle.tell("acknowledged", step=step, generation=manager.generation, took=took)
    return took


def hurry(manager: CheckpointManager, timeout_s: float) -> None:
    """From here on ranks give each other up after this many seconds; before, a loaded machine gets more time."""
    object.__setattr__(manager.config, "timeout_s", timeout_s)  # frozen, and shared by all parts of the manager
    manager.agreement.timeout_s = timeout_s


def arm(job: Job, oracle: Oracle, manager: CheckpointManager) -> None:
    pids = tuple(p.pid for p in manager.agreement.peers() if p is not None)
    everyone = len(job.victims) == len(pids)
    if job.trace or everyone:
        failpoints.record(Watched(oracle, job.point if everyone else None, pids, job.cut))
    if job.point is not None and not everyone and manager.agreement.rank in job.victims:
        name, nth = job.point
        failpoints.arm(f"{name}:{nth}:{job.action}")
