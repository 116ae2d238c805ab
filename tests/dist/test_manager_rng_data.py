"""Randomness and data order: bit for bit on the same ranks, no sample lost or repeated on others."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manager_support import Net, Part, manager
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from distckpt import ResumableSampler, open_checkpoint
from distckpt.engines.rng import capture_rng, fingerprint
from distckpt.errors import ReplicasDiffer

STEPS = 14


def job(rank: int, root: Path, log: Path, kill_at: int | None) -> list[str]:
    """Train on 2 ranks with every kind of randomness, saving in the background; may be killed between two steps."""
    torch.manual_seed(7)
    net = Net()
    random.seed(rank), np.random.seed(rank), torch.manual_seed(100 + rank)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    data = torch.randn(22, 4, generator=torch.Generator().manual_seed(3))
    sampler = ResumableSampler(data, seed=5)
    loader = DataLoader(data, batch_size=3, sampler=sampler, drop_last=False)
    with manager(root, model, optimizer, scheduler=scheduler, stateful={"sampler": sampler}, async_save=True,
                 save_every_steps=3) as m:
        report = m.resume(prove=True)
        step = report.step if report else 0
        while step < STEPS:
            for batch in sampler.track(loader):
                noise = float(np.random.rand()) + random.random() + torch.rand(()).item()
                loss = model(batch * noise).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                step += 1
                with log.open("a") as file:
                    print(json.dumps([step, rank, loss.item().hex()]), file=file)
                m.step(step, epoch=sampler.epoch, metrics={"loss": loss.item()})
                if step == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if step == STEPS:
                    break
    return [] if report is None else [str(report.step), *report.rederived]


def losses(log: Path) -> dict[tuple[int, int], set[str]]:
    out: dict[tuple[int, int], set[str]] = {}
    for line in log.read_text().splitlines():
        step, rank, loss = json.loads(line)
        out.setdefault((step, rank), set()).add(loss)
    return out


def test_killed_at_a_random_step_it_continues_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(2, job, tmp_path / "whole", tmp_path / "whole.log", None)
    wanted = losses(tmp_path / "whole.log")
    assert len(wanted) == 2 * STEPS
    assert {len(found) for found in wanted.values()} == {1}
    kill_at = random.SystemRandom().randrange(6, STEPS)  # the save of step 3 is committed before that of step 6 begins
    outcomes = run_ranks(2, job, tmp_path / "cut", tmp_path / "cut.log", kill_at, check=False)
    assert signal.SIGKILL in [o.signal for o in outcomes]
    resumed = run_ranks(2, job, tmp_path / "cut", tmp_path / "cut.log", None)
    assert 0 < int(resumed[0][0]) <= kill_at
    assert resumed[0][1:] == []  # nothing had to be re-derived
    assert losses(tmp_path / "cut.log") == wanted, f"killed at step {kill_at}"


def walk(rank: int, root: Path, world: int, steps: int, seed: int) -> tuple[list[int], list[str], str, int]:
    """Go some steps through a shuffled epoch of 60 samples; returns the samples seen and what was re-derived."""
    random.seed(seed + rank)
    model = torch.nn.Linear(1, 1)
    sampler = ResumableSampler(60, seed=11)
    own, lost = Part({"rank": rank}), Part({"rank": rank})
    loader = DataLoader(range(60), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    seen: list[int] = []
    options: dict[str, Any] = {"per_rank": ("own",), "drop_on_resize": ("lost",)}
    with manager(root, model, stateful={"sampler": sampler, "own": own, "lost": lost}, **options) as m:
        report = m.resume()
        state = fingerprint(capture_rng())
        own_rank, lost_rank = own.state["rank"], lost.state["rank"]
        assert (own_rank, lost_rank) == (rank, rank)
        for batch in sampler.track(loader):
            seen += batch.tolist()
            steps -= 1
            if steps == 0:
                break
        own.state, lost.state = {"rank": rank}, {"rank": rank}
        with torch.no_grad():
            model.weight.fill_(sampler.consumed)
            model.bias.fill_(0.0)
        m.save(step=sampler.consumed)
    return seen, report.rederived if report else [], state, sampler.consumed


def test_world_size_2_then_3_then_1_sees_every_sample_once(tmp_path: Path) -> None:
    results = []
    for world, steps in ((2, 5), (3, 4), (1, 99)):
        results.append(run_ranks(world, walk, tmp_path, world, steps, 1000 * world))
    seen = Counter(sample for ranks in results for samples, *_ in ranks for sample in samples)
    assert seen == Counter(range(60))
    assert [ranks[0][3] for ranks in results] == [20, 44, 60]
    for _, rederived, _, _ in results[1]:  # every rank's report has all ranks' notes
        assert rederived == [
            "lost: left as it is, it means nothing on another world size",
            "own: rank 2 is new and keeps its own",
            "rng of rank 2: new rank, derived from rank 0's state (rule distckpt-rng-1)",
        ]
    assert len({state for _, _, state, _ in results[1]}) == 3  # no two ranks share a stream
    assert results[2][0][1] == [
        "own of ranks 1..2: not used, the job is smaller now",
        "lost: left as it is, it means nothing on another world size",
        "rng of ranks 1..2: not used, the job is smaller now",
    ]


@pytest.fixture
def streams() -> Iterator[None]:
    before = fingerprint(capture_rng())
    yield
    assert fingerprint(capture_rng()) == before


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("options", [{}, {"async_save": True}, {"mode": "full"}, {"save_rng_state": False}])
def test_taking_a_checkpoint_leaves_every_generator_untouched(tmp_path: Path, options: dict[str, Any]) -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.set_rng_state(state[0])
    with manager(tmp_path, model, optimizer, **options) as m:
        m.resume()
        for step in range(3):
            m.save(step=step)
            m.step(step, metrics={"loss": 1.0})
        m.load(1, load_rng_state=False, prove=True)


def test_the_same_rank_gets_its_own_stream_back(tmp_path: Path) -> None:
    model = Net()
    with manager(tmp_path, model) as m:
        m.save(step=1)
        wanted = random.random(), float(np.random.rand()), torch.rand(()).item()
        m.load(1)
        assert (random.random(), float(np.random.rand()), torch.rand(()).item()) == wanted
        m.load(1, load_rng_state=False)
        assert random.random() != wanted[0]


def replicas(rank: int, root: Path) -> list[str]:
    """Declare as replicated what is not; then the same per rank."""
    torch.manual_seed(0)
    errors = []
    net = torch.nn.Linear(3, 2)
    model = DistributedDataParallel(net)
    with manager(root / "a", model, stateful={"mine": Part({"rank": rank})}) as m:
        with pytest.raises(ReplicasDiffer) as caught:
            m.save(step=1)
        errors.append(str(caught.value))
    parts = {"mine": Part({"rank": rank, "t": torch.full((2,), rank)}), "cursor": Part({"at": rank})}
    with manager(root / "b", model, stateful=parts, per_rank=("mine", "cursor")) as m:
        m.save(step=1)
        parts["mine"].state = parts["cursor"].state = None
        m.load(1)
        assert parts["mine"].state["rank"] == parts["cursor"].state["at"] == rank
        assert parts["mine"].state["t"].tolist() == [rank, rank]
    if rank == 1:
        with torch.no_grad():
            net.bias[1] += 1
    with manager(root / "c", model) as m:
        with pytest.raises(ReplicasDiffer) as caught:
            m.save(step=1)
        errors.append(str(caught.value))
        with torch.no_grad():
            net.bias.zero_()
        assert m.save(step=1) is not None
    return errors


def test_replicas_that_differ_are_named_and_nothing_is_committed(tmp_path: Path) -> None:
    for errors in run_ranks(2, replicas, tmp_path):
        assert "object 'mine' differs between ranks [0] / [1]" in errors[0]
        assert "per_rank=('mine',)" in errors[0]
        assert "model.bias (ranks [0] / [1])" in errors[1]
        assert "model.weight" not in errors[1]
    assert not list((tmp_path / "a").glob("step-*/manifest-*"))
    assert open_checkpoint(tmp_path / "c").verify(mode="full").ok
