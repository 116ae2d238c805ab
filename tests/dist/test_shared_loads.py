"""Replicated loads: each byte is read once per group of ranks that want it, whatever happens on the way."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_models import build as build_layout
from layout_models import make_state, same_bits
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from distckpt import CheckpointConfig, CheckpointManager
from distckpt.boxes import Box
from distckpt.dcp import read_plan, share
from distckpt.dcp.read_plan import Request, Run
from distckpt.dcp.reader import CheckpointReader
from distckpt.errors import CorruptCheckpoint, StoreError
from distckpt.format.shard import StoredBox
from distckpt.storage import posix_reader
from distckpt.storage.direct import address

WIDTH = 200


def build(rank: int, fill: float) -> tuple[Any, torch.optim.Optimizer]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)), nn.Linear(WIDTH, 3), nn.LayerNorm(3))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) * fill * 1e-6 + index)
    return DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def manager(root: Path, model: Any, optimizer: Any, mode: str) -> CheckpointManager:
    config = CheckpointConfig(
        root,
        preemption_signals=(),
        control_file=None,
        verbose=False,
        threads=2,
        share_loads=mode,
        timeout_s=30.0,
        save_total_limit=None,
        max_consecutive_failures=0,
    )
    return CheckpointManager(config, model=model, optimizer=optimizer)


def train(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, WIDTH)).square().mean().backward()
    optimizer.step()


def save(rank: int, root: Path) -> None:
    model, optimizer = build(rank, 1.0)
    with manager(root, model, optimizer, "never") as m:
        for step in (1, 2):
            train(model, optimizer)
            m.save(step=step)


def load(rank: int, root: Path, mode: str, turn: int, which: int | str = 2, pays: bool | None = None) -> dict[str, Any]:
    share.TURN, read_plan.SPAN = turn, 64 << 10  # a tensor a request
    if pays is not None:
        share.LEAST_BYTES = 0
        share.sharing_pays = lambda members, rates: pays  # type: ignore[assignment]
    model, optimizer = build(rank, 0.0)
    with manager(root, model, optimizer, mode) as m:
        report = m.load(which, load_rng_state=False)
    state = {"model": model.module.state_dict(), "optim": optimizer.state_dict()["state"]}
    return {"read": report.read_bytes, "state": state, "step": report.step, "fallbacks": report.fallbacks}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return same_bits(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    run_ranks(3, save, root)
    return root


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("turn", [64 << 10, 8 << 20])
def test_each_byte_is_read_once_per_job(saved: Path, world: int, turn: int) -> None:
    alone = run_ranks(world, load, saved, "never", turn)
    shared = run_ranks(world, load, saved, "always", turn)
    assert sum(r["read"] for r in shared) == alone[0]["read"]
    assert all(
        0.9 * alone[0]["read"] < r["read"] <= alone[0]["read"] for r in alone
    )  # rank 0 reads the small ones for all
    assert all(r["read"] < alone[0]["read"] for r in shared)
    assert all(equal(r["state"], alone[0]["state"]) for r in (*alone, *shared))


def load_by(rank: int, root: Path, link: str) -> dict[str, Any]:
    """Load with every turn's end at another time on each rank; ``link`` may break the common memory of one rank."""
    if link == "sockets":
        share.common_memory = lambda *_: None  # type: ignore[assignment]
    if link == "one without" and rank == 1:
        os.memfd_create = _refused  # type: ignore[assignment]
    real = CheckpointReader._deliver

    def slowly(*args: Any, **options: Any) -> None:
        time.sleep(0.002 * rank)
        real(*args, **options)

    CheckpointReader._deliver = slowly  # type: ignore[method-assign]
    used: list[bool] = []
    made = share.common_memory
    share.common_memory = lambda *args: used.append((found := made(*args)) is not None) or found  # type: ignore[assignment]
    return load(rank, root, "always", 64 << 10) | {"common": used}


def _refused(*_: Any) -> int:
    raise OSError("no memfd here")


@pytest.mark.parametrize("link", ["common memory", "sockets", "one without"])
def test_ranks_of_one_host_share_by_memory_and_others_by_sockets(saved: Path, link: str) -> None:
    (alone,) = run_ranks(1, load, saved, "never", 64 << 10)
    shared = run_ranks(3, load_by, saved, link)
    assert [r["common"] for r in shared] == [[link == "common memory"]] * 3
    assert all(equal(r["state"], alone["state"]) for r in shared)
    assert sum(r["read"] for r in shared) < 1.1 * alone["read"]


def test_a_link_that_does_not_pay_ends_the_sharing(saved: Path) -> None:
    alone = run_ranks(2, load, saved, "never", 64 << 10)
    turned = run_ranks(2, load, saved, "auto", 64 << 10, 2, False)
    went_on = run_ranks(2, load, saved, "auto", 64 << 10, 2, True)
    assert alone[0]["read"] < sum(r["read"] for r in turned) < 2 * alone[0]["read"]
    assert sum(r["read"] for r in went_on) == alone[0]["read"]
    assert all(equal(r["state"], alone[0]["state"]) for r in (*turned, *went_on))


def test_what_memory_has_already_is_not_shared(saved: Path) -> None:
    for shard in saved.rglob("*.safetensors"):
        shard.read_bytes()
    alone = run_ranks(2, load, saved, "never", 64 << 10)
    cached = run_ranks(2, load, saved, "auto", 64 << 10, 2, True)
    forced = run_ranks(2, load, saved, "always", 64 << 10)
    assert [r["read"] for r in cached] == [r["read"] for r in alone]
    assert sum(r["read"] for r in forced) == alone[0]["read"]
    assert all(equal(r["state"], alone[0]["state"]) for r in (*cached, *forced))


def load_watched(rank: int, root: Path) -> list[bool]:
    """Load by common memory; returns of every read whether it went there."""
    made, fetch, common, into = share.common_memory, CheckpointReader._fetch, [], []

    def kept(*args: Any) -> Any:
        found = made(*args)
        common.extend(buffer for member in found or () for buffer in member)
        return found

    def watched(self: CheckpointReader, file: Any, request: Request, buffer: memoryview) -> None:
        where = address(buffer)
        into.append(any(address(part) <= where < address(part) + len(part) for part in common))
        fetch(self, file, request, buffer)

    share.common_memory, CheckpointReader._fetch = kept, watched  # type: ignore[method-assign]
    load(rank, root, "always", 64 << 10)
    assert common
    return into


def test_disks_read_into_huge_pages_and_never_into_common_memory(saved: Path) -> None:
    for into in run_ranks(2, load_watched, saved):
        assert into
        assert not any(into)


def load_hsdp(rank: int, root: Path, mode: str) -> int:
    model, optimizer = build_layout("hsdp", rank, 4)
    make_state(optimizer)
    with manager(root, model, optimizer, mode) as m:
        if mode == "never":
            m.save(step=1)
        return m.load(1, load_rng_state=False, prove=True).read_bytes


def test_replicas_of_a_shard_share_it(tmp_path: Path) -> None:
    alone = run_ranks(4, load_hsdp, tmp_path, "never")
    shared = run_ranks(4, load_hsdp, tmp_path, "always")
    assert alone[2] > 0 < alone[3]
    once = alone[0] + alone[1]  # ranks 0 and 2 hold the same shards, and 1 and 3
    assert 0.98 * once < sum(shared) <= once  # what lies between two kinds is not read


def load_columns(rank: int, root: Path, mode: str) -> Any:
    """Save rows and load columns of matrices; parts of vectors are each rank's own, a whole tensor is on every rank."""
    share.TURN, share.LEAST_BYTES = 1 << 20, 0
    mesh = init_device_mesh("cpu", (2,))

    def hold(columns: bool, fill: float) -> nn.Module:
        module = nn.Module()
        for number, rows in enumerate((600, 602, 1024)):  # some end in a block that only one rank's columns reach
            whole = torch.arange(rows * 1000.0).reshape(rows, 1000) * fill
            parts = {"matrix": (whole, int(columns)), "vector": (whole[:, 0], 0)}
            for name, (values, dim) in parts.items():
                local = values.chunk(2, dim)[rank].clone()
                module.register_parameter(
                    f"{name}{number}", nn.Parameter(DTensor.from_local(local, mesh, [Shard(dim)]))
                )
        module.register_parameter("everywhere", nn.Parameter(torch.arange(300_000.0) * fill))
        return module

    with manager(root, hold(False, 1.0), None, mode) as m:
        m.save(step=1)
    loaded = hold(True, 0.0)
    with manager(root, loaded, None, mode) as m:
        report = m.load(1, load_rng_state=False, prove=True)
    expected = dict(hold(True, 1.0).named_parameters())
    for name, parameter in loaded.named_parameters():
        local, right = (p.to_local() if isinstance(p, DTensor) else p for p in (parameter, expected[name]))
        assert torch.equal(local, right), name
    return report.read_bytes, report.wanted_bytes


def test_what_ranks_want_alike_is_shared_whatever_else_each_wants(tmp_path: Path) -> None:
    state = 4 * (1001 * (600 + 602 + 1024) + 300_000)
    alone = run_ranks(2, load_columns, tmp_path / "alone", "never")
    shared = run_ranks(2, load_columns, tmp_path / "shared", "always")
    assert sum(read for read, _ in alone) > 1.9 * state
    assert state <= sum(read for read, _ in shared) < 1.02 * state  # a block of a vector is read by both ranks


def flip_in_step_2(root: Path) -> Path:
    shard = max(root.glob("step-0000000002/*/*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-WIDTH * 8] ^= 1
    shard.write_bytes(data)
    return shard


def resume(rank: int, root: Path) -> Any:
    share.TURN, read_plan.SPAN = 64 << 10, 64 << 10
    model, optimizer = build(rank, 0.0)
    with manager(root, model, optimizer, "always") as m:
        with pytest.raises(CorruptCheckpoint, match="do not match their digest"):
            m.load(2, load_rng_state=False)
        return m.resume()


def test_damage_is_found_by_all_and_the_older_one_is_shared_too(tmp_path: Path) -> None:
    run_ranks(3, save, tmp_path)
    flip_in_step_2(tmp_path)
    for report in run_ranks(3, resume, tmp_path):
        assert report.step == 1
        assert "do not match their digest" in report.fallbacks[0]


def load_with_a_broken_disk(rank: int, root: Path) -> str:
    if rank == 1:
        posix_reader.read_direct = broken  # type: ignore[assignment]
        posix_reader.read_all = broken  # type: ignore[assignment]
        posix_reader.read_resident = lambda *args: False  # type: ignore[assignment]
    with pytest.raises(CorruptCheckpoint) as caught:
        load(rank, root, "always", 64 << 10)
    return str(caught.value)


def broken(*args: Any) -> int:
    raise StoreError(5, "Input/output error", "disk of rank 1")


def test_a_rank_that_cannot_read_is_an_error_of_all(saved: Path) -> None:
    for text in run_ranks(2, load_with_a_broken_disk, saved):
        assert "rank 1" in text
        assert "Input/output error" in text


def requests(sizes: list[int]) -> list[Request]:
    stored = StoredBox("w", "w", "uint8", (1,), Box((0,), (1,)), 0, 1, ("0" * 32,))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        Request(0, [Run("shard", stored, [], 0, 1, start, size, 1)]) for start, size in zip(starts, sizes, strict=True)
    ]


@pytest.mark.parametrize("members", [1, 2, 3, 5, 8])
def test_requests_are_dealt_out_once_and_evenly(members: int) -> None:
    every = requests([(i * 37) % 11 * 1000 + 1 for i in range(200)])
    shares = share.deal(every, members)
    assert [r for s in shares for r in s] == every
    sizes = [share.size_of(s) for s in shares]
    assert max(sizes) - min(sizes) <= 2 * 11_000


def test_groups_are_ranks_that_want_the_same() -> None:
    offers = [("a", 10), ("b", 10), ("a", 10), ("c", 10), ("d", 1), ("d", 1)]
    assert share.groups_of(offers, 5) == [[0, 2]]
    assert share.groups_of(offers, 0) == [[0, 2], [4, 5]]
    assert share.groups_of([("a", 0), ("a", 0)], 0) == []


@pytest.mark.parametrize(("members", "store", "link", "pays"), [
    (8, 5.0, 20.0, True),     # one slow file system, a fast network
    (8, 40.0, 1.0, False),    # local NVMe or page cache, a slow network
    (2, 1.5, 1.0, True),
    (2, 1.5, 0.7, False),
])  # fmt: skip
def test_sharing_pays_where_the_link_is_fast_for_the_store(members: int, store: float, link: float, pays: bool) -> None:
    assert share.sharing_pays(members, share.Rates(store, link)) is pays
