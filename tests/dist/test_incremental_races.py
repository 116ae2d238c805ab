"""What a save refers to goes away while it is under way, or nobody knows whether it was committed: nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from manager_support import assert_same, manager, snapshot, steps_in
from torch import nn

from distckpt import CheckpointManager, failpoints, open_checkpoint
from distckpt.errors import CheckpointNotFound, CommitInDoubt, SaveFailed, StaleGeneration, StoreError
from distckpt.format.lineage import create_generation, list_committed
from distckpt.format.verify import quick_check
from distckpt.manager import gc
from distckpt.manager.gc import collect
from distckpt.storage.base import Store

ONE, TWO = "step-0000000001", "step-0000000002"


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Parameter(torch.randn(600, 1024), requires_grad=False)
        self.adapter = nn.Parameter(torch.randn(64))

    def train_a_little(self) -> None:
        with torch.no_grad():
            self.adapter += 1


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoints.arm("")
    failpoints._trace = None


def at(name: str, do: Callable[[], object]) -> None:
    """Do something, once, at the next hit of a failpoint."""
    left = [do]

    class Hits(list[str]):
        def append(self, hit: str) -> None:
            if hit.startswith(f"{name}@") and left:
                left.pop()()

    failpoints.record(Hits())


def incremental(root: Path, model: nn.Module, **options: Any) -> CheckpointManager:
    given = {"incremental": True, "retries": 0, "max_consecutive_failures": 9, "save_total_limit": None}
    return manager(root, model, **{**given, **options})


def remove(store: Store, step: int) -> None:
    """Remove a checkpoint as a gc that keeps nothing would."""
    gone = [c for c in list_committed(store) if c.step == step]
    report = collect(store, remove=gone, current_generation=1, dry_run=False, minimum_kept=0)
    assert report.removed == tuple(gone)


@pytest.mark.parametrize("moment", ["save.begun", "shard.compared", "shard.written", "save.receipt"])
def test_a_base_removed_before_the_commit_fails_the_save_or_is_not_used(tmp_path: Path, moment: str) -> None:
    model = Model()
    with incremental(tmp_path, model) as m:
        m.save(step=1)
        model.train_a_little()
        at(moment, lambda: remove(m.store, 1))
        saved = m.save(step=2)
        assert (saved is None) == (moment != "save.begun")  # there it was looked at after that, and all was written
        assert steps_in(tmp_path) == ([] if saved is None else [2])
        assert m.save(step=3) is not None
        assert bool(open_checkpoint(tmp_path).manifest.references) == (saved is not None)
    check_all(tmp_path, {3: snapshot(model)})


def test_a_base_removed_in_the_instant_before_the_commit_is_never_acknowledged(tmp_path: Path) -> None:
    """The removal has seen no manifest that needs the data, and ours has seen the base: only a second look can tell."""
    model = Model()
    with incremental(tmp_path, model, retries=1) as m:
        m.save(step=1)
        model.train_a_little()
        at("commit.before_manifest", lambda: remove(m.store, 1))
        assert m.save(step=2) is None
        (torn,) = list_committed(m.store)  # it is there, but nobody was told so, and it does not pass for whole
        assert torn.step == 2
        assert [p.file.partition("/")[0] for p in quick_check(m.store, torn)] == [ONE]
        again = Model(seed=1)
        with manager(tmp_path, again) as other, pytest.raises(CheckpointNotFound, match=f"{ONE}.*refers to it"):
            other.resume()
    with incremental(tmp_path, model, start_fresh=True) as m:
        assert m.save(step=3) is not None
        assert not open_checkpoint(tmp_path).manifest.references
    check_all(tmp_path, {3: snapshot(model)})


def test_a_gc_that_pauses_before_the_data_sees_the_new_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is deleted after the commit's last look: the removal lists again, and leaves the data."""
    model = Model()
    with incremental(tmp_path, model) as m:
        m.save(step=1)
        plan = gc.plan_gc

        def late(*args: Any, **options: Any) -> Any:
            chosen = plan(*args, **options)  # what is to go is decided, nothing is gone
            monkeypatch.undo()
            model.train_a_little()
            assert m.save(step=2) is not None
            return chosen

        monkeypatch.setattr(gc, "plan_gc", late)
        remove(m.store, 1)
        assert steps_in(tmp_path) == [2]
        assert list((tmp_path / ONE).glob("g*/*.safetensors"))
    check_all(tmp_path, {2: snapshot(model)})


def test_after_a_commit_in_doubt_the_next_save_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    with incremental(tmp_path, model, max_consecutive_failures=0) as m:
        m.save(step=1)
        model.train_a_little()
        read = type(m.store).read

        def unreadable(store: Store, name: str, *args: Any) -> bytes:
            if name.startswith(f"{TWO}/manifest"):
                raise StoreError(f"{name}: the server does not answer")
            return read(store, name, *args)

        monkeypatch.setattr(type(m.store), "read", unreadable)
        failpoints.arm("commit.after_manifest:1:raise=EIO")
        with pytest.raises(CommitInDoubt):
            m.save(step=2)
        monkeypatch.undo()
        failpoints.arm("")
        second = snapshot(model)
        model.train_a_little()
        assert m.save(step=3) is not None
        assert not open_checkpoint(tmp_path).manifest.references
    check_all(tmp_path, {2: second, 3: snapshot(model)})  # and the one in doubt was committed, whole


def test_a_job_that_was_replaced_commits_nothing_that_refers_to_what_it_lost(tmp_path: Path) -> None:
    model = Model()
    with incremental(tmp_path, model, max_consecutive_failures=0) as m:
        m.save(step=1)
        m.save(step=2)
        create_generation(m.store, resumed_from=(1, 1), owner="another job")
        model.train_a_little()
        with pytest.raises(StaleGeneration):
            m.save(step=3)
        second = [c for c in list_committed(m.store) if c.step == 2]  # a stray by now: the new job may remove it
        collect(m.store, remove=second, current_generation=2, dry_run=False)
    again = Model(seed=1)
    with incremental(tmp_path, again) as m:
        report = m.resume(prove=True)
        assert report is not None
        assert (report.step, report.fallbacks) == (1, [])
        assert m.save(step=2) is not None
        assert [r.attempt.partition("/")[0] for r in open_checkpoint(tmp_path).manifest.references] == [ONE]
    check_all(tmp_path, {2: snapshot(again)})


def test_a_resume_that_falls_back_refers_to_what_it_loaded(tmp_path: Path) -> None:
    """Damage in the newest: the next save refers to the older one that was read, block by block, and to nothing else."""
    model, wanted = Model(), {}
    with incremental(tmp_path, model) as m:
        for step in (1, 2):
            m.save(step=step)
            wanted[step] = snapshot(model)
            model.train_a_little()
    (shard,) = (tmp_path / TWO).glob("g*/*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    again = Model(seed=1)
    with incremental(tmp_path, again) as m:
        report = m.resume()
        assert report is not None
        assert report.step == 1
        assert_same(snapshot(again), wanted[1])
        m.save(step=3)
        assert [r.attempt.partition("/")[0] for r in open_checkpoint(tmp_path).manifest.references] == [ONE]
    check_all(tmp_path, {1: wanted[1], 3: wanted[1]})


def check_all(root: Path, wanted: dict[int, dict[str, torch.Tensor]]) -> None:
    for step, values in wanted.items():
        checkpoint = open_checkpoint(root / f"step-{step:010d}")
        assert checkpoint.verify("full").problems == ()
        assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, values)


def test_a_lost_base_is_said_in_words(tmp_path: Path) -> None:
    model = Model()
    with incremental(tmp_path, model, max_consecutive_failures=0) as m:
        m.save(step=1)
        at("save.receipt", lambda: remove(m.store, 1))
        with pytest.raises(SaveFailed, match=f"{ONE}/manifest-g000001.json was removed while a save referred to it"):
            m.save(step=2)
