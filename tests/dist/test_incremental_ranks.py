"""Incremental saves of several ranks: any layout, loaded into any other, by the manager and by DCP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from layout_models import build, make_state
from ranks import run_ranks
from test_layouts import check, fill, manager
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distckpt import open_checkpoint
from distckpt.dcp import DistckptStorageReader
from distckpt.errors import SaveFailed
from distckpt.format import reuse
from distckpt.format.lineage import Committed

ROWS, COLUMNS = 2000, 256  # of 1 KiB


def spoil(m: Any) -> None:
    """Change what a step of LoRA would: a few tensors, the others stay."""
    with torch.no_grad():
        for fqn, leaf in m.engine.state(optimizer=True).tensors.items():
            if "blocks.1" in fqn or "wave" in fqn:
                for _, tensor in leaf.parts:
                    tensor.zero_()


def save_two(rank: int, kind: str, world: int, root: Path, background: bool) -> tuple[int, int]:
    reuse.LEAST_SHARE = 0.0  # the files are mostly header here
    model, optimizer = build(kind, rank, world)
    make_state(optimizer)
    with manager(root, model, optimizer, incremental=True, async_save=background) as m:
        sizes = []
        for step in (1, 2):
            fill(m)
            if step == 1:
                spoil(m)
            assert m.save(step=step) is not None
            m.wait()
            sizes.append(sum(leaf.local_nbytes for leaf in m.engine.state(optimizer=True).tensors.values()))
    return sizes[0], sizes[1]


def load_and_save(rank: int, kind: str, world: int, root: Path, newest: int) -> None:
    reuse.LEAST_SHARE = 0.0
    model, optimizer = build(kind, rank, world)
    with manager(root, model, optimizer, incremental=True) as m:
        report = m.resume(prove=True)
        assert report is not None
        assert report.step == newest
        assert check(model, optimizer) > 0
        assert m.save(step=newest + 1) is not None  # from another layout: what does not match is written


def load_with_dcp(rank: int, world: int, root: Path) -> None:
    model, optimizer = build("fsdp2", rank, world)
    make_state(optimizer)
    model_state, optim_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optim_state}
    dcp.load(state, storage_reader=DistckptStorageReader(root / "step-0000000002"))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert check(model, optimizer) > 0


@pytest.mark.parametrize(
    ("kind", "world", "background", "loaders"),
    [("fsdp2", 2, True, [("one", 1), ("fsdp2", 2)]), ("2d", 4, False, [("ddp", 3)])],
)
def test_every_layout_loads_an_incremental_save(
    tmp_path: Path, kind: str, world: int, background: bool, loaders: list[tuple[str, int]]
) -> None:
    run_ranks(world, save_two, kind, world, tmp_path, background)
    newest = open_checkpoint(tmp_path)
    assert newest.verify("full").ok
    (reference,) = newest.manifest.references  # each rank refers to its own earlier shard
    assert reference.paths == [f"{reference.attempt}/{rank:05d}-of-{world:05d}.safetensors" for rank in range(world)]
    assert 0 < reference.used < reference.size == sum(newest.store.size(path) for path in reference.paths)
    run_ranks(3, load_with_dcp, 3, tmp_path)
    for step, (other, ranks) in enumerate(loaders, 2):
        run_ranks(ranks, load_and_save, other, ranks, tmp_path, step)
        for folder in tmp_path.glob("step-*"):
            assert not list(folder.glob("manifest-*")) or open_checkpoint(folder).verify("full").ok


class Table(nn.Module):
    """An embedding sharded by rows, one sharded by columns, and a replicated one."""

    def __init__(self, world: int) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (world,))
        whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
        for name, placement in (("rows", Shard(0)), ("columns", Shard(1)), ("copies", Replicate())):
            setattr(self, name, nn.Parameter(distribute_tensor(whole.clone(), mesh, [placement])))

    def touch(self, start: int, stop: int, value: float) -> None:
        """Set some rows of all three, each rank its own part."""
        with torch.no_grad():
            self.copies.to_local()[start:stop] = value
            self.columns.to_local()[start:stop] = value
            local = self.rows.to_local()
            low = (ROWS + 1) // 2 * self.rows.device_mesh.get_local_rank() if self.rows.device_mesh.size() > 1 else 0
            local[max(0, start - low) : max(0, stop - low)] = value


def expected(steps: int) -> torch.Tensor:
    whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    for step in range(2, steps + 1):
        whole[100 * step : 100 * step + 40] = -step
    return whole


def save_tables(rank: int, root: Path) -> list[int]:
    model, nbytes = Table(2), []
    with manager(root, model, None, incremental=True, block_bytes=64 << 10, save_total_limit=2) as m:
        for step in range(1, 6):
            if step > 1:
                model.touch(100 * step, 100 * step + 40, -step)
            before = m.store.counters["bytes_written"]
            assert m.save(step=step) is not None
            nbytes.append(m.store.counters["bytes_written"] - before)
    return nbytes


def load_tables(rank: int, world: int, root: Path) -> None:
    model = Table(world)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().zero_()
    with manager(root, model, None) as m:
        for step in (4, 5):
            assert m.load(step, prove=True).step == step
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter.full_tensor(), expected(step)), (step, name)


def test_partly_changed_shards_of_any_cut_load_at_any_world_size(tmp_path: Path) -> None:
    by_rank = run_ranks(2, save_tables, tmp_path)
    for nbytes in by_rank:
        assert all(n < 0.2 * nbytes[0] for n in nbytes[1:])
    for world in (1, 2, 3):
        run_ranks(world, load_tables, world, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.verify("full").ok
    for name in ("rows", "columns", "copies"):
        assert torch.equal(checkpoint.read(f"model.{name}"), expected(5))
    assert {r.attempt.partition("/")[0] for r in checkpoint.manifest.references} >= {
        "step-0000000001",
        "step-0000000003",
    }


def save_then_lose_base(rank: int, root: Path) -> list[str]:
    """One rank's file of the checkpoint before is gone: that rank alone writes everything."""
    model = Table(2)
    with manager(root, model, None, incremental=True, retries=0) as m:
        m.save(step=1)
        m.agreement.round("lose", b"", lambda _: b"".join([lose(root)]))
        m.save(step=2)
        said = [path.rpartition("/")[2] for r in open_checkpoint(root).manifest.references for path in r.paths]
        m.agreement.round("read", b"", lambda _: b"")
        if rank == 0:
            m.root.store.delete(Committed(2, 1, "step-0000000002/manifest-g000001.json").manifest_path)
        m.agreement.round("gone", b"", lambda _: b"")
        m.save(step=3)
        assert not open_checkpoint(root).manifest.references
        return said


def lose(root: Path) -> bytes:
    next(root.glob("step-0000000001/g*/00001-*")).unlink()
    return b""


def test_a_rank_whose_earlier_shard_is_gone_writes_everything(tmp_path: Path) -> None:
    for said in run_ranks(2, save_then_lose_base, tmp_path):
        assert said == ["00000-of-00002.safetensors"]


def one_fails(rank: int, root: Path) -> Any:
    from distckpt import failpoints

    model = Table(2)
    with manager(root, model, None, incremental=True, block_bytes=64 << 10, retries=0, timeout_s=20.0) as m:
        m.save(step=1)
        model.touch(0, 10, 5.0)
        if rank == 1:
            failpoints.arm("shard.compared:1:raise=EIO")
        with pytest.raises(SaveFailed, match="rank 1"):
            m.save(step=2)
        m.failures = 0
        m.save(step=3)
        assert [len(r.paths) for r in open_checkpoint(root).manifest.references] == [2]


def test_one_rank_that_fails_while_comparing_fails_the_save_on_all(tmp_path: Path) -> None:
    run_ranks(2, one_fails, tmp_path)
    assert open_checkpoint(tmp_path).verify("full").ok
