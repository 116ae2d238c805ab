"""Which commits count: the pure rule against a naive model, and the records on a store."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from builders import build_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import AlreadyExists, ManifestError, UnsupportedVersion
from distckpt.format import lineage as lineage_module
from distckpt.format import names
from distckpt.format.lineage import (
    Committed,
    Generation,
    create_generation,
    ensure_root,
    heartbeat,
    highest_generation,
    lineage,
    list_committed,
    live_generations,
    read_generations,
    read_root,
    store_now,
    strays,
)
from distckpt.storage.base import Store
from distckpt.storage.memory import MemoryStore
from distckpt.storage.posix import PosixStore


@pytest.fixture(params=["memory", "posix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else PosixStore(tmp_path / "root")


def commit_of(step: int, generation: int) -> Committed:
    return Committed(step, generation, f"{names.step_folder(step)}/{names.manifest_name(generation)}")


def record(number: int, resumed_from: tuple[int, int] | None) -> Generation:
    return Generation(number, "00000000", "host", "owner", "time", resumed_from)


def test_chain_with_a_late_commit() -> None:
    """Job 2 resumed at 200; what job 1 committed later is a stray, and so is a second try's forgotten branch."""
    commits = [commit_of(s, g) for s, g in [(100, 1), (200, 1), (300, 1), (250, 2), (350, 2), (300, 3)]]
    generations = [record(1, None), record(2, (1, 200)), record(3, (2, 250))]
    line = lineage(commits, generations)
    assert [(c.step, c.generation) for c in line] == [(300, 3), (250, 2), (200, 1), (100, 1)]
    assert [(c.step, c.generation) for c in strays(commits, generations)] == [(350, 2), (300, 1)]


def test_fresh_start_ends_the_line() -> None:
    commits = [commit_of(100, 1), commit_of(50, 2)]
    assert lineage(commits, [record(1, None), record(2, None)]) == [commit_of(50, 2)]
    assert lineage([commit_of(100, 1)], [record(1, None), record(2, None)]) == []
    assert lineage([], []) == []


def test_lost_record_hides_nothing_that_its_job_could_resume_from() -> None:
    commits = [commit_of(100, 1), commit_of(200, 1), commit_of(300, 1), commit_of(250, 2), commit_of(400, 2)]
    line = lineage(commits, [record(1, None)])
    assert [(c.step, c.generation) for c in line] == [(400, 2), (250, 2), (200, 1), (100, 1)]
    # No records at all: a step folder that was copied alone is still found.
    assert lineage([commit_of(7, 5)], []) == [commit_of(7, 5)]


@st.composite
def histories(draw: st.DrawFn) -> tuple[set[tuple[int, int]], dict[int, tuple[int, int] | None], list[tuple[int, int]]]:
    """Simulate jobs that resume, commit, are overtaken, and commit late; returns the expected line too.

    The model keeps for every job the list of checkpoints it truly descends from, as the job itself would know it.
    """
    commits: set[tuple[int, int]] = set()
    resumed: dict[int, tuple[int, int] | None] = {}
    ancestors: dict[int, list[tuple[int, int]]] = {}
    own: dict[int, list[tuple[int, int]]] = {}
    for _ in range(draw(st.integers(1, 25))):
        action = draw(st.sampled_from(["start", "resume", "save", "save", "late"]))
        newest = max(resumed, default=0)
        if action in ("start", "resume") or not newest:
            job = newest + 1
            past = [*ancestors[newest], *own[newest]] if newest else []
            chosen = draw(st.sampled_from(past)) if action == "resume" and past else None
            resumed[job] = None if chosen is None else (chosen[1], chosen[0])
            ancestors[job] = past[: past.index(chosen) + 1] if chosen is not None else []
            own[job] = []
        else:
            job = newest if action == "save" else draw(st.sampled_from(sorted(resumed)))
            before = [*ancestors[job], *own[job]]
            step = (before[-1][0] if before else 0) + draw(st.integers(1, 3))
            own[job].append((step, job))
            commits.add((step, job))
    last = max(resumed)
    return commits, resumed, [*ancestors[last], *own[last]]


@settings(max_examples=300, deadline=None)
@given(histories(), st.randoms())
def test_lineage_is_what_the_newest_job_descends_from(
    history: tuple[set[tuple[int, int]], dict[int, tuple[int, int] | None], list[tuple[int, int]]],
    rng: random.Random,
) -> None:
    commits, resumed, expected = history
    shuffled = [commit_of(*c) for c in sorted(commits)]
    rng.shuffle(shuffled)
    line = lineage(shuffled, [record(n, r) for n, r in resumed.items()])
    assert [(c.step, c.generation) for c in line] == expected[::-1]
    outside = strays(shuffled, [record(n, r) for n, r in resumed.items()])
    assert sorted([*line, *outside]) == sorted(shuffled)


@settings(max_examples=200, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 9), st.integers(1, 6))),
    st.dictionaries(st.integers(1, 6), st.none() | st.tuples(st.integers(0, 8), st.integers(0, 9))),
)
def test_any_records_end_and_never_repeat_a_commit(
    commits: set[tuple[int, int]], records: dict[int, tuple[int, int] | None]
) -> None:
    """Hostile or damaged records: links to oneself, upwards, or to nothing."""
    line = lineage([commit_of(*c) for c in commits], [record(n, r) for n, r in records.items()])
    assert len(set(line)) == len(line)
    assert [c.generation for c in line] == sorted((c.generation for c in line), reverse=True)


def test_root_is_made_once(store: Store) -> None:
    assert read_root(store) is None
    first = ensure_root(store)
    assert first["version"] == [1, 0]
    assert len(first["run_id"]) == 32
    assert ensure_root(store) == first


def test_racing_roots_agree(store: Store) -> None:
    found: list[str] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        found.append(ensure_root(store)["run_id"])

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"format":"distckpt","version":[3,0],"run_id":"x"}', UnsupportedVersion),
        (b'{"format":"distckpt","version":[1,0],"version":[1,0],"run_id":"x"}', ManifestError),
        (b'{"format":"other","version":[1,0],"run_id":"x"}', ManifestError),
        (b'{"format":"distckpt","version":"1.0","run_id":"x"}', ManifestError),
        (b'{"format":"distckpt","version":[1,0]}', ManifestError),
        (b"[]", ManifestError),
        (b"", ManifestError),
    ],
)
def test_root_files_that_are_refused(store: Store, content: bytes, error: type[Exception]) -> None:
    store.create(names.ROOT_FILE, content)
    with pytest.raises(error, match=r"distckpt\.json"):
        ensure_root(store)


def test_a_newer_minor_version_is_read(store: Store) -> None:
    store.create(names.ROOT_FILE, b'{"format":"distckpt","version":[1,7],"run_id":"x","new":1}')
    assert ensure_root(store)["run_id"] == "x"


def test_generations_count_up(store: Store) -> None:
    assert highest_generation(store) == 0
    first = create_generation(store, resumed_from=None, host="a", owner="me")
    second = create_generation(store, resumed_from=(1, 300))
    assert (first.number, second.number) == (1, 2)
    assert first.nonce != second.nonce
    assert read_generations(store) == [first, second]
    assert read_generations(store)[1].resumed_from == (1, 300)
    assert highest_generation(store) == 2


def test_racing_jobs_get_different_generations(store: Store) -> None:
    found: list[int] = []
    barrier = threading.Barrier(6)

    def start() -> None:
        barrier.wait()
        found.append(create_generation(store, resumed_from=None).number)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 7))


def test_generation_that_is_taken_under_us(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create_generation(store, resumed_from=None)
    monkeypatch.setattr(lineage_module, "highest_generation", lambda store: 0)
    with pytest.raises(AlreadyExists):
        store.create(names.generation_file(1), b"other")
    assert create_generation(store, resumed_from=None).number == 2


def test_a_new_generation_is_above_every_commit(store: Store) -> None:
    """Step folders may have been copied here without the generation records."""
    build_checkpoint(store, 100, generation=7, world=1, tensors={})
    assert create_generation(store, resumed_from=(7, 100)).number == 8


def test_unreadable_records_are_skipped_but_their_number_is_taken(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    first = create_generation(store, resumed_from=None)
    store.create(names.generation_file(2), b'{"generation": 9}')
    store.create(
        names.generation_file(3), b'{"generation":3,"nonce":"n","host":"h","owner":"o","time":"t","resumed_from":[3,1]}'
    )
    store.create("generations/0004.json", b"not a name of ours")
    assert read_generations(store) == [first]
    assert "000002.json" in caplog.text
    assert "000003.json" in caplog.text
    assert highest_generation(store) == 3
    assert create_generation(store, resumed_from=None).number == 4


def test_committed_are_found_by_strict_names_only(store: Store) -> None:
    one = build_checkpoint(store, 100, generation=1, world=1, tensors={})
    two = build_checkpoint(store, 100, generation=2, world=1, tensors={})
    far = build_checkpoint(store, 12_345_678_901, generation=2, world=1, tensors={})
    for name in (
        "step-100/manifest-g000001.json",
        "step-0000000300/manifest-g1.json",
        "step-0000000300/deeper/manifest-g000001.json",
        "manifest-g000001.json",
    ):
        store.create(name, b"x")
    assert list_committed(store) == [one, two, far]


def test_heartbeats(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create_generation(store, resumed_from=None)
    create_generation(store, resumed_from=None)
    assert list(live_generations(store, 60)) == []
    heartbeat(store, 2)
    assert list(live_generations(store, 60)) == [2]
    heartbeat(store, 1)
    heartbeat(store, 2)
    assert list(live_generations(store, 60)) == [1, 2]
    # A heartbeat's file is no generation, and asking for the time leaves nothing behind.
    assert [g.number for g in read_generations(store)] == [1, 2]
    assert highest_generation(store) == 2
    left = {e.name for e in store.list("generations")}
    assert left == {f"generations/00000{n}.{kind}" for n in (1, 2) for kind in ("json", "alive")}
    now = store_now(store)
    monkeypatch.setattr(lineage_module, "store_now", lambda store: now + 3600)
    assert list(live_generations(store, 60)) == []
    assert list(live_generations(store, 3700)) == [1, 2]
