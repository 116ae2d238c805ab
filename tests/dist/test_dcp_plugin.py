"""dcp.save, dcp.load and dcp.async_save over our storage, and both ways between DCP and the manager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layout_models import build, make_state, reference, same_bits, whole
from ranks import RanksFailed, run_ranks
from test_layouts import check, fill, manager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from distckpt import open_checkpoint
from distckpt.dcp import DistckptStorageReader, DistckptStorageWriter
from distckpt.errors import CorruptCheckpoint


def app_state(model: Any, optimizer: Any) -> dict[str, Any]:
    model_state, optim_state = get_state_dict(model, optimizer)
    ema = {"shadow": {"w": torch.arange(6.0)}, "decay": 0.9, "names": ("a", "b")}
    return {"model": model_state, "optim": optim_state, "ema": ema, "epoch": 3}


def dcp_save(rank: int, world: int, root: Path, mode: str) -> None:
    model, optimizer = build("fsdp2", rank, world)
    make_state(optimizer)
    fill(manager(root, model, optimizer))
    state = app_state(model, optimizer)
    writer = DistckptStorageWriter(root, step=5)
    if mode == "sync":
        dcp.save(state, storage_writer=writer)
        return
    future = dcp.async_save(state, storage_writer=writer)
    future.result()


def dcp_load(rank: int, world: int, root: Path) -> None:
    model, optimizer = build("fsdp2", rank, world)
    make_state(optimizer)
    state = app_state(model, optimizer)
    state["ema"] = {"shadow": {"w": torch.zeros(6)}, "decay": 0.0, "names": None}
    state["epoch"] = 0
    dcp.load(state, storage_reader=DistckptStorageReader(root))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert check(model, optimizer) > 0
    assert {g["lr"] for g in optimizer.param_groups} == {0.5, 0.25}
    if "ema" in state and open_checkpoint(root).manifest.engine == "dcp":
        assert state["epoch"] == 3
        assert state["ema"]["decay"] == 0.9
        assert torch.equal(state["ema"]["shadow"]["w"], torch.arange(6.0))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_dcp_round_trip_on_other_world_sizes(tmp_path: Path, mode: str) -> None:
    run_ranks(2, dcp_save, 2, tmp_path, mode, backend="gloo")
    for world in (2, 3):
        run_ranks(world, dcp_load, world, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.step == 5
    assert checkpoint.verify(mode="full").ok
    for fqn, value in checkpoint.state_dict("model.").items():
        assert same_bits(value, reference(f"model.{fqn}", tuple(value.shape), value.dtype)), fqn
    assert checkpoint.objects["ema"]["decay"] == 0.9
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".metadata", ".distcp", ".pt")]


class _Ema:
    def __init__(self) -> None:
        self.state: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": {"w": torch.zeros(6)}, "decay": 0.0, "names": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def manager_loads(rank: int, world: int, root: Path) -> None:
    from distckpt import CheckpointConfig, CheckpointManager

    model, optimizer = build("fsdp2", rank, world)
    ema = _Ema()
    config = CheckpointConfig(root, preemption_signals=(), control_file=None, verbose=False)
    with CheckpointManager(config, model=model, optimizer=optimizer, stateful={"ema": ema}) as m:
        report = m.load("latest", exclude=("epoch", "rng"), load_rng_state=False)
    assert check(model, optimizer) > 0
    assert report.missing == report.unexpected == []
    assert ema.state["decay"] == 0.9
    assert ema.state["names"] == ("a", "b")
    assert torch.equal(ema.state["shadow"]["w"], torch.arange(6.0))


def test_the_manager_loads_what_dcp_saved(tmp_path: Path) -> None:
    run_ranks(2, dcp_save, 2, tmp_path, "sync")
    run_ranks(3, manager_loads, 3, tmp_path)


def manager_saves(rank: int, world: int, root: Path) -> None:
    model, optimizer = build("fsdp2", rank, world)
    make_state(optimizer)
    with manager(root, model, optimizer) as m:
        fill(m)
        m.save(step=9)


def dcp_loads_manager(rank: int, world: int, root: Path) -> None:
    model, optimizer = build("fsdp2", rank, world)
    make_state(optimizer)
    model_state, optim_state = get_state_dict(model, optimizer)
    for group in optim_state["param_groups"]:
        group["lr"] = 0.0
    state = {"model": model_state, "optim": optim_state}
    dcp.load(state, storage_reader=DistckptStorageReader(root))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert check(model, optimizer) > 0
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [0.25, 0.5]
    for name, value in model.state_dict().items():
        assert same_bits(whole(value), reference(f"model.{name}", tuple(value.shape), value.dtype))


def test_dcp_loads_what_the_manager_saved(tmp_path: Path) -> None:
    run_ranks(2, manager_saves, 2, tmp_path)
    run_ranks(4, dcp_loads_manager, 4, tmp_path)


def saves_twice(rank: int, root: Path) -> None:
    writer = DistckptStorageWriter(root)
    for step in (1, 2):
        dcp.save({"w": torch.full((4,), float(step))}, checkpoint_id=root / f"step-{step:010}", storage_writer=writer)


def test_one_writer_saves_several_checkpoints(tmp_path: Path) -> None:
    run_ranks(2, saves_twice, tmp_path)
    assert [open_checkpoint(tmp_path / f"step-{s:010}").read("w")[0].item() for s in (1, 2)] == [1.0, 2.0]


def loads_damaged(rank: int, root: Path) -> str:
    state = {"w": torch.zeros(1000)}
    try:
        dcp.load(state, storage_reader=DistckptStorageReader(root))
    except BaseException as error:
        return repr(error)
    return "loaded"


def saves_one(rank: int, root: Path, value: Any) -> None:
    dcp.save({"w": torch.ones(1000), "object": value}, storage_writer=DistckptStorageWriter(root, step=1))
    dist.barrier()


def test_damage_is_refused(tmp_path: Path) -> None:
    run_ranks(2, saves_one, tmp_path, {"plain": 1})
    for shard in tmp_path.rglob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    answers = run_ranks(2, loads_damaged, tmp_path)
    assert any(CorruptCheckpoint.__name__ in a or "ShardError" in a for a in answers)
    assert "loaded" not in answers


class Unknown:
    pass


def test_objects_that_need_pickle_are_refused_at_save_time(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="UnserializableState"):
        run_ranks(2, saves_one, tmp_path, Unknown())
    assert not list(tmp_path.rglob("manifest*"))
