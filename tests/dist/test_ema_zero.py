"""Averages of ZeRO's fp32 masters: right, swapped in and out, resumed under any other layout, counted by real steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layout_models import same_bits
from ranks import run_ranks

pytest.importorskip("deepspeed")
import deepspeed_support
from zero_models import Job

from distckpt import CheckpointConfig, CheckpointManager, EMAModel, open_checkpoint

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "z1-3": ("z1", 3, {}),
    "z2-bf16-2": ("z2", 2, BF16),
    "z3-2": ("z3", 2, {}),
    "z3-bf16-offload-3": (
        "z3",
        3,
        {**BF16, "zero": {"stage3_param_persistence_threshold": 8, "sub_group_size": 50, "offload_optimizer": {"device": "cpu"}}},
    ),
    "z0-bf16-2": ("z0", 2, BF16),
}


def manager(job: Job, ema: EMAModel, root: Path) -> CheckpointManager:
    config = CheckpointConfig(root, preemption_signals=(), control_file=None, verbose=False, threads=2, timeout_s=30,
                              max_consecutive_failures=0)  # fmt: skip
    objects = {"engine": job.engine} if job.engine is not None else {"model": job.model, "optimizer": job.optimizer}
    return CheckpointManager(config, **objects, stateful={"ema": ema})


def masters(job: Job) -> dict[str, torch.Tensor]:
    return {fqn: job._whole_parameter(parameter).float().clone() for fqn, parameter in job.named()}


def train(rank: int, name: str, root: Path) -> list[str]:
    kind, _, options = KINDS[name]
    job = Job(kind, **options)
    ema = EMAModel(job.engine, decay=0.5)
    wanted = masters(job)
    for number in range(3):
        job.step(number)
        assert ema.update()
        assert not ema.update()  # no step since: a micro-batch
        wanted = {n: wanted[n] + 0.5 * (v - wanted[n]) for n, v in masters(job).items()}
    wrong = []
    job.link_all_groups()
    before = job.whole_state()
    with ema.averaged():
        for fqn, value in masters(job).items():
            if not torch.allclose(value, wanted[fqn], rtol=1e-6, atol=1e-7):
                wrong.append(f"swapped {fqn}")
        wrong += [f"low-precision {fqn}" for fqn in job.stale_weights()]
    after = job.whole_state()
    wrong += [f"restored {n}" for n in before if not same_bits(before[n], after[n])]
    wrong += [f"restored low-precision {fqn}" for fqn in job.stale_weights()]
    with manager(job, ema, root) as m:
        m.save(step=3)
    if rank == 0:
        found = open_checkpoint(root).state_dict("ema.")
        trained = {n for n, p in job.named() if p.requires_grad}
        wrong += [f"stored {n}" for n in trained if not torch.allclose(found[n], wanted[n], rtol=1e-6, atol=1e-7)]
        wrong += [] if found.keys() == job.net.state_dict().keys() else [f"names {sorted(found)}"]
    return wrong


def go_on(rank: int, kind: str, source: Path, target: Path) -> int:
    """Load a checkpoint under another layout, save it again as it is, then train and average one step."""
    job = Job(kind, scheduled=False, seed=9)
    ema = EMAModel(job.engine if job.engine is not None else job.model, decay=0.9)
    with manager(job, ema, source) as m:
        report = m.load(3, load_rng_state=False, cast="any", prove=True, exclude=("scheduler*",))
    assert report.missing == report.unexpected == []
    assert "ema: average: decay 0.9 was set, goes on with the saved decay 0.5" in report.rederived
    with manager(job, ema, target) as m:
        m.save(step=3)
    job.step(3)
    assert ema.update()
    with ema.averaged():
        pass
    return ema.updates


@pytest.mark.parametrize("name", KINDS)
def test_masters_are_averaged_and_go_on_under_any_layout(name: str, tmp_path: Path) -> None:
    world = KINDS[name][1]
    assert run_ranks(world, train, name, tmp_path / "0") == [[]] * world
    first = open_checkpoint(tmp_path / "0").state_dict("ema.")
    # ZeRO to FSDP2 to one process and back to ZeRO, with other numbers of ranks.
    chain = [("fsdp2", 2), ("one", 1), ("z3", 3)] if name in ("z3-2", "z2-bf16-2") else [("fsdp2", 3)]
    for number, (kind, ranks) in enumerate(chain, start=1):
        source, target = tmp_path / str(number - 1), tmp_path / str(number)
        assert run_ranks(ranks, go_on, kind, source, target) == [4] * ranks
        found = open_checkpoint(target).state_dict("ema.")
        assert found.keys() == first.keys()
        for fqn, value in found.items():
            assert same_bits(value.float(), first[fqn].float()), (kind, fqn)


def skipping(rank: int) -> list[bool]:
    job = Job("z2", gradient_accumulation_steps=2)
    ema = EMAModel(job.engine, decay=0.5)
    counted = []
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        tokens = torch.randint(0, 13, (3, 2), generator=generator)
        loss = torch.nn.functional.cross_entropy(job.engine(tokens[:, 0]), tokens[:, 1])
        job.engine.backward(loss)
        job.engine.step()
        if number == 3:
            job.engine.skipped_steps += 1  # what DeepSpeed does after an overflow, beside global_steps
        counted.append(ema.update())
    return counted


def test_micro_batches_and_overflows_of_deepspeed_do_not_count() -> None:
    assert run_ranks(2, skipping) == [[False, True, False, False, False, True]] * 2


def moved_away(rank: int) -> list[str]:
    """Let DeepSpeed move its masters elsewhere between updates: the average follows, or says that it cannot."""
    job = Job("z3")
    ema = EMAModel(job.engine, decay=0.5)
    wanted = masters(job)
    job.step(0)
    with torch.no_grad():
        for flat in job.engine.optimizer.fp32_partitioned_groups_flat:
            flat.data = flat.data.clone()  # other memory, as after offload_states() and reload_states()
    job.step(1)
    ema.update()
    now = masters(job)
    with ema.averaged():
        return [n for n, v in masters(job).items() if not torch.allclose(v, (wanted[n] + now[n]) / 2, atol=1e-6)]


def test_masters_that_deepspeed_moved_are_followed() -> None:
    assert run_ranks(2, moved_away) == [[], []]


assert deepspeed_support is not None  # imported for what it does before ranks fork
