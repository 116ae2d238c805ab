"""Incremental saves: only what changed is written, everything loads bit-equal, and what is referred to is looked after."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from manager_support import assert_same, manager, snapshot, steps_in
from torch import nn

from distckpt import CheckpointManager, failpoints, open_checkpoint
from distckpt.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint, SaveFailed
from distckpt.format.lineage import list_committed
from distckpt.format.runs import place
from distckpt.format.shard_header import read_header
from distckpt.format.verify import verify
from distckpt.importers.materialize import materialize
from distckpt.manager.keep_policy import KeepLast
from distckpt.storage import open_store
from distckpt.storage.base import Store
from distckpt.storage.memory import MemoryStore, MemoryWriter

MIB = 1 << 20


class Mixed(nn.Module):
    """A frozen matrix, an embedding whose rows are of 4 KiB, and a small adapter that is trained."""

    def __init__(self, seed: int = 0, rows: int = 2048) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Parameter(torch.randn(3 * 256 + 7, 1024), requires_grad=False)
        self.embedding = nn.Parameter(torch.randn(rows, 1024))
        self.adapter = nn.Parameter(torch.randn(16, 64, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("nothing", torch.zeros(0, 3))

    def change(self, rows: Any) -> None:
        with torch.no_grad():
            self.embedding[rows] += 1
            self.adapter += 1
            self.count += 1


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


def written(m: CheckpointManager, **save: Any) -> int:
    """Save, and return the bytes that went to storage."""
    before = m.store.counters["bytes_written"]
    assert m.save(**save) is not None
    m.wait()
    return m.store.counters["bytes_written"] - before


def total(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def check(root: Path | str, step: int, wanted: dict[str, torch.Tensor]) -> None:
    """Assert that a step is whole and reads bit-equal, in one piece and in slices, and refers one level deep."""
    checkpoint = open_checkpoint(f"{root}/step-{step:010d}")
    report = checkpoint.verify("full")
    assert report.problems == ()
    assert report.checked_bytes == report.total_bytes == sum(info.nbytes for info in checkpoint.tensors.values())
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, wanted)
    assert_physical(checkpoint.store, checkpoint)


def assert_physical(store: Store, checkpoint: Any) -> None:
    """Every byte that a shard refers to is one that the other file's header lists as its own data."""
    own = {path: data_of(store, path) for reference in checkpoint.manifest.references for path in reference.paths}
    for number in range(len(checkpoint.manifest.shards)):
        header = checkpoint._index.header(number)
        for stored in (b for b in header.boxes if b.runs):
            for block, digest in enumerate(stored.digests):
                path, start = place(stored.runs, block, header.block)
                assert path is None or own[path][start] == digest


def data_of(store: Store, path: str) -> dict[int, str]:
    """Return, from its header alone, where each block begins that a shard has written itself, with its digest."""
    header = read_header(store, path, file_size=store.size(path), expect_digest=None)
    found = {}
    for box in header.boxes:
        for number, digest in enumerate(box.digests):
            where = place(box.runs, number, header.block) if box.runs else (None, box.start + number * header.block)
            if where[0] is None:
                found[where[1]] = digest
    return found


# ---------------------------------------------------------------- how much is written


def test_frozen_weights_are_not_written_again(tmp_path: Path) -> None:
    model = Mixed()
    with manager(tmp_path, model, incremental=True) as m:
        assert written(m, step=1) > total(model)
        for step in (2, 3):
            model.change([])
            assert written(m, step=step) < 0.01 * total(model)
            check(tmp_path, step, snapshot(model))


def test_lora_writes_the_adapter_and_its_optimizer_alone(tmp_path: Path) -> None:
    model = Mixed()
    model.embedding.requires_grad_(False)
    optimizer = torch.optim.AdamW([model.adapter], lr=0.1)
    with manager(tmp_path, model, optimizer, incremental=True) as m:
        for step in (1, 2, 3):
            model.adapter.square().sum().backward()
            optimizer.step()
            nbytes = written(m, step=step)
            assert nbytes < (0.01 if step > 1 else 1.1) * total(model)
            check(tmp_path, step, snapshot(model, optimizer))


@pytest.mark.parametrize("how", ["together", "scattered"])
def test_five_percent_of_an_embedding(tmp_path: Path, how: str) -> None:
    """Rows that lie together cost their blocks; scattered ones need blocks of the size of a row."""
    model = Mixed(rows=4096)
    few = slice(1000, 1204) if how == "together" else torch.randperm(4096)[:204]
    size = {} if how == "together" else {"block_bytes": 4096}
    with manager(tmp_path, model, incremental=True, **size) as m:
        written(m, step=1)
        model.change(few)
        rows = model.embedding.numel() * 4
        assert written(m, step=2) < (0.05 * rows + 2 * MIB if how == "together" else 0.07 * rows + 0.01 * total(model))
        check(tmp_path, 2, snapshot(model))
        found = open_checkpoint(tmp_path).manifest
        assert len(found.references) == 1
        assert found.version == (2, 0)


def test_without_it_everything_is_written_and_says_version_1(tmp_path: Path) -> None:
    model = Mixed()
    with manager(tmp_path, model) as m:
        for step in (1, 2):
            assert written(m, step=step) > total(model)
            manifest = open_checkpoint(tmp_path).manifest
            assert (manifest.version, manifest.references) == ((1, 0), [])


def test_a_layout_that_does_not_match_is_written_whole(tmp_path: Path) -> None:
    with manager(tmp_path, Mixed(), incremental=True) as m:
        m.save(step=1)
    other = Mixed(rows=1024)  # the embedding has another shape, the rest is as it was
    with manager(tmp_path, other, incremental=True, strict=False) as m:
        m.load(1, include=("model.frozen", "model.adapter"))
        assert 4 * MIB < written(m, step=2) < 5 * MIB
        check(tmp_path, 2, snapshot(other))


def test_the_first_save_after_a_resume_reads_one_header(tmp_path: Path) -> None:
    model = Mixed()
    with manager(tmp_path, model, incremental=True) as m:
        for step in (1, 2):
            model.change(slice(0, 10))
            m.save(step=step)
    again = Mixed(seed=1)
    with manager(tmp_path, again, incremental=True) as m:
        report = m.resume(prove=True)
        assert report is not None
        assert report.read_bytes == report.wanted_bytes == total(model)
        assert report.headers_read == 1
        read = m.store.counters["bytes_read"]
        assert written(m, step=3) < 0.01 * total(model)
        assert m.store.counters["bytes_read"] - read < 200_000  # headers and manifests, no data
        assert_same(snapshot(again), snapshot(model))
    check(tmp_path, 3, snapshot(model))


def test_going_back_refers_to_what_was_loaded(tmp_path: Path) -> None:
    model = Mixed()
    with manager(tmp_path, model, incremental=True, save_total_limit=None) as m:
        m.save(step=1)
        first = snapshot(model)
        model.change(slice(0, 2048))
        m.save(step=2)
        m.load(1)
        assert_same(snapshot(model), first)
        assert written(m, step=3) < 0.01 * total(model)
        assert {r.attempt.partition("/")[0] for r in open_checkpoint(tmp_path).manifest.references} == {
            "step-0000000001"
        }
        m.load(str(tmp_path / "step-0000000002"))
        with torch.no_grad():
            model.adapter.zero_()
        m.save(step=1)  # an earlier step never refers to a later one
        assert not open_checkpoint(tmp_path / "step-0000000001").manifest.references


# ---------------------------------------------------------------- chains and removal


@pytest.mark.parametrize("mode", ["synchronous", "background", "rising"])
def test_a_chain_of_ten_with_two_kept(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"memory://chain-{tmp_path.name}" if mode == "rising" else tmp_path
    if mode == "rising":
        only_rising_offsets(monkeypatch)
    model, wanted = Mixed(), {}
    options = {"incremental": True, "keep_policy": KeepLast(2), "async_save": mode == "background"}
    with manager(root, model, **options) as m:
        store = m.store
        for step in range(1, 11):
            model.change(slice(200 * step - 200, 200 * step))
            m.save(step=step)
            wanted[step] = snapshot(model)
            with torch.no_grad():
                model.embedding[0] += 1  # after save() returned: no part of it
            m.wait()
            kept = sorted(c.step for c in list_committed(store))
            assert kept == [s for s in (step - 1, step) if s]
            for there in kept:
                check(root, there, wanted[there])
            needed = {f for c in list_committed(store) for f in files_of(store, c)}
            assert {e.name for e in store.list() if e.name.endswith(".safetensors")} == needed
            if step > 2:
                assert any(name.startswith("step-0000000001/") for name in needed)  # its manifest is gone long since
            for folder in store.list_folders(""):
                assert not folder.startswith("step-") or any(True for _ in store.list(folder))
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor += 1
        for step in (11, 12):  # nothing is as it was: with the last that refers to them the old files go
            m.save(step=step)
            m.wait()
        assert not open_checkpoint(f"{root}/step-0000000011").manifest.references
        assert {name.partition("/")[0] for name in (e.name for e in store.list()) if "step-" in name} == {
            "step-0000000011",
            "step-0000000012",
        }


def only_rising_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory stores behave like uploads in parts: a writer takes rising offsets alone."""
    monkeypatch.setattr(MemoryStore, "capabilities", replace(MemoryStore.capabilities, random_write=False))
    write, reached = MemoryWriter.write_at, dict[int, int]()

    def write_at(writer: MemoryWriter, offset: int, data: memoryview) -> None:
        assert offset >= reached.get(id(writer), 0)
        reached[id(writer)] = offset + len(data)
        write(writer, offset, data)

    monkeypatch.setattr(MemoryWriter, "write_at", write_at)
    commit = MemoryWriter.commit
    monkeypatch.setattr(MemoryWriter, "commit", lambda writer: (reached.pop(id(writer), None), commit(writer))[1])


def files_of(store: Store, committed: Any) -> list[str]:
    manifest = open_checkpoint(f"{store.url}/{committed.folder}").manifest
    return [f"{committed.folder}/{s.path}" for s in manifest.shards] + [
        path for r in manifest.references for path in r.paths
    ]


def test_pinned_steps_keep_what_they_refer_to(tmp_path: Path) -> None:
    model, wanted = Mixed(rows=512), {}
    with manager(tmp_path, model, incremental=True, save_total_limit=1) as m:
        for step in range(1, 5):
            model.change([step])
            m.save(step=step)
            wanted[step] = snapshot(model)
            if step == 2:
                m.pin(2)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor += 1
        m.save(step=5)
        m.save(step=6)
    assert steps_in(tmp_path) == [2, 6]
    check(tmp_path, 2, wanted[2])
    assert (tmp_path / "step-0000000001").exists()
    assert not (tmp_path / "step-0000000003").exists()


# ---------------------------------------------------------------- damage, loss, failure


def chain_of(root: Path, steps: int = 3) -> dict[int, dict[str, torch.Tensor]]:
    model, wanted = Mixed(rows=512), {}
    with manager(root, model, incremental=True, save_total_limit=None) as m:
        for step in range(1, steps + 1):
            model.change(slice(0, 1) if step < 3 else slice(0, 512))
            m.save(step=step)
            wanted[step] = snapshot(model)
    return wanted


def test_damage_in_a_shared_file_is_found_in_every_step_that_refers_to_it(tmp_path: Path) -> None:
    wanted = chain_of(tmp_path)
    store = open_store(tmp_path)
    first = open_checkpoint(tmp_path / "step-0000000001")
    path = f"{first.committed.folder}/{first.manifest.shards[0].path}"
    boxes = {b.fqn: b for b in first._index.header(0).boxes}

    def flip(offset: int) -> None:
        with (tmp_path / path).open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))

    committed = {c.step: c for c in list_committed(store)}
    # A block that only steps 1 and 2 use: the third has its own embedding.
    place = boxes["model.embedding"].start + MIB + 5
    flip(place)
    bad = {s: verify(store, c, mode="full").problems for s, c in committed.items()}
    assert {s: [(p.file, p.tensor, p.rank) for p in ps] for s, ps in bad.items()} == {
        1: [(path, "model.embedding", 0)],
        2: [(path, "model.embedding", 0)],
        3: [],
    }
    own = open_checkpoint(tmp_path / "step-0000000002").manifest.shards[0].path
    assert f"step-0000000002/{own} refers to" in bad[2][0].what
    model = Mixed(seed=5, rows=512)
    with manager(tmp_path, model) as m:
        for load in (lambda: m.load(2), lambda: open_checkpoint(tmp_path / "step-0000000002").read("model.embedding")):
            with pytest.raises(CorruptCheckpoint) as refused:
                load()
            assert path in str(refused.value)
            assert f"step-0000000002/{own} refers to it" in str(refused.value)
        assert m.load(3).step == 3
        assert_same(snapshot(model), wanted[3])
    flip(place)
    # A block of the frozen weights hurts all three, and a resume says so.
    flip(boxes["model.frozen"].start + 5)
    assert [len(verify(store, c, mode="full").problems) for c in committed.values()] == [1, 1, 1]
    with manager(tmp_path, model) as m, pytest.raises(CheckpointNotFound, match="none can be loaded"):
        m.resume()
    flip(boxes["model.frozen"].start + 5)
    # Damage to the second's own blocks: the third, and the first, are not affected; a resume of 2 falls back to 1.
    shutil.rmtree(tmp_path / "step-0000000003")
    packed = next(b for b in open_checkpoint(tmp_path)._index.header(0).boxes if b.runs and b.runs[0].path is None)
    path = f"step-0000000002/{own}"
    flip(packed.runs[0].start)
    with manager(tmp_path, model) as m:
        report = m.resume()
        assert report is not None
        assert (report.step, len(report.fallbacks)) == (1, 1)
        assert path in report.fallbacks[0]
        assert_same(snapshot(model), wanted[1])


def test_a_step_copied_alone_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    chain_of(tmp_path / "run")
    (tmp_path / "alone").mkdir()
    shutil.copytree(tmp_path / "run/step-0000000002", tmp_path / "alone/step-0000000002")
    with pytest.raises(
        CorruptCheckpoint, match=r"step-0000000001/.*step 2 refers to it.*missing.*--materialize"
    ) as refused:
        open_checkpoint(tmp_path / "alone/step-0000000002")
    assert "00000-of-00001.safetensors" in str(refused.value)
    store = open_store(tmp_path / "alone")
    for mode in ("quick", "full"):
        problems = verify(store, list_committed(store)[0], mode=mode).problems
        assert any(p.file.startswith("step-0000000001/") and "step 2 refers to it" in p.what for p in problems)
    with pytest.raises(CorruptCheckpoint, match="step-0000000001"):
        open_checkpoint(tmp_path / "alone")


def test_materialize_makes_an_equal_copy_that_needs_nothing_else(tmp_path: Path) -> None:
    wanted = chain_of(tmp_path / "run")
    old = open_checkpoint(tmp_path / "run/step-0000000002")
    report = materialize(tmp_path / "run", tmp_path / "whole", step=2)
    assert (report.step, report.nbytes) == (2, sum(i.nbytes for i in old.tensors.values()))
    shutil.rmtree(tmp_path / "run")
    new = open_checkpoint(tmp_path / "whole")
    assert (new.manifest.version, new.manifest.references) == ((1, 0), [])
    for field in ("tensors", "meshes", "objects", "per_rank", "metrics", "config", "time", "engine", "world_size"):
        assert getattr(new.manifest, field) == getattr(old.manifest, field)
    assert new.provenance["materialized_from"] == {"generation": 1, "save_id": old.manifest.save_id, "step": 2}
    assert new.provenance["weights"] == old.provenance["weights"]
    check(tmp_path / "whole", 2, wanted[2])
    model = Mixed(seed=9, rows=512)
    with manager(tmp_path / "whole", model, incremental=True) as m:
        assert m.resume(prove=True) is not None
        assert written(m, step=3) < 0.01 * total(model)  # and the line goes on from it
    with pytest.raises(ConfigError, match="needs a root of its own"):
        materialize(tmp_path / "whole", tmp_path / "whole", step=2)


def test_a_failed_save_changes_nothing_and_the_next_refers_to_the_last_good_one(tmp_path: Path) -> None:
    model = Mixed(rows=512)
    with manager(tmp_path, model, incremental=True, retries=0, max_consecutive_failures=5) as m:
        m.save(step=1)
        for point in ("shard.compared", "shard.before_header", "commit.before_manifest"):
            model.change([0])
            failpoints.arm(f"{point}:1:raise=EIO")
            assert m.save(step=2) is None
            failpoints.arm("")
        assert written(m, step=3) < 2 * MIB
        check(tmp_path, 3, snapshot(model))
        failpoints.arm("shard.before_header:1:raise=EIO")
        object.__setattr__(m.config, "retries", 1)
        model.change([1])
        assert written(m, step=4) < 4 * MIB
        check(tmp_path, 4, snapshot(model))


def test_what_is_gone_is_not_referred_to(tmp_path: Path) -> None:
    """The checkpoint before is removed behind the job's back: the next save writes everything."""
    model = Mixed(rows=512)
    with manager(tmp_path, model, incremental=True, retries=0, max_consecutive_failures=5) as m:
        m.save(step=1)
        shutil.rmtree(tmp_path / "step-0000000001")
        assert written(m, step=2) > total(model)
        check(tmp_path, 2, snapshot(model))

        def steal(*_: Any) -> None:
            for path in (tmp_path / "step-0000000002").glob("manifest*"):
                path.unlink()

        trace = failpoints.record()
        try:
            append = trace.append
            hooked = type(
                "Hook", (list,), {"append": lambda self, hit: (append(hit), "shard.written" in hit and steal())}
            )()
            failpoints.record(hooked)
            assert m.save(step=3) is None  # ... and where it happens in the middle of a save, that one fails
        finally:
            failpoints._trace = None
        assert steps_in(tmp_path) == []
        assert written(m, step=4) > total(model)


def test_full_saves_are_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mode='full'.*incremental"):
        manager(tmp_path, Mixed(rows=8), mode="full", incremental=True)
    with pytest.raises(ConfigError, match="block_bytes"):
        manager(tmp_path, Mixed(rows=8), block_bytes=5000)


def test_a_save_that_cannot_be_agreed_on_says_so(tmp_path: Path) -> None:
    model = Mixed(rows=8)
    with manager(tmp_path, model, incremental=True, retries=0) as m:
        m.save(step=1)
        failpoints.arm("shard.compared:1:raise=ENOSPC")
        with pytest.raises(SaveFailed, match="No space"):
            m.save(step=2)
