"""Any layout to any other: each is saved once, and every layout loads every save, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_models import LAYOUTS, barrier, build, make_state, reference, same_bits, whole
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from distckpt import CheckpointConfig, CheckpointManager, open_checkpoint
from distckpt.engines.base import clean_fqn


def manager(root: Path, model: Any, optimizer: Any, **options: Any) -> CheckpointManager:
    config = CheckpointConfig(root, preemption_signals=(), control_file=None, verbose=False, threads=2,
                              max_consecutive_failures=0, **options)
    return CheckpointManager(config, model=model, optimizer=optimizer)


def fill(m: CheckpointManager) -> None:
    """Put the reference values in place, through torch's own distribution where a tensor is distributed."""
    state = m.engine.state(optimizer=True)
    for fqn, leaf in state.tensors.items():
        ref = reference(fqn, leaf.shape, getattr(torch, leaf.dtype))
        for box, tensor in leaf.parts:
            tensor.copy_(ref[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))])
    m.engine.finish(set(state.tensors), {}, optimizer=True)


def named_state(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Return every tensor whole, under the format's names, as torch itself gathers it."""
    out = {}
    if isinstance(model, FullyShardedDataParallel):
        options = StateDictOptions(full_state_dict=True)
        model_state, optim_state = get_state_dict(model, optimizer, options=options)
        out |= {f"model.{clean_fqn(k)}": v for k, v in model_state.items()}
        for fqn, values in optim_state["state"].items():
            out |= {f"optim.state.{clean_fqn(fqn)}.{k}": v for k, v in values.items()}
        return out
    names = {}
    for name, value in model.state_dict().items():
        out[f"model.{clean_fqn(name)}"] = whole(value)
    for name, parameter in model.named_parameters():
        names[parameter] = clean_fqn(name)
    for parameter, values in optimizer.state.items():
        out |= {f"optim.state.{names[parameter]}.{k}": whole(v) for k, v in values.items()}
    return out


def check(model: Any, optimizer: Any) -> int:
    checked = 0
    for fqn, value in named_state(model, optimizer).items():
        if not value.numel() and fqn != "model.empty":
            continue  # FSDP1 gathers to rank 0 only
        ref = reference(fqn, tuple(value.shape), value.dtype)
        assert same_bits(value, ref), f"{fqn}: {value} instead of {ref}"
        checked += 1
    lrs = {p.shape: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert set(lrs.values()) <= {0.5, 0.25}
    return checked


def save_one(rank: int, kind: str, world: int, root: Path, mode: str) -> int:
    model, optimizer = build(kind, rank, world)
    make_state(optimizer)
    with manager(root, model, optimizer, mode=mode) as m:
        fill(m)
        assert check(model, optimizer) > 0
        assert m.save(epoch=1, step=7, metrics={"loss": 1.0}) is not None
    return sum(leaf.local_nbytes for leaf in m.engine.state(optimizer=True).tensors.values())


def local_bytes(model: Any, optimizer: Any) -> list[torch.Tensor]:
    """Return what this rank's memory has of parameters, buffers and optimizer state, as bytes."""
    values = [t for state in optimizer.state.values() for t in state.values()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *model.buffers(), *values)]
    return [t.detach().clone().reshape(-1).view(torch.uint8) for t in local]


def load_all(rank: int, kind: str, world: int, roots: dict[str, Path]) -> dict[str, int]:
    """Load every save. The first is compared as torch gathers it, and others with what lay in memory then: bit for bit too."""
    model, optimizer = build(kind, rank, world)
    done: dict[str, int] = {}
    first: list[torch.Tensor] = []
    for name, root in roots.items():
        with manager(root, model, optimizer) as m:
            if optimizer.state:
                for tensor in (t for v in optimizer.state.values() for t in v.values()):
                    tensor.zero_()
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.zero_()
            report = m.load(7, load_rng_state=False, prove=True)
            assert report.missing == report.unexpected == [], (name, report)
            loaded = local_bytes(model, optimizer)
            if not first:
                first = loaded
                assert check(model, optimizer) > 0
            assert len(loaded) == len(first) and all(map(torch.equal, loaded, first)), name
            assert all(g["lr"] in (0.5, 0.25) for g in optimizer.param_groups), name
            done[name] = len(loaded)
        barrier()
    return done


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {}
    for name, (kind, world) in LAYOUTS.items():
        roots[name] = tmp_path_factory.mktemp(name)
        run_ranks(world, save_one, kind, world, roots[name], "sharded")
    return roots


def in_the_long_run(name: str) -> bool:
    """Every save is loaded in any case. Loaders with three ranks lie between two and four; FSDP1's four take longest."""
    return LAYOUTS[name][1] == 3 or name == "fsdp1-4"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if in_the_long_run(n) else n for n in LAYOUTS])
def test_every_layout_loads_every_save(name: str, saved: dict[str, Path]) -> None:
    kind, world = LAYOUTS[name]
    for done in run_ranks(world, load_all, kind, world, saved):
        assert set(done) == set(saved)
        assert min(done.values()) > 0


@pytest.mark.parametrize("name", ["ddp-3", "hsdp-4", "fsdp2-3", "fsdp2+tp-4"])
def test_replicated_bytes_are_written_once_and_spread(name: str, saved: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(saved[name])
    unique = sum(info.nbytes for info in checkpoint.tensors.values())
    whole_bytes = sum(t.numel() * t.element_size() for t in checkpoint.state_dict("").values())
    assert unique <= whole_bytes
    assert checkpoint.verify(mode="full").ok


@pytest.mark.parametrize("name", ["fsdp2-3", "tp-2", "fsdp2+tp-4", "pp-2", "ddp-2", "one-1"])
def test_full_mode_writes_one_shard_with_whole_tensors(name: str, tmp_path: Path) -> None:
    kind, world = LAYOUTS[name]
    run_ranks(world, save_one, kind, world, tmp_path, "full")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.verify(mode="full").ok
    for info in checkpoint.tensors.values():
        assert len(info.boxes) == 1
    for fqn, value in checkpoint.state_dict("").items():
        assert same_bits(value, reference(fqn, tuple(value.shape), value.dtype)), fqn
    run_ranks(2, load_all, "fsdp2", 2, {"full": tmp_path})


def test_offline_reading_gives_the_same_bits(saved: dict[str, Path]) -> None:
    for name, root in saved.items():
        checkpoint = open_checkpoint(root)
        values = copy.copy(checkpoint.state_dict(""))
        assert "model.head.weight" in values, name
        for fqn, value in values.items():
            assert same_bits(value, reference(fqn, tuple(value.shape), value.dtype)), (name, fqn)
