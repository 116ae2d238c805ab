"""Removal: what goes, in which order, and that a crash anywhere leaves orphans only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from builders import build_checkpoint, prepare, shard_paths
from collecting import DAY, all_whole, collected, files, later, orphan, steps
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import failpoints
from distckpt.errors import NotFound
from distckpt.format import names
from distckpt.format.commit import commit
from distckpt.format.lineage import Committed, create_generation, lineage, list_committed, read_manifest
from distckpt.format.verify import verify
from distckpt.manager import gc
from distckpt.manager.gc import collect, take_snapshot
from distckpt.manager.gc_plan import plan_gc, references
from distckpt.storage.base import Store
from distckpt.storage.memory import MemoryStore
from distckpt.storage.posix import PosixStore


@pytest.fixture(params=["memory", "posix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else PosixStore(tmp_path / "root")


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_removes_what_it_is_told_and_nothing_else(store: Store) -> None:
    one, two, three, four = steps(store, 100, 200, 300, 400)
    before = files(store)
    gone = {n for n in before if n.startswith((one.folder, two.folder))}
    size = sum(e.size for e in store.list() if e.name in gone)
    report = collected(store, [two, one])
    assert report.removed == (one, two)
    assert report.freed_bytes == size
    assert (report.kept, report.reasons, report.orphans_removed) == ((), {}, ())
    assert files(store) == before - gone
    assert store.list_folders("") == sorted([three.folder, four.folder, *(["generations"])])
    assert all_whole(store)


def test_dry_run_reports_the_same_and_touches_nothing(store: Store) -> None:
    one, *_ = steps(store, 100, 200, 300)
    before = files(store)
    planned = collected(store, [one], dry_run=True)
    assert files(store) == before
    done = collected(store, [one])
    assert planned == dataclasses.replace(done, dry_run=True)


def test_again_is_fine(store: Store) -> None:
    one, *_ = steps(store, 100, 200, 300)
    collected(store, [one])
    report = collected(store, [one, Committed(50, 1, "step-0000000050/manifest-g000001.json")])
    assert (report.removed, report.freed_bytes, report.reasons) == ((), 0, {})


def test_the_last_commits_of_the_lineage_stay(store: Store) -> None:
    everything = steps(store, 100, 200, 300)
    report = collected(store, everything)
    assert [c.step for c in report.removed] == [100]
    assert sorted(report.kept) == [c.manifest_path for c in everything[1:]]
    assert "resumed from" in report.reasons[everything[2].manifest_path]
    assert [c.step for c in collected(store, everything, minimum_kept=1).removed] == [200]
    assert [c.step for c in collected(store, everything, minimum_kept=0).removed] == [300]


def test_a_damaged_newest_does_not_count_as_kept(store: Store) -> None:
    """With the newest manifest unreadable, the two before it are the ones to fall back to."""
    everything = steps(store, 100, 200, 300)
    newest = everything[2].manifest_path
    store.delete(newest)
    store.create(newest, b"torn")
    report = collected(store, everything)
    assert report.removed == ()
    assert "cannot be read" in report.reasons[newest]
    assert files(store) >= {c.manifest_path for c in everything}


def test_strays_are_not_the_ones_that_are_kept(store: Store) -> None:
    create_generation(store, resumed_from=None)
    steps(store, 100)
    create_generation(store, resumed_from=(1, 100))
    steps(store, 150, generation=2)
    (stray,) = steps(store, 900)
    report = collected(store, [stray], current_generation=2)
    assert report.removed == (stray,)
    assert [c.step for c in list_committed(store)] == [100, 150]


def test_pinned_steps_stay(store: Store) -> None:
    one, *_ = steps(store, 100, 200, 300)
    store.replace(f"{one.folder}/{names.PINNED}", b"")
    report = collected(store, [one])
    assert report.removed == ()
    assert report.reasons == {one.manifest_path: "it is pinned"}
    store.delete(f"{one.folder}/{names.PINNED}")
    assert collected(store, [one]).removed == (one,)
    assert one.folder not in store.list_folders("")


def test_pinned_after_the_plan_was_made(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, *_ = steps(store, 100, 200, 300)

    def pinning_plan(*args: object, **options: object) -> object:
        plan = plan_gc(*args, **options)  # type: ignore[arg-type]
        store.replace(f"{one.folder}/{names.PINNED}", b"")
        return plan

    monkeypatch.setattr(gc, "plan_gc", pinning_plan)
    assert collected(store, [one]).reasons == {one.manifest_path: "it is pinned"}
    assert all_whole(store)
    assert len(list_committed(store)) == 3


def test_only_the_newest_job_removes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one, *_ = steps(store, 100, 200, 300)
    create_generation(store, resumed_from=None)
    newer = create_generation(store, resumed_from=None).number
    report = collected(store, [one], current_generation=newer - 1)
    assert report.removed == ()
    assert "newest job" in report.reasons[one.manifest_path]

    def overtaken(*args: object, **options: object) -> object:
        plan = plan_gc(*args, **options)  # type: ignore[arg-type]
        create_generation(store, resumed_from=None)
        return plan

    monkeypatch.setattr(gc, "plan_gc", overtaken)
    report = collected(store, [one], current_generation=newer)
    assert report.removed == ()
    assert "meanwhile" in report.reasons[one.manifest_path]


def test_data_that_another_manifest_needs_stays(store: Store) -> None:
    """Two manifests of one step share an attempt's files; removing one keeps them."""
    one = build_checkpoint(store, 100, generation=1)
    manifest = read_manifest(store, one)
    shared = prepare(store, 100, generation=2)
    both = msgspec.structs.replace(shared, shards=manifest.shards, save_id=manifest.save_id)
    two = Committed(100, 2, commit(store, both))
    steps(store, 200, 300, generation=2)
    planned = collected(store, [one], current_generation=2, dry_run=True)
    assert planned.freed_bytes == store.size(one.manifest_path)
    report = collected(store, [one], current_generation=2)
    assert report.removed == (one,)
    assert verify(store, two, mode="full").ok
    assert references(two, both) == references(one, manifest)
    assert collected(store, [two], current_generation=2).removed == (two,)
    assert not any(n in files(store) for n in references(one, manifest))


def test_a_reference_that_appears_during_the_run_is_honoured(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one = build_checkpoint(store, 100, generation=1)
    manifest = read_manifest(store, one)
    steps(store, 200, 300)

    def refer(*args: object, **options: object) -> object:
        plan = plan_gc(*args, **options)  # type: ignore[arg-type]
        late = prepare(store, 100, generation=2)
        late = msgspec.structs.replace(late, shards=manifest.shards, save_id=manifest.save_id)
        commit(store, late)
        return plan

    monkeypatch.setattr(gc, "plan_gc", refer)
    assert collected(store, [one]).removed == (one,)
    assert references(one, manifest) <= files(store)
    assert all_whole(store)


# ---------------------------------------------------------------- order, crashes


def test_order_is_manifest_sync_data(store: Store) -> None:
    one, *_ = steps(store, 100, 200, 300)
    shards = shard_paths(store, one)
    trace = failpoints.record()
    synced: list[str] = []
    sync = store.sync_folder
    store.sync_folder = lambda name: (synced.append(name), trace.append(f"sync@{name}"), sync(name))[0]  # type: ignore
    collected(store, [one])
    wanted = [h for h in trace if h.startswith(("gc.", "sync@")) or ("delete.before" in h and one.folder in h)]
    assert wanted == [
        f"gc.before_manifest@{one.manifest_path}",
        f"delete.before@{one.manifest_path}",
        f"sync@{one.folder}",
        f"gc.after_manifest@{one.manifest_path}",
        f"gc.before_data@{one.folder}",
        *(f"delete.before@{s}" for s in shards),
    ]


class Crash(BaseException):
    """The process is gone; no handler of errors sees it."""


@pytest.mark.parametrize("at", range(8))
def test_a_crash_anywhere_leaves_orphans_only(store: Store, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    create_generation(store, resumed_from=None)
    one, two, *_ = steps(store, 100, 200, 300, 400)
    passed = 0

    def crash(name: str, detail: str = "") -> None:
        nonlocal passed
        if name.startswith("gc.") or (name == "delete.before" and "step-" in detail):
            passed += 1
            if passed > at:
                raise Crash

    monkeypatch.setattr(failpoints, "hit", crash)
    with pytest.raises(Crash):
        collected(store, [one, two])
    monkeypatch.undo()
    assert all_whole(store)
    assert {c.step for c in list_committed(store)} >= {300, 400}
    # The next job's collector finishes it, after the grace.
    create_generation(store, resumed_from=(1, 400))
    later(monkeypatch, store, 2 * DAY)
    collected(store, [one, two], current_generation=2)
    assert {n.partition("/")[0] for n in files(store)} == {"generations", "step-0000000300", "step-0000000400"}
    assert all_whole(store)


def test_two_collectors_at_once(store: Store) -> None:
    from concurrent.futures import ThreadPoolExecutor

    everything = steps(store, *range(100, 1100, 100))
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda _: collected(store, everything[:-2]), range(4)))
    assert [c.step for c in list_committed(store)] == [900, 1000]
    assert all_whole(store)
    assert {c for r in reports for c in r.removed} == set(everything[:-2])


def test_an_absent_root_is_no_error(tmp_path: Path) -> None:
    report = collect(PosixStore(tmp_path / "new"), remove=[], current_generation=1, dry_run=True)
    assert (report.removed, report.reasons) == ((), {})


@settings(max_examples=40, deadline=None)
@given(
    commits=st.sets(st.tuples(st.sampled_from([100, 200, 300]), st.integers(1, 3)), max_size=6),
    chosen=st.sets(st.tuples(st.sampled_from([100, 200, 300]), st.integers(1, 3)), max_size=6),
    orphans=st.sets(st.tuples(st.sampled_from([100, 200, 300]), st.integers(0, 4)), max_size=4),
    pinned=st.sets(st.sampled_from([100, 200, 300]), max_size=1),
    old=st.booleans(),
    minimum=st.integers(0, 3),
)
def test_whatever_happens_what_stays_is_whole(
    commits: set[tuple[int, int]],
    chosen: set[tuple[int, int]],
    orphans: set[tuple[int, int]],
    pinned: set[int],
    old: bool,
    minimum: int,
) -> None:
    store = MemoryStore()
    made = {c: build_checkpoint(store, c[0], generation=c[1], world=1, tensors={}) for c in sorted(commits)}
    folders = {o: orphan(store, *o) for o in orphans}
    for step in pinned:
        store.replace(f"{names.step_folder(step)}/{names.PINNED}", b"")
    snapshot = take_snapshot(store)
    snapshot = dataclasses.replace(snapshot, now=snapshot.now + (2 * DAY if old else 0))
    remove = [Committed(s, g, f"{names.step_folder(s)}/{names.manifest_name(g)}") for s, g in chosen]
    plan = plan_gc(snapshot, remove, grace_s=DAY, current_generation=3, minimum_kept=minimum)
    gone = {r.committed for r in plan.removals}
    assert gone <= {made[c] for c in chosen & commits}
    assert not any(c.step in pinned for c in gone)
    stays = set(made.values()) - gone
    line = lineage(made.values(), [])
    assert stays.issuperset(line[:minimum])
    deleted = [f for r in plan.removals for f in r.files] + [f for o in plan.orphans for f in o.files]
    assert len(set(deleted)) == len(deleted)
    for committed in stays:
        assert references(committed, read_manifest(store, committed)).isdisjoint(deleted)
    assert {o.folder for o in plan.orphans} == {f for (_, g), f in folders.items() if old and g < 3}
    with pytest.raises(NotFound):
        store.size("step-0000000000/none")
