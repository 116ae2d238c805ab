"""Every way to read an incremental checkpoint gives the same bits: shared, strided, direct, lazy, averaged, exported, on S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from layout_models import same_bits
from manager_support import assert_same, manager, snapshot
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distckpt import average_checkpoints, open_checkpoint
from distckpt.dcp import share
from distckpt.errors import CheckpointNotFound
from distckpt.format import digest, reuse
from distckpt.format.verify import verify
from distckpt.importers.convert import convert
from distckpt.importers.materialize import materialize
from distckpt.manager.gc import collect
from distckpt.manager.reading import Restore, may_share
from distckpt.manager.report import LoadOptions
from distckpt.storage import open_store, posix_reader

if TYPE_CHECKING:
    from s3_support import S3

ROWS = 300  # of 4 KiB, one block each


class Sparse(nn.Module):
    """Rows that change here and there, a frozen matrix, and three flags that put all that follows at odd bytes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rows = nn.Parameter(torch.randn(ROWS, 1024))
        self.frozen = nn.Parameter(torch.randn(ROWS, 1024), requires_grad=False)
        self.register_buffer("flags", torch.tensor([True, False, True]))

    def touch(self, step: int) -> None:
        with torch.no_grad():
            self.rows[step::37] += step
            self.flags.logical_not_()


def save_chain(root: Path | str, steps: int = 3, **options: Any) -> dict[int, dict[str, torch.Tensor]]:
    model, wanted = Sparse(), {}
    config = {"incremental": True, "block_bytes": 4096, "save_total_limit": None, **options}
    with manager(root, model, **config) as m:
        for step in range(1, steps + 1):
            model.touch(step)
            assert m.save(step=step) is not None
            wanted[step] = snapshot(model)
            m.wait()
    assert len(open_checkpoint(root).manifest.references) == (steps - 1 if config["incremental"] else 0)
    return wanted


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    root = tmp_path_factory.mktemp("chain")
    return root, save_chain(root)


@pytest.mark.parametrize("how", ["cached", "direct", "strided", "doubles"])
def test_live_loads(
    saved: tuple[Path, dict[int, dict[str, torch.Tensor]]], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks at odd bytes of several files, in place and scattered, from the page cache and past it."""
    root, wanted = saved
    if how != "cached":
        monkeypatch.setattr(posix_reader, "read_resident", lambda *_: False)
    model = Sparse(seed=1)
    if how == "strided":
        model.rows = nn.Parameter(torch.zeros(1024, ROWS).t())
    if how == "doubles":
        model.double()
    with manager(root, model) as m:
        for step in (3, 2):
            report = m.load(step, prove=how != "doubles")
            assert_same({k: v.to(wanted[step][k].dtype) for k, v in snapshot(model).items()}, wanted[step])
            assert report.read_bytes <= 1.05 * report.wanted_bytes or how == "doubles"


def test_offline_reads(saved: tuple[Path, dict[int, dict[str, torch.Tensor]]], tmp_path: Path) -> None:
    """One piece, a region, streamed bytes, a whole state read ahead, an average, a file for others."""
    root, wanted = saved
    checkpoint = open_checkpoint(root)
    rows = wanted[3]["model.rows"]
    assert_same({f"model.{name}": value for name, value in checkpoint.state_dict().items()}, wanted[3])
    box = checkpoint.tensors["model.rows"].boxes[0]
    for start, stop in (
        (0, rows.numel() * 4),
        (4, 5 * 4096 + 8),
        (36 * 4096, 39 * 4096 - 4),
        (299 * 4096 + 40, 300 * 4096),
    ):
        view = memoryview(bytearray(stop - start))
        checkpoint.read_into("model.rows", box, start, stop, view)
        assert bytes(view) == rows.numpy().tobytes()[start:stop]
    plain = tmp_path / "plain"
    save_chain(plain, incremental=False)
    for name, source in (("own", root), ("other", plain)):
        average_checkpoints([source / f"step-{step:010d}" for step in (1, 2, 3)], tmp_path / name)
    own, other = open_checkpoint(tmp_path / "own"), open_checkpoint(tmp_path / "other")
    assert_same({n: own.read(n) for n in own.tensors}, {n: other.read(n) for n in other.tensors})
    assert not own.manifest.references
    convert(root / "step-0000000002", tmp_path / "weights.pt", to="torch")
    assert_same({f"model.{k}": v for k, v in torch.load(tmp_path / "weights.pt").items()}, wanted[2])


def test_large_blocks_are_materialized(tmp_path: Path) -> None:
    """Blocks as long as they may be, from pages that are not whole."""
    save_chain(tmp_path / "run", steps=2, block_bytes=8 << 20)
    materialize(tmp_path / "run", tmp_path / "whole")
    a, b = open_checkpoint(tmp_path / "run"), open_checkpoint(tmp_path / "whole")
    assert_same({n: b.read(n) for n in b.tensors}, {n: a.read(n) for n in a.tensors})


# ---------------------------------------------------------------- ranks


def save_shared(rank: int, root: Path) -> None:
    reuse.LEAST_SHARE = 0.0
    model = DistributedDataParallel(Sparse())
    with manager(root, model, incremental=True, block_bytes=4096, save_total_limit=None) as m:
        for step in (1, 2):
            model.module.touch(step)
            m.save(step=step)


def load_shared(rank: int, root: Path, mode: str) -> tuple[dict[str, torch.Tensor], int, int, bool]:
    share.LEAST_BYTES = 0 if mode == "always" else share.LEAST_BYTES
    model = DistributedDataParallel(Sparse(seed=1))
    with manager(root, model, share_loads=mode) as m:
        report = m.resume(load_rng_state=False)
        assert report is not None
        reader = type("Reader", (), {"manifest": open_checkpoint(root).manifest})()
        share.LEAST_BYTES = 2 << 20  # less than the state, more than the newest step has of its own
        load = Restore(reader, m.engine, m.components, m.config, LoadOptions(), "")
        return snapshot(model.module), report.read_bytes, report.step, may_share(2, load)


def test_shared_loads_read_each_byte_once_and_fall_back_together(tmp_path: Path) -> None:
    run_ranks(2, save_shared, tmp_path)
    newest = open_checkpoint(tmp_path)
    assert sum(s.size for s in newest.manifest.shards) < 1 << 20 < newest.manifest.nbytes
    wanted = {step: open_checkpoint(tmp_path / f"step-{step:010d}") for step in (1, 2)}
    state = {n: wanted[2].read(n) for n in wanted[2].tensors}
    by_rank = run_ranks(2, load_shared, tmp_path, "always")
    for found, _, step, shares in by_rank:
        assert step == 2
        assert shares  # decided by what is read, not by what the step has of its own
        assert_same(found, state)
    assert sum(read for _, read, *_ in by_rank) <= 1.05 * sum(t.numel() * t.element_size() for t in state.values())
    assert all(read > 0 for _, read, *_ in by_rank)

    # A block that step 2 has from step 1 goes bad: both steps are damaged, and no rank believes either of them.
    header = wanted[2]._index.header(1)
    run = next(run for box in header.boxes for run in box.runs if run.path is not None)
    file = tmp_path / run.path
    data = bytearray(file.read_bytes())
    data[run.start] ^= 1
    file.write_bytes(data)
    with pytest.raises(Exception, match=f"{run.path}.*refers to it") as caught:
        run_ranks(2, load_shared, tmp_path, "always")
    assert CheckpointNotFound.__name__ in str(caught.value)


# ---------------------------------------------------------------- lazy, far


def test_lazy_saves_refer_too(tmp_path: Path) -> None:
    model, wanted = Sparse(), {}
    optimizer = torch.optim.SGD([model.rows], lr=0.5)
    options = {"async_save": True, "lazy_staging": True, "incremental": True, "block_bytes": 4096}
    with manager(tmp_path, model, optimizer, save_total_limit=None, **options) as m:
        for step in (1, 2, 3):
            wanted[step] = snapshot(model)
            before = m.store.counters["bytes_written"]
            assert m.save(step=step) is not None
            model.rows.grad = torch.zeros_like(model.rows)
            model.rows.grad[step::37] = 1.0
            optimizer.step()  # the fence holds it until the copy is made
            m.wait()
            nbytes = m.store.counters["bytes_written"] - before
            assert nbytes < 0.15 * sum(t.numel() * t.element_size() for t in wanted[1].values()) or step == 1
    for step, values in wanted.items():
        checkpoint = open_checkpoint(tmp_path / f"step-{step:010d}")
        assert checkpoint.verify("full").ok
        assert_same({n: checkpoint.read(n) for n in checkpoint.tensors}, values)


def test_on_a_bucket(s3: S3, bucket: str) -> None:
    """Saved, verified, loaded, tidied and made self-contained, where writers take rising offsets alone."""
    root = f"s3://{bucket}/run"
    wanted = save_chain(root)
    checkpoint = open_checkpoint(root)
    assert checkpoint.verify("full").ok
    model = Sparse(seed=1)
    with manager(root, model, incremental=True, block_bytes=4096, save_total_limit=None) as m:
        report = m.resume(prove=True)
        assert report is not None
        assert_same(snapshot(model), wanted[3])
        m.save(step=4)
        assert sum(s.size for s in open_checkpoint(root).manifest.shards) < 100_000
        generation = m.generation
    store = open_store(root)
    old = [open_checkpoint(f"{root}/step-{step:010d}").committed for step in (1, 2)]
    assert collect(store, remove=old, current_generation=generation or 0, dry_run=False).removed == tuple(old)
    left = open_checkpoint(root)
    assert verify(store, left.committed, mode="full").ok
    assert any(path.startswith("step-0000000001/") for r in left.manifest.references for path in r.paths)
    materialize(root, f"s3://{bucket}/whole")
    whole = open_checkpoint(f"s3://{bucket}/whole")
    assert not whole.manifest.references
    assert all(same_bits(whole.read(name), wanted[3][name]) for name in whole.tensors)


# ---------------------------------------------------------------- what it costs where it is off


def test_without_it_nothing_is_hashed_twice_and_no_earlier_step_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Sparse()
    hashed: list[int] = []
    names: list[str] = []
    with manager(tmp_path, model, save_total_limit=None) as m:
        model.touch(1)
        m.save(step=1)
        model.touch(2)
        blocks = digest.block_digests
        monkeypatch.setattr(
            digest, "block_digests", lambda view, block: (hashed.append(len(view)), blocks(view, block))[1]
        )
        for name in ("size", "read", "read_into"):
            call = getattr(m.store, name)
            monkeypatch.setattr(
                m.store, name, lambda path, *a, _call=call, **k: (names.append(path), _call(path, *a, **k))[1]
            )
        before = m.store.counters["bytes_written"]
        m.save(step=2)
        total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        assert sum(hashed) == total
        assert m.store.counters["bytes_written"] - before > total
        assert [n for n in names if "step-0000000001/g" in n] == []
    assert open_checkpoint(tmp_path).manifest.version == (1, 0)


@pytest.fixture(autouse=True)
def _least_share() -> Iterator[None]:
    was = reuse.LEAST_SHARE
    reuse.LEAST_SHARE = 0.0  # the files are small here
    yield
    reuse.LEAST_SHARE = was
