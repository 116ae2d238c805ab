"""Removal in roots of incremental checkpoints: what a manifest refers to stays, what none does goes."""

from __future__ import annotations

from dataclasses import dataclass, field

import builders
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.dcp.incremental import merged
from distckpt.format import names
from distckpt.format.box_reader import missing_references
from distckpt.format.commit import commit
from distckpt.format.doctor import diagnose
from distckpt.format.lineage import Committed, Generation
from distckpt.format.manifest import Manifest, ShardEntry
from distckpt.format.runs import FileRef
from distckpt.format.uncommitted import uncommitted
from distckpt.manager.gc import collect
from distckpt.manager.gc_plan import Snapshot, plan_gc, references
from distckpt.storage.base import Entry, Store
from distckpt.storage.memory import MemoryStore

RANKS = 2


@dataclass
class Root:
    """Names only: manifests, and the files that are there, as a job and its removals leave them."""

    manifests: dict[Committed, Manifest] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    generation: int = 1
    unreadable: set[Committed] = field(default_factory=set)

    def save(self, step: int, chosen: list[str], *, commits: bool = True) -> None:
        attempt = names.attempt_name(self.generation, f"{step:08x}")
        shards = [ShardEntry(path=f"{attempt}/{names.shard_name(r, RANKS)}", size=9, header="0" * 32) for r in range(RANKS)]
        folder = names.step_folder(step)
        self.files |= {f"{folder}/{shard.path}" for shard in shards}
        manifest = Manifest(
            step=step, epoch=None, time="t", generation=self.generation, attempt=attempt, save_id="s", world_size=RANKS,
            engine="test", meshes=[], tensors={}, aliases={}, objects={}, per_rank=[], metrics={}, config=None,
            provenance=None, software={}, shards=shards,
        )  # fmt: skip
        if commits:
            path = f"{folder}/{names.manifest_name(self.generation)}"
            used = merged([[(FileRef(name, 9, "0" * 32), 1) for name in chosen]])
            self.manifests[Committed(step, self.generation, path)] = manifest.referring(used)

    def needed(self) -> set[str]:
        return {name for c, m in self.manifests.items() for name in references(c, m)}

    def snapshot(self, now: float = 1e9) -> Snapshot:
        entries = tuple(Entry(name, 9, 0.0) for name in sorted(self.files | {c.manifest_path for c in self.manifests}))
        attempts = tuple(sorted({name.rpartition("/")[0] for name in self.files}))
        starts = {g: (g - 1, 1 << 40) if g > 1 else None for g in range(1, self.generation + 1)}
        records = tuple(Generation(g, "n", "h", "o", "t", resumed) for g, resumed in starts.items())
        known = {c: "torn" if c in self.unreadable else m for c, m in self.manifests.items()}
        return Snapshot(entries, attempts, known, records, self.generation, now)

    def collect(self, remove: list[Committed], *, stop_after: int | None = None) -> None:
        """Carry out a plan in order; ``stop_after``: the process dies right after that many manifests are deleted."""
        plan = plan_gc(self.snapshot(), remove, grace_s=1.0, current_generation=self.generation)
        for number, removal in enumerate(plan.removals, 1):
            del self.manifests[removal.committed]
            if number == stop_after:
                return
            self.files -= set(removal.files)
        for orphan in plan.orphans:
            self.files -= set(orphan.files)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_file_that_is_referred_to_is_never_deleted_and_all_others_go(data: st.DataObject) -> None:
    root = Root()
    for step in range(1, data.draw(st.integers(3, 9)) + 1):
        newest = max(root.manifests, default=None)
        # One level deep: a save refers to the files that the one before has, or refers to itself.
        known = sorted(references(newest, root.manifests[newest])) if newest is not None else []
        chosen = data.draw(st.lists(st.sampled_from(known), unique=True)) if known else []
        root.save(step, chosen, commits=data.draw(st.integers(0, 4)) > 0)
        remove = data.draw(st.lists(st.sampled_from(sorted(root.manifests)), unique=True)) if root.manifests else []
        stop = data.draw(st.one_of(st.none(), st.integers(1, 2)))
        root.collect(remove, stop_after=stop)
        assert root.needed() <= root.files
        if data.draw(st.booleans()):
            root.generation += 1  # the job is started again
    root.generation += 1
    root.save(100, [])
    root.save(101, [])
    root.collect(sorted(root.manifests))
    root.collect([])
    assert sorted(c.step for c in root.manifests) == [100, 101]
    assert root.files == root.needed()


def test_a_dead_checkpoint_keeps_only_what_is_referred_to() -> None:
    root = Root()
    root.save(1, [])
    first = f"step-0000000001/g000001-{1:08x}"
    shared = f"{first}/{names.shard_name(0, RANKS)}"
    root.save(2, [shared])
    root.save(3, [shared])
    one, two, three = sorted(root.manifests)
    root.collect([one])
    assert root.files == root.needed()
    assert {name for name in root.files if name.startswith(first)} == {shared}
    root.save(4, [])
    root.collect([two])
    assert shared in root.files
    root.save(5, [])
    root.collect([three])
    assert shared not in root.files


def test_two_that_share_a_file_may_go_together() -> None:
    root = Root()
    root.save(1, [])
    root.save(2, sorted(root.files))
    root.save(3, [])
    root.save(4, [])
    root.collect(sorted(root.manifests)[:2])
    assert root.files == root.needed()
    assert len(root.manifests) == 2


def test_while_a_manifest_cannot_be_read_what_it_may_refer_to_stays() -> None:
    """Only in a root with references, and only older steps: nothing refers to a later one."""
    root = Root()
    for step in (1, 2, 3, 4, 5, 6, 7):
        root.save(step, sorted(root.files)[:1] if step in (2, 4) else [])
    steps = {c.step: c for c in root.manifests}
    root.unreadable = {steps[4]}
    plan = plan_gc(root.snapshot(), [steps[s] for s in (1, 2, 3, 5)], grace_s=1.0, current_generation=1)
    assert [r.committed.step for r in plan.removals] == [5]
    assert "may refer to its data" in plan.reasons[steps[1].manifest_path]
    root.manifests = {c: m.referring([]) for c, m in root.manifests.items()}
    plan = plan_gc(root.snapshot(), [steps[s] for s in (1, 2, 3, 5)], grace_s=1.0, current_generation=1)
    assert [r.committed.step for r in plan.removals] == [1, 2, 3, 5]


# ---------------------------------------------------------------- on a store


@pytest.fixture
def store() -> Store:
    return MemoryStore()


def referring(store: Store, step: int, names_of: list[str]) -> Committed:
    manifest = builders.prepare(store, step, world=1, tensors={})
    used = merged([[(FileRef(n, store.size(n), "0" * 32), 1) for n in names_of]])
    return Committed(step, 1, commit(store, manifest.referring(used), check_fencing=False))


def test_collect_keeps_frees_and_tidies_folders(store: Store) -> None:
    one = builders.build_checkpoint(store, 1, world=2, tensors={})
    first = builders.shard_paths(store, one)
    two, three = referring(store, 2, first[:1]), referring(store, 3, first[:1])
    report = collect(store, remove=[one], current_generation=1, dry_run=False)
    assert report.removed == (one,)
    assert {e.name for e in store.list("step-0000000001")} == {first[0]}
    assert uncommitted(store) == []
    assert diagnose(store).facts["orphans"] == []
    referring(store, 4, [])
    referring(store, 5, [])
    planned = collect(store, remove=[two, three], current_generation=1, dry_run=True)
    done = collect(store, remove=[two, three], current_generation=1, dry_run=False)
    assert planned.freed_bytes == done.freed_bytes
    assert [f for f in store.list_folders("") if f.startswith("step-")] == ["step-0000000004", "step-0000000005"]


def test_what_a_crash_leaves_beside_a_referred_file_is_collected_later(store: Store) -> None:
    one = builders.build_checkpoint(store, 1, world=2, tensors={})
    first = builders.shard_paths(store, one)
    two = referring(store, 2, first[:1])
    referring(store, 3, [])
    store.delete(one.manifest_path)  # and then the process died
    assert uncommitted(store) == []  # its folder is needed
    report = collect(store, remove=[], current_generation=1, dry_run=False, grace_s=0.0)
    assert set(first) <= {e.name for e in store.list()}
    assert any("running job" in reason for reason in report.reasons.values())
    report = collect(store, remove=[], current_generation=2, dry_run=False, grace_s=-1.0)
    assert {e.name for e in store.list("step-0000000001")} == {first[0]}
    assert read_back(store, two)


def test_a_reference_that_appears_while_a_checkpoint_is_removed_is_honoured(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distckpt.manager import gc

    one = builders.build_checkpoint(store, 1, world=1, tensors={})
    first = builders.shard_paths(store, one)
    builders.build_checkpoint(store, 2, world=1, tensors={})
    builders.build_checkpoint(store, 3, world=1, tensors={})

    def late(*args: object, **options: object) -> object:
        plan = plan_gc(*args, **options)  # type: ignore[arg-type]
        referring(store, 4, first)
        return plan

    monkeypatch.setattr(gc, "plan_gc", late)
    assert collect(store, remove=[one], current_generation=1, dry_run=False).removed == (one,)
    assert first[0] in {e.name for e in store.list()}


def read_back(store: Store, committed: Committed) -> bool:
    from distckpt.format.lineage import read_manifest

    return missing_references(store, read_manifest(store, committed)) == {}


def test_manifests_without_references_are_as_they_were(store: Store) -> None:
    manifest = builders.prepare(store, 1, tensors={})
    assert "reused" not in msgspec.to_builtins(manifest)
    assert manifest.referring([]) == manifest
