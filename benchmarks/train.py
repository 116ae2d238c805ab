"""Saving in a training loop: what a save costs training over the whole window, not how fast its call returns.

A fixed computation is stepped; every so often a peer saves in the background. The loop goes on until the last save is
durable. Lost time is the wall time of those steps less that of as many steps without saves, which are run before and
after as the probe of this turn. The *stall* of a save is its call, the wait for its copy before the next optimizer step,
and by how much that step took longer than the window's other ones (a copy may be hooked into it; what writing costs them all is
lost time).

The model computes on one thread, as a job on accelerators leaves most host cores idle; ``--full`` also has it on all.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import tasks
from benchmarks.payload import Live, Noise
from benchmarks.run import Bench, Row, folder_for, merged, palindrome, settle
from benchmarks.shapes import TensorSpec, Workload
from benchmarks.worker import Worker

PEERS = ("distckpt", "distckpt-lazy", "dcp-async-thread", "dcp-async-process", "torch_checkpointing", "torchsnapshot")
STEPS, EVERY, PROBE_STEPS = 24, 8, 12
"""Steps of a window, how many lie between saves, and steps of a probe."""
MOST_STEPS = 400
WIDTH, BATCH = 512, 128


class Trained(Live):
    """A model and its optimizer as a live state; ``fill`` is training."""

    def __init__(self, nbytes: int, threads: int) -> None:
        torch.manual_seed(1)
        blocks = max(1, round(nbytes / 12 / (8 * WIDTH * WIDTH)))
        layers: list[nn.Module] = []
        for _ in range(blocks):
            layers += [nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        self.threads = threads
        self.data = torch.randn(BATCH, WIDTH)
        self.rank, self.world, self.mesh, self.locals, self.noise = 0, 1, None, [], Noise()
        self.train_step()
        self.collect()

    def collect(self) -> None:
        """Take up the tensors, as a state dict would name them."""
        self.plain = {}
        for name, parameter in self.model.named_parameters():
            self.plain[f"weights.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                self.plain[f"optim.{name}.{key}"] = value
        self.tensors: dict[str, Any] = dict(self.plain)
        specs = tuple(TensorSpec(n, tuple(t.shape), "float32") for n, t in self.plain.items())
        self.workload = Workload("train", "a model in training", specs)
        self.nbytes = self.workload.nbytes

    def train_step(self, before_step: Any = None) -> tuple[float, float]:
        """Take one step; returns the seconds of waiting before the optimizer, and of the optimizer itself."""
        torch.set_num_threads(self.threads)
        self.model(self.data).square().mean().backward()
        started = time.perf_counter()
        if before_step is not None:
            before_step()
        waited = time.perf_counter()
        self.optimizer.step()
        ended = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=False)
        return waited - started, ended - waited

    def digest(self) -> dict[str, int]:
        """Return a number for each tensor that any changed bit changes."""
        return {name: hash(tensor.numpy().tobytes()) for name, tensor in self.plain.items()}


# ---------------------------------------------------------------------- commands


def make(worker: Worker, nbytes: int, threads: int) -> int:
    """Build the model; return the bytes of its state."""
    worker.close_peers()
    tasks._forget_plans()
    live = Trained(nbytes, threads)
    worker.live = live
    return live.nbytes


def plain_steps(worker: Worker, steps: int) -> float:
    """Train without saving; return steps a second."""
    live = _trained(worker)
    started = time.perf_counter()
    for _ in range(steps):
        live.train_step()
    return steps / (time.perf_counter() - started)


def _trained(worker: Worker) -> Trained:
    live = tasks.state_of(worker)
    assert isinstance(live, Trained)
    return live


def saving_steps(worker: Worker, name: str, root: Path, first: int, steps: int, every: int) -> dict[str, Any]:
    """Train and save every few steps; go on until the last save is durable."""
    live, peer = _trained(worker), worker.peer(name)
    out: dict[str, Any] = {}
    calls: list[float] = []
    after: list[tuple[float, float]] = []
    others: list[float] = []
    windows: list[float] = []
    taken = pending = 0
    with tasks.quiet(), tasks.measured(worker, out):
        began = 0.0
        while taken < steps or pending:
            waited, optimizer = live.train_step(peer.fence if pending or calls else None)
            if len(after) < len(calls):  # the step right after a save
                after.append((waited, optimizer))
            else:
                others.append(optimizer)
            taken += 1
            if pending and peer.done():
                peer.finish()
                windows.append(time.perf_counter() - began)
                pending = 0
            if taken < steps and taken % every == every // 2:
                if pending:
                    peer.finish()  # still busy: what that costs is lost time as well
                    windows.append(time.perf_counter() - began)
                began = time.perf_counter()
                peer.begin(root, first + taken, live)
                calls.append(time.perf_counter() - began)
                pending = 1
            if taken > MOST_STEPS:
                raise RuntimeError(f"a background save was not done after {MOST_STEPS} steps")
    usual = statistics.median(others)
    stalls = [call + wait + max(0.0, step - usual) for call, (wait, step) in zip(calls, after, strict=True)]
    return {**out, "steps": taken, "stalls": stalls, "windows": windows, "folder": str(peer.path(root, first + taken))}


def isolated(worker: Worker, name: str, root: Path, step: int) -> str:
    """Save in the background, train on meanwhile, load: ``equal`` if it is the state at the time of the call."""
    live, peer = _trained(worker), worker.peer(name)
    wanted = live.digest()
    with tasks.quiet():
        peer.begin(root, step, live)
        for _ in range(3):
            live.train_step(peer.fence)
        peer.finish()
        peer.load(root, step, live)
    live.collect()
    found = live.digest()
    wrong = [key for key, value in found.items() if wanted.get(key) != value]
    return "equal" if not wrong else f"different: {wrong[0]} and {len(wrong) - 1} more"


# ---------------------------------------------------------------------- the job


def training(bench: Bench) -> None:
    """Lost time and stall of each peer, in turn."""
    for threads in (1, 2) if bench.settings.full else (1,):
        with folder_for(bench, "train") as root:
            _training(bench, root, threads)


def _training(bench: Bench, root: Path, threads: int) -> None:
    pool = bench.pool(1, "trainer")
    nbytes = pool.call(make, bench.settings.nbytes // 4, threads)[0]
    name = "train" if threads == 1 else f"train, {threads} threads"
    failed: set[str] = set()

    def probe() -> dict[str, float]:
        return {"steps": pool.call(plain_steps, PROBE_STEPS)[0], **_copy(pool)}

    def turn(peer: str) -> Row:
        settle()
        first = bench.step() * 1000
        return merged_train(pool.call(saving_steps, peer, root, first, STEPS, EVERY), nbytes)

    peers = bench.usable(PEERS, pool)
    for peer in peers:  # first save: processes start, buffers grow, plans are made
        about: Row = {"workload": name, "world": 1, "part": "isolation", "peer": peer, "round": 0}
        bench.measure(about, partial(_isolation, bench, root, peer, nbytes), dict, failed=failed)
    for number in range(1, 1 + bench.settings.rounds):
        for peer in palindrome(peers):
            if peer not in failed:
                about = {"workload": name, "world": 1, "part": "train", "peer": peer, "round": number}
                bench.measure(about, partial(turn, peer), probe, shared=True, failed=failed)
    bench.release(1, "trainer")


def _isolation(bench: Bench, root: Path, peer: str, nbytes: int) -> Row:
    started = time.monotonic()
    check = bench.pool(1, "trainer").call(isolated, peer, root, bench.step() * 1000)[0]
    return {"check": check, "seconds": time.monotonic() - started, "nbytes": nbytes}


def _copy(pool: Any) -> dict[str, float]:
    start, end, nbytes = pool.call(copy_state)[0]
    return {"copy": nbytes / (end - start)}


def copy_state(worker: Worker) -> tuple[float, float, int]:
    """Copy the state of the model to touched memory: the limit of a blocking stall."""
    live = _trained(worker)
    rooms = worker.kept.setdefault("rooms", [torch.zeros_like(t) for t in live.plain.values()])
    started = time.monotonic()
    torch._foreach_copy_(rooms, list(live.plain.values()))
    return started, time.monotonic(), live.nbytes


def merged_train(replies: list[Any], nbytes: int) -> Row:
    """Return the row of a window; what is lost is worked out where the probes are (benchmarks.report)."""
    reply = replies[0]
    row = merged(replies, nbytes)
    return row | {
        "steps": reply["steps"], "saves": len(reply["stalls"]), "stall_seconds": statistics.median(reply["stalls"]),
        "stalls": reply["stalls"], "durable_seconds": statistics.median(reply["windows"]),
    }  # fmt: skip
