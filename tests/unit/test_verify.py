"""Verification: every kind of damage is found and named, none is invented, nothing is changed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from builders import build_checkpoint, prepare, shard_paths

from distckpt.errors import ConfigError
from distckpt.format import box_reader
from distckpt.format.commit import commit
from distckpt.format.lineage import Committed
from distckpt.format.manifest import TensorEntry
from distckpt.format.verify import Problem, quick_check, verify
from distckpt.storage.memory import MemoryStore
from distckpt.storage.posix import PosixStore
from distckpt.storage.posix_reader import PosixReader

MODES = ["quick", "sample", "full"]


@pytest.fixture
def store(tmp_path: Path) -> PosixStore:
    return PosixStore(tmp_path / "root")


@pytest.fixture
def committed(store: PosixStore) -> Committed:
    return build_checkpoint(store, 100, world=3, block=4096)


def flip(store: PosixStore, name: str, offset: int) -> None:
    path = Path(store.path_of(name))
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def whole_state(store: PosixStore) -> dict[str, bytes]:
    return {e.name: store.read(e.name) for e in store.list()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", ["rows", "columns", "replicated"])
def test_whole_checkpoints_are_fine(mode: str, cut: str) -> None:
    store = MemoryStore()
    found = build_checkpoint(store, 100, world=3, cut=cut, rank_objects={"rng": lambda rank: rank})
    report = verify(store, found, mode=mode)
    assert report.ok, report.problems
    assert report.notes == ()
    assert (report.step, report.generation, report.files, report.tensors) == (100, 1, 3, 6)
    assert report.total_bytes == 37 * 16 * 4 + 8 * 5 * 3 * 8 + 700 * 1000 * 4 + 18 + 4
    assert report.checked_bytes == {"quick": 0, "full": report.total_bytes}.get(mode, report.checked_bytes)
    assert quick_check(store, found) == []


def test_sample_reads_a_share_and_depends_on_the_seed(committed: Committed, store: PosixStore) -> None:
    reports = [verify(store, committed, mode="sample", fraction=0.1, seed=s) for s in (0, 0, 1)]
    assert reports[0] == reports[1]
    share = reports[0].checked_bytes / reports[0].total_bytes
    assert 0.05 < share < 0.15
    assert verify(store, committed, mode="sample", fraction=1.0).checked_bytes == reports[0].total_bytes


def test_sample_reads_at_least_one_block_of_each_file(committed: Committed, store: PosixStore) -> None:
    before = store.counters["opens"]
    report = verify(store, committed, mode="sample", fraction=1e-9)
    assert report.checked_bytes >= 3
    assert store.counters["opens"] > before


def test_scattered_blocks_of_a_file_are_read_with_it_open(committed: Committed, store: PosixStore) -> None:
    before = store.counters["opens"]
    verify(store, committed, mode="quick")
    quick = store.counters["opens"] - before
    report = verify(store, committed, mode="sample", fraction=0.5)
    assert report.checked_bytes > 100 * 4096
    assert store.counters["opens"] - before == 2 * quick + 3


def test_full_finds_one_flipped_bit_anywhere(committed: Committed, store: PosixStore) -> None:
    rng = random.Random(1)
    for path in shard_paths(store, committed):
        for offset in [0, 8, *(rng.randrange(store.size(path)) for _ in range(8)), store.size(path) - 1]:
            flip(store, path, offset)
            report = verify(store, committed, mode="full")
            assert not report.ok, (path, offset)
            assert {p.file for p in report.problems} == {path}
            flip(store, path, offset)
    assert verify(store, committed, mode="full").ok


def test_damage_is_named_by_file_tensor_and_rank(committed: Committed, store: PosixStore) -> None:
    path = shard_paths(store, committed)[1]
    size = store.size(path)
    flip(store, path, size // 2)  # model.big is by far the largest
    state = whole_state(store)
    (problem,) = verify(store, committed, mode="full").problems
    assert (problem.file, problem.tensor, problem.rank) == (path, "model.big", 1)
    assert "digest" in problem.what
    for part in (path, "model.big", "rank 1"):
        assert part in str(problem)
    assert verify(store, committed, mode="quick").ok
    assert whole_state(store) == state  # verify never repairs


def test_missing_short_long_and_linked_shards(committed: Committed, store: PosixStore, tmp_path: Path) -> None:
    paths = shard_paths(store, committed)
    full = [Path(store.path_of(p)) for p in paths]
    data = [p.read_bytes() for p in full]
    full[0].unlink()
    full[1].write_bytes(data[1][:-1])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(data[2])
    full[2].unlink()
    full[2].symlink_to(elsewhere)
    for found in (list(verify(store, committed).problems), quick_check(store, committed)):
        by_file = {p.file: p for p in found}
        assert sorted(by_file) == paths
        assert "missing" in by_file[paths[0]].what
        assert f"{len(data[1]) - 1} bytes" in by_file[paths[1]].what
        assert "regular file" in by_file[paths[2]].what
        assert [by_file[p].rank for p in paths] == [0, 1, 2]
    full[1].write_bytes(data[1] + b"\0")
    assert any(p.file == paths[1] for p in quick_check(store, committed))
    full[0].mkdir()
    assert any(p.file == paths[0] for p in verify(store, committed, mode="full").problems)


def test_a_fifo_does_not_hang_it(committed: Committed, store: PosixStore) -> None:
    path = shard_paths(store, committed)[0]
    os.unlink(store.path_of(path))
    os.mkfifo(store.path_of(path))
    assert [p.file for p in verify(store, committed, mode="full").problems] == [path]


def test_swapped_shards_say_whose_they_are(store: PosixStore) -> None:
    tensors = {"w": np.arange(64, dtype=np.float32).reshape(8, 8)}
    committed = build_checkpoint(store, 100, world=2, tensors=tensors)
    one, two = (Path(store.path_of(p)) for p in shard_paths(store, committed))
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second)
    one.write_bytes(second)
    two.write_bytes(first)
    assert quick_check(store, committed) == []
    problems = verify(store, committed).problems
    assert ["rank 1" in problems[0].what, "rank 0" in problems[1].what] == [True, True]


def test_a_shard_of_another_save(store: PosixStore) -> None:
    tensors = {"w": np.arange(64, dtype=np.float32).reshape(8, 8)}
    one = build_checkpoint(store, 100, tensors=tensors, save_id="a" * 16)
    two = build_checkpoint(store, 200, tensors=tensors, save_id="b" * 16)
    mine, other = shard_paths(store, one)[0], shard_paths(store, two)[0]
    Path(store.path_of(mine)).write_bytes(store.read(other))
    (problem,) = verify(store, one).problems
    assert problem.file == mine
    assert "b" * 16 in problem.what


def test_unknown_files_are_notes(committed: Committed, store: PosixStore) -> None:
    folder = shard_paths(store, committed)[0].rpartition("/")[0]
    store.create(f"{folder}/evil.pt", b"pickle")
    store.create(f"{folder}/00000-of-00009.safetensors", b"")
    report = verify(store, committed)
    assert report.ok
    assert len(report.notes) == 2
    assert any("evil.pt" in note for note in report.notes)


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_damaged_manifests_are_reported(committed: Committed, store: PosixStore, content: bytes | None) -> None:
    path = Path(store.path_of(committed.manifest_path))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if content is None else content)
    for problems in (verify(store, committed, mode="full").problems, quick_check(store, committed)):
        (problem,) = problems
        assert problem.file == committed.manifest_path
        assert problem.rank is None
    path.unlink()
    assert not verify(store, committed).ok


def test_boxes_that_leave_a_hole_are_found() -> None:
    """The manifest claims four rows more than the shards hold; all files and digests are right."""
    store = MemoryStore()
    manifest = prepare(store, 100, tensors={"w": np.zeros((8, 4), np.float32), "v": np.ones(3, np.float32)})
    more = TensorEntry(dtype="float32", shape=[12, 4], mesh=0, placements=["S(0)"])
    path = commit(store, msgspec.structs.replace(manifest, tensors={**manifest.tensors, "w": more, "x": more}))
    problems = verify(store, Committed(100, 1, path)).problems
    assert {p.tensor for p in problems} == {"w", "x"}
    assert any("0 of 48" in p.what for p in problems if p.tensor == "x")


def test_a_tensor_that_the_manifest_lacks() -> None:
    store = MemoryStore()
    manifest = prepare(store, 100, tensors={"w": np.zeros((8, 4), np.float32), "v": np.ones(3, np.float32)})
    path = commit(store, msgspec.structs.replace(manifest, tensors={"v": manifest.tensors["v"]}))
    problems = verify(store, Committed(100, 1, path)).problems
    assert {(p.tensor, p.rank) for p in problems} == {("w", 0), ("w", 1)}


def test_progress_reaches_the_total(committed: Committed, store: PosixStore) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(store, committed, mode="full", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (report.total_bytes, report.total_bytes)


def test_requests_are_bounded(committed: Committed, store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read_into = PosixReader.read_into

    def spy(self: PosixReader, offset: int, destination: memoryview) -> None:
        sizes.append(len(destination))
        read_into(self, offset, destination)

    monkeypatch.setattr(PosixReader, "read_into", spy)
    monkeypatch.setattr(box_reader, "REQUEST", 64 << 10)
    report = verify(store, committed, mode="full")
    assert report.ok
    assert max(sizes) <= 64 << 10
    assert sum(sizes) == report.total_bytes


def test_wrong_use() -> None:
    store = MemoryStore()
    committed = build_checkpoint(store, 100, tensors={})
    with pytest.raises(ConfigError):
        verify(store, committed, mode="deep")  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        verify(store, committed, mode="sample", fraction=0.0)
    assert str(Problem("f", None, None, "x")) == "f: x"
