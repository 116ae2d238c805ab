"""Damage to committed files: every flipped bit is found, every strange file is named, and a resume falls back."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_job import Training
from ranks import run_ranks

from distckpt import CheckpointConfig, CheckpointManager, open_checkpoint
from distckpt.boxes import Box
from distckpt.dcp.reader import CheckpointReader, Want
from distckpt.errors import CheckpointNotFound, CorruptCheckpoint
from distckpt.format.lineage import Committed, list_committed, read_manifest
from distckpt.format.shard_header import read_header
from distckpt.format.verify import VerifyReport, verify
from distckpt.storage import PosixStore

PER_REGION = 300
STEP = 2


def manager_of(root: Path, training: Training) -> CheckpointManager:
    config = CheckpointConfig(root, preemption_signals=(), control_file=None, verbose=False, threads=2, timeout_s=30.0)
    return CheckpointManager(config, model=training.model, optimizer=training.optimizer)


def save_two(rank: int, root: Path) -> dict[int, dict[str, str]]:
    training, held = Training(rank, 2, 0), {}
    with manager_of(root, training) as manager:
        for step in (1, STEP):
            training.train(step)
            held[step] = training.digests()
            assert manager.save(step=step, extra_state={"note": step}) is not None
    return held


class Saved:
    """A root with two checkpoints of two ranks, and what each rank held."""

    def __init__(self, root: Path, held: list[dict[int, dict[str, str]]]) -> None:
        self.root, self.held = root, held
        self.folder = root / f"step-{STEP:010d}"
        self.shards = sorted(self.folder.glob("g*/*.safetensors"))
        self.manifest = next(self.folder.glob("manifest-*.json"))

    def copy(self, root: Path) -> Saved:
        shutil.copytree(self.root, root, symlinks=True)
        return Saved(root, self.held)

    def committed(self) -> Committed:
        return next(c for c in list_committed(PosixStore(self.root)) if c.step == STEP)

    def check(self, mode: Any) -> VerifyReport:
        return verify(PosixStore(self.root), self.committed(), mode=mode)

    def read(self) -> None:
        """Read everything that the checkpoint holds: tensors and what ranks stored for themselves."""
        checkpoint = open_checkpoint(self.folder, strict=True)
        checkpoint.state_dict("")
        for rank in (0, 1):
            checkpoint.rank_objects(rank)

    def load(self) -> None:
        """Read every tensor the way a live load does."""
        store, committed = PosixStore(self.root), self.committed()
        manifest = read_manifest(store, committed)
        wants = [
            Want(fqn, Box.whole(tuple(e.shape)), torch.empty(e.shape, dtype=getattr(torch, e.dtype)))
            for fqn, e in manifest.tensors.items()
        ]
        CheckpointReader(store, manifest, committed.folder).read(wants, threads=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("damage") / "root"
    return Saved(root, run_ranks(2, save_two, root))


@contextmanager
def flipped(path: Path, offset: int, bit: int) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte[0] ^ 1 << bit]), offset)
        yield
        os.pwrite(fd, byte, offset)
    finally:
        os.close(fd)


def places(start: int, stop: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Return (offset, bit): the first and last byte of a region, and random places in it."""
    chance = random.Random(seed)
    edges = [(start, bit) for bit in range(8)] + [(stop - 1, bit) for bit in range(8)]
    return edges + [(chance.randrange(start, stop), chance.randrange(8)) for _ in range(count - len(edges))]


def regions(path: Path) -> dict[str, tuple[int, int]]:
    """Return the byte ranges of a shard: length and header text, padding up to the data, data."""
    raw = path.read_bytes()
    stop = 8 + int.from_bytes(raw[:8], "little")
    text = len(raw[:stop].rstrip(b" "))
    return {"header": (0, text), "padding": (text, stop), "data": (stop, len(raw))}


READERS = """
import sys, threading
from distckpt.format.lineage import list_committed
from distckpt.format.verify import verify
from distckpt.storage import PosixStore

sys.setswitchinterval(1e-6)
store = PosixStore(sys.argv[1])
committed = list_committed(store)[-1]
start = threading.Barrier(8)

def read():
    start.wait()
    assert verify(store, committed, mode="quick").ok

threads = [threading.Thread(target=read) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
"""


def test_the_first_reads_of_a_process_may_come_from_several_threads(saved: Saved) -> None:
    """A decoder that is built at its first use by two threads at once crashed the process, about every second time."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(6):
        done = subprocess.run([sys.executable, "-c", READERS, saved.root], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ---- single bits


@pytest.mark.parametrize("region", ["header", "padding", "data"])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_flipped_bit_of_a_shard_is_found(rank: int, region: str, saved: Saved) -> None:
    path = saved.shards[rank]
    name = str(path.relative_to(saved.root))
    boxes = read_header(PosixStore(saved.root), name, file_size=path.stat().st_size, expect_digest=None).boxes
    wrong, injected = [], places(*regions(path)[region], PER_REGION, seed=rank)
    for offset, bit in injected:
        with flipped(path, offset, bit):
            for read in (saved.read, saved.load):
                try:
                    read()
                    wrong.append((offset, bit, f"{read.__name__} saw nothing"))
                except CorruptCheckpoint as error:
                    if name not in str(error):
                        wrong.append((offset, bit, f"the error of {read.__name__} does not name the file: {error}"))
            quick, full = saved.check("quick"), saved.check("full")
            tensors = {b.fqn for b in boxes if b.start <= offset < b.start + b.nbytes} if region == "data" else {None}
            if {(p.file, p.rank, p.tensor) for p in full.problems} != {(name, rank, t) for t in tensors}:
                wrong.append((offset, bit, f"verify found {full.problems}"))
            if quick.ok != (region == "data"):
                wrong.append((offset, bit, f"quick verify found {quick.problems}"))
    assert wrong == []
    assert len(injected) == PER_REGION
    saved.read()
    saved.load()
    assert saved.check("full").ok


def test_every_flipped_bit_of_the_manifest_is_found(saved: Saved) -> None:
    wrong, injected = [], places(0, saved.manifest.stat().st_size, 2 * PER_REGION, seed=9)
    name = str(saved.manifest.relative_to(saved.root))
    for offset, bit in injected:
        with flipped(saved.manifest, offset, bit):
            for read in (saved.read, saved.load):
                try:
                    read()
                    wrong.append((offset, bit, f"{read.__name__} saw nothing"))
                except CorruptCheckpoint as error:
                    if name not in str(error):
                        wrong.append((offset, bit, f"the error of {read.__name__} does not name the file: {error}"))
            if [p.file for p in saved.check("quick").problems] != [name]:
                wrong.append((offset, bit, "verify"))
    assert wrong == []
    saved.read()


def test_sampled_verify_finds_a_damaged_block_in_proportion_and_always_when_it_reads_all(saved: Saved) -> None:
    offset = regions(saved.shards[0])["data"][0]
    with flipped(saved.shards[0], offset, 0):
        store, committed = PosixStore(saved.root), saved.committed()
        found = [not verify(store, committed, mode="sample", fraction=0.3, seed=seed).ok for seed in range(40)]
        assert 0 < sum(found) < 40
        assert not verify(store, committed, mode="sample", fraction=1.0).ok


# ---- whole files


def truncate(saved: Saved) -> None:
    os.truncate(saved.shards[1], saved.shards[1].stat().st_size - 1)


def empty(saved: Saved) -> None:
    os.truncate(saved.shards[1], 0)


def extend(saved: Saved) -> None:
    with saved.shards[1].open("ab") as file:
        file.write(b"\0")


def swap(saved: Saved) -> None:
    first, second = (path.read_bytes() for path in saved.shards)
    saved.shards[0].write_bytes(second)
    saved.shards[1].write_bytes(first)


def missing(saved: Saved) -> None:
    saved.shards[1].unlink()


def missing_attempt(saved: Saved) -> None:
    shutil.rmtree(saved.shards[1].parent)


def foreign(saved: Saved) -> None:
    """The same rank's shard of another checkpoint: whole in itself, and of the same size."""
    other = next((saved.root / "step-0000000001").glob("g*/00001-of-*.safetensors"))
    assert other.stat().st_size == saved.shards[1].stat().st_size
    shutil.copyfile(other, saved.shards[1])


def other_content(saved: Saved) -> None:
    saved.shards[1].write_bytes(os.urandom(saved.shards[1].stat().st_size))


def zeroed_data(saved: Saved) -> None:
    """What a file system leaves that has lost the data but not the size."""
    start, stop = regions(saved.shards[1])["data"]
    with saved.shards[1].open("r+b") as file:
        file.seek(start)
        file.write(bytes(stop - start))


def symlink(saved: Saved) -> None:
    moved = saved.root.parent / f"{saved.root.name}-moved"
    saved.shards[1].rename(moved)
    saved.shards[1].symlink_to(moved)


def fifo(saved: Saved) -> None:
    saved.shards[1].unlink()
    os.mkfifo(saved.shards[1])


def folder(saved: Saved) -> None:
    saved.shards[1].unlink()
    saved.shards[1].mkdir()


def torn_manifest(saved: Saved) -> None:
    os.truncate(saved.manifest, saved.manifest.stat().st_size // 2)


def foreign_manifest(saved: Saved) -> None:
    shutil.copyfile(next((saved.root / "step-0000000001").glob("manifest-*")), saved.manifest)


SHARDS: list[Callable[[Saved], None]] = [
    truncate, empty, extend, swap, missing, missing_attempt, foreign, other_content, zeroed_data, symlink, fifo, folder,
]  # fmt: skip
MANIFESTS: list[Callable[[Saved], None]] = [torn_manifest, foreign_manifest]


@pytest.mark.parametrize("damage", [*SHARDS, *MANIFESTS], ids=lambda d: d.__name__)
def test_verify_and_reading_name_the_file_that_is_wrong(
    damage: Callable[[Saved], None], saved: Saved, tmp_path: Path
) -> None:
    hurt = saved.copy(tmp_path / "root")
    damage(hurt)
    path = hurt.manifest if damage in MANIFESTS else hurt.shards[1]
    name = str(path.relative_to(hurt.root))
    for mode in ("quick", "full"):
        if mode == "quick" and damage is zeroed_data:
            continue  # quick reads headers only
        problems = hurt.check(mode).problems
        assert name in [p.file for p in problems], problems
        assert damage in MANIFESTS or {p.rank for p in problems if p.file == name} == {1}
    with pytest.raises(CorruptCheckpoint, match=r"step-0000000002"):
        hurt.read()


def resume_each(rank: int, roots: list[Path]) -> list[Any]:
    """Load the damaged step, then resume, on each root; what each said, and what this rank holds then."""
    told = []
    for root in roots:
        training = Training(rank, 2, 0)
        with manager_of(root, training) as manager:
            try:
                manager.load(STEP)
                refused = ""
            except (CorruptCheckpoint, CheckpointNotFound) as error:
                refused = f"{type(error).__name__}: {error}"
            report = manager.resume()
            assert report is not None
            told.append((root.name, refused, report.step, report.fallbacks, training.digests()))
            training.train(3)
            assert manager.save(step=3) is not None  # and the run goes on from there
    return told


def test_resume_falls_back_on_all_ranks_and_a_load_by_step_refuses(saved: Saved, tmp_path: Path) -> None:
    roots = []
    for damage in [*SHARDS, *MANIFESTS]:
        roots.append(tmp_path / damage.__name__)
        damage(saved.copy(roots[-1]))
    by_rank = run_ranks(2, resume_each, roots, timeout_s=120)
    for rank in (0, 1):
        for name, refused, step, fallbacks, held in by_rank[rank]:
            assert refused.startswith("CorruptCheckpoint: "), (name, refused)
            assert "step-0000000002" in refused
            assert step == 1, name
            assert len(fallbacks) == 1, name
            assert "step-0000000002" in fallbacks[0]
            assert held == saved.held[rank][1], name
    for first, second in zip(*by_rank, strict=True):
        assert first[:4] == second[:4]  # the same words on both ranks


def lose_all(rank: int, root: Path) -> str:
    training = Training(rank, 2, 0)
    with manager_of(root, training) as manager:
        with pytest.raises(CheckpointNotFound) as error:
            manager.resume()
        assert manager.resume(fresh=True) is None
    return str(error.value)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over_unasked(saved: Saved, tmp_path: Path) -> None:
    hurt = saved.copy(tmp_path / "root")
    for shard in hurt.root.glob("step-*/g*/00001-*"):
        os.truncate(shard, 100)
    for text in run_ranks(2, lose_all, hurt.root):
        assert "has 2 checkpoints and none can be loaded" in text
        assert "00001-of-00002.safetensors" in text
