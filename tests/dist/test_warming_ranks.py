"""Loads that fetch ahead: only what the rank will want whole, and the same bits and errors as without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from manager_support import assert_same, manager, snapshot
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distckpt.dcp import warming
from distckpt.errors import CorruptCheckpoint
from distckpt.storage.probes import evict

SIZE = 1 << 20
FETCHED = "bytes_fetched_ahead"


def shards(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def net(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(1024, SIZE // 1024)


def one(root: Path) -> nn.Linear:
    """Save a model and its optimizer on one process."""
    model = net(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    with manager(root, model, optimizer) as m:
        m.save(step=1)
    evict(shards(root))
    return model


def loaded(root: Path, *, optimizer: bool = True, **options: object) -> tuple[nn.Linear, int]:
    """Load the newest; returns the model and the bytes that were fetched ahead."""
    model = net(1)
    with manager(root, model, torch.optim.AdamW(model.parameters()) if optimizer else None) as m:
        m.load("latest", **options)  # type: ignore[arg-type]
        return model, m.store.counters[FETCHED]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "LEAST", 0)


def test_a_whole_load_fetches_the_shard_and_a_part_of_one_nothing(tmp_path: Path) -> None:
    wanted = snapshot(one(tmp_path))
    model, fetched = loaded(tmp_path)
    assert_same(snapshot(model), wanted)
    assert 0 < fetched <= shards(tmp_path)[0].stat().st_size
    for part in ({"load_optimizer": False}, {"include": ("model.*",)}, {"exclude": ("optim.*",)}):
        evict(shards(tmp_path))
        model, fetched = loaded(tmp_path, strict=False, **part)
        assert_same(snapshot(model), wanted)
        assert fetched == 0
    evict(shards(tmp_path))
    assert loaded(tmp_path, optimizer=False, strict=False)[1] == 0


def test_damage_is_told_as_without(tmp_path: Path) -> None:
    one(tmp_path)
    path = shards(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    evict([path])
    with pytest.raises(CorruptCheckpoint, match=r"do not match their digest"):
        loaded(tmp_path)
    path.write_bytes(content[: SIZE // 2])
    with pytest.raises(CorruptCheckpoint, match=r"rank 0"):
        loaded(tmp_path)


def save_and_load(rank: int, root: Path, kind: str) -> tuple[int, int]:
    warming.LEAST = 0
    model = fully_shard(net(0)) if kind == "cut" else DistributedDataParallel(net(0))
    with manager(root, model) as m:
        m.save(step=1)
    torch.distributed.barrier()
    evict(shards(root)) if rank == 0 else None
    torch.distributed.barrier()
    again = fully_shard(net(1)) if kind == "cut" else DistributedDataParallel(net(1))
    with manager(root, again) as m:
        report = m.load(1)
        pairs = zip(model.parameters(), again.parameters(), strict=True)
        for wanted, found in pairs:
            a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (wanted, found))
            assert torch.equal(a, b)
        return m.store.counters[FETCHED], report.headers_read


def test_a_rank_fetches_its_own_shard_and_nothing_that_all_want(tmp_path: Path) -> None:
    for fetched, headers in run_ranks(2, save_and_load, tmp_path / "cut", "cut"):
        assert 0 < fetched <= max(path.stat().st_size for path in shards(tmp_path / "cut"))
        assert headers == 1
    assert [fetched for fetched, _ in run_ranks(2, save_and_load, tmp_path / "alike", "alike")] == [0, 0]
