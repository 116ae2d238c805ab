"""Ranges that are known beforehand are fetched together, each byte right, whoever asks in whatever order."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.format import read_ahead
from distckpt.format.read_ahead import Extent, ReadAhead, ReadThrough
from distckpt.storage import MemoryStore
from distckpt.storage.direct import ALIGNMENT, address

KIB, MIB = 1 << 10, 1 << 20


def store_of(sizes: dict[str, int]) -> MemoryStore:
    store = MemoryStore()
    for name, size in sizes.items():
        store.create(name, random.Random(name).randbytes(size))
    return store


def in_turn(store: MemoryStore, extents: Iterable[tuple[str, int, int]]) -> list[list[list[Extent]]]:
    """Return rows of one extent each."""
    return [[[(store, *extent)]] for extent in extents]


def fetch(reader: ReadThrough | MemoryStore, name: str, start: int, nbytes: int) -> bytes:
    target = bytearray(nbytes)
    reader.read_into(name, start, memoryview(target))
    return bytes(target)


@settings(max_examples=60, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.integers(0, 30)), max_size=20),
    others=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.integers(0, 30)), max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_every_byte_is_right_in_any_order_and_beside_the_plan(
    ranges: list[tuple[str, int, int]], others: list[tuple[str, int, int]], order: random.Random
) -> None:
    store = store_of({"a": 100 * KIB, "b": 100 * KIB, "c": 100 * KIB})
    extents = [(name, start * KIB, nbytes * KIB) for name, start, nbytes in ranges]
    asked = [*extents, *extents[:3], *((name, start * KIB + 5, nbytes * KIB) for name, start, nbytes in others)]
    order.shuffle(asked)
    with ReadAhead(in_turn(store, extents)) as ahead:
        reader = ahead.over(store)
        for name, start, nbytes in asked:
            assert fetch(reader, name, start, nbytes) == store.read(name, start, nbytes)


def test_small_ranges_are_joined_and_far_or_large_ones_are_not() -> None:
    store = store_of({"a": 40 << 20})
    gap, large = read_ahead.GAP, 2 << 20
    extents = [("a", i * KIB, KIB) for i in range(1000)]  # one request
    extents += [("a", 1000 * KIB + gap, 10)]  # joined over the gap
    extents += [("a", 1010 * KIB + 2 * gap + 11, 10)]  # one more
    extents += [("a", 10 << 20, large)]  # passed on
    with ReadAhead(in_turn(store, extents), large=large) as ahead:
        reader = ahead.over(store)
        for extent in extents:
            fetch(reader, *extent)
    assert store.counters["opens"] == 3
    page = (1010 * KIB + 2 * gap + 11) % 4096  # requests begin with a page, and end with one if more follows
    end = -(1000 * KIB + gap + 10) % 4096
    assert store.counters["bytes_read"] == 1000 * KIB + gap + 10 + end + page + 10 + large


@pytest.mark.parametrize("step", [64 * KIB, 3 << 20, 5 << 20])
def test_long_ranges_are_cut_and_read_across_the_cuts(step: int) -> None:
    size = 10 << 20
    store = store_of({"a": size + 3})
    content = store._content("a")
    with ReadAhead(in_turn(store, [("a", 3, size)])) as ahead:
        reader, slots = ahead.over(store), len(ahead._free)
        for start in range(3, size + 3, step):
            nbytes = min(step, size + 3 - start)
            assert fetch(reader, "a", start, nbytes) == content[start : start + nbytes]
        assert free_at_the_end(ahead) == slots
    requests = -(-size // read_ahead.NEAR_REQUEST)
    assert store.counters["opens"] == requests
    assert store.counters["bytes_read"] <= size + requests * 2 * ALIGNMENT


@settings(max_examples=60, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 800), st.integers(1, 800)), min_size=1, max_size=6),
    unit=st.sampled_from([4 * KIB, 32 * KIB, 256 * KIB]),
    cut=st.floats(0, 1),
)
def test_what_is_lent_is_right_and_cut_in_units(ranges: list[tuple[int, int]], unit: int, cut: float) -> None:
    store = store_of({"a": 7 << 20})
    content = store._content("a")
    extents = [("a", start * 4 * KIB, nbytes * 4 * KIB) for start, nbytes in ranges]
    with ReadAhead(in_turn(store, extents)) as ahead:
        reader, slots = ahead.over(store), len(ahead._free)
        for name, start, nbytes in extents:
            middle = start + int(nbytes * cut) // unit * unit
            for first, last in ((start, middle), (middle, start + nbytes)):
                parts = [bytes(part) for part in reader.lend(name, first, memoryview(bytearray(last - first)), unit)]
                assert b"".join(parts) == content[first:last]
                assert not any(len(part) % unit for part in parts[:-1])
        assert free_at_the_end(ahead) == slots


def test_a_long_range_is_lent_where_it_was_read_to() -> None:
    """Behind a short one it begins a request of its own, so that its blocks are whole in each."""
    store = store_of({"a": 9 << 20})
    extents = [("a", 0, 100 * KIB), ("a", 100 * KIB, 6 << 20)]
    with ReadAhead(in_turn(store, extents)) as ahead:
        reader, spare = ahead.over(store), memoryview(bytearray(2 << 20))
        for start in range(100 * KIB, 4 << 20, 1 << 20):
            for part in reader.lend("a", start, spare[: 1 << 20], 256 * KIB):
                assert len(part) == 1 << 20
                assert address(part) != address(spare)
    assert store.counters["opens"] <= 1 + 3


def test_memory_is_not_used_again_while_it_is_lent() -> None:
    store = store_of({"a": 200 << 20})
    content = store._content("a")
    with ReadAhead(in_turn(store, [("a", 0, 200 << 20)])) as ahead:
        reader, spare = ahead.over(store), memoryview(bytearray(8 << 20))
        lent = reader.lend("a", 0, spare[: 2 << 20], 256 * KIB)
        held = next(lent)
        fetch(reader, "a", 0, 2 << 20)  # all of it was asked for: but for the loan, the memory is free
        for start in range(2 << 20, 200 << 20, 8 << 20):
            nbytes = min(8 << 20, (200 << 20) - start)
            assert fetch(reader, "a", start, nbytes) == content[start : start + nbytes]
        assert held == content[: 2 << 20]
        assert next(lent, None) is None


def test_what_is_read_beside_the_plan_holds_no_memory() -> None:
    store = store_of({"a": 4 << 20})
    extents = [("a", start << 20, 512 * KIB) for start in range(4)]  # too far apart to be joined
    with ReadAhead(in_turn(store, extents)) as ahead:
        reader, slots = ahead.over(store), len(ahead._free)
        fetch(reader, *extents[0])  # has the others fetched
        assert len(ahead._free) < slots
        beside = fetch(reader, "a", 1 << 20, 3 << 20)  # what lies between was not told of
        assert beside == store._content("a")[1 << 20 :]
        assert free_at_the_end(ahead) == slots


def free_at_the_end(ahead: ReadAhead) -> int:
    """Wait for what is being fetched, and return how many pieces of memory are free; nothing is fetched after that."""
    ahead._pool.shutdown()
    return len(ahead._free)


def test_memory_is_bounded_and_given_back() -> None:
    store = store_of({str(i): 1 << 20 for i in range(40)})
    extents = [(str(i), start * 16 * KIB, 16 * KIB) for start in range(64) for i in range(40)]
    with ReadAhead(in_turn(store, extents)) as ahead:
        assert sum(map(len, ahead._free)) <= read_ahead.MEMORY
        reader, slots = ahead.over(store), len(ahead._free)
        for extent in extents:
            fetch(reader, *extent)
        assert all(span.content is None for spans in ahead._spans.values() for span in spans)
        assert free_at_the_end(ahead) == slots
    assert store.counters["opens"] == 40


def test_files_that_are_read_side_by_side_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two long tensors of each of six files, read a part of each file at a time, as an average does: a few parts are held."""
    monkeypatch.setattr(read_ahead, "NEAR_AHEAD", 3)
    part, names = read_ahead.NEAR_REQUEST, "abcdef"
    store = store_of(dict.fromkeys(names, 16 * part))
    tensors = [(0, 9 * part), (9 * part, 7 * part)]
    rows = [[[(store, name, *tensor)] for name in names] for tensor in tensors]
    fewest = []
    with ReadAhead(rows) as ahead:
        reader, slots = ahead.over(store), len(ahead._free)
        for start in range(0, 16 * part, part):
            for name in names:
                spare = memoryview(bytearray(part))
                for lent in reader.lend(name, start, spare, 256 * KIB):
                    assert lent == store._content(name)[start : start + part]
                    assert address(lent) != address(spare)  # it was fetched before
                fewest.append(len(ahead._free))
        assert free_at_the_end(ahead) == slots
    assert slots - min(fewest) <= 3 + 1
    assert store.counters["opens"] == 16 * len(names)


def test_all_of_what_is_wanted_is_fetched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where parts of many other files are needed between its own."""
    monkeypatch.setattr(read_ahead, "NEAR_AHEAD", 2)
    part, names = read_ahead.NEAR_REQUEST, [f"f{i}" for i in range(8)]
    store = store_of(dict.fromkeys(names, 2 * part))
    with ReadAhead([[[(store, name, 0, 2 * part)] for name in names]]) as ahead:
        lent = ahead.over(store).lend(names[0], 0, memoryview(bytearray(2 * part)), 256 * KIB)
        assert next(lent) == store._content(names[0])[:part]
        assert {(file[1], span.start) for file, span in ahead._order if span.content is not None} >= {
            (names[0], 0), (names[0], part), (names[1], 0), (names[2], 0)
        }  # fmt: skip
        lent.close()


def test_what_is_used_first_is_fetched_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of members in two dtypes the one of twice the bytes is two parts on where the other is one."""
    monkeypatch.setattr(read_ahead, "NEAR_AHEAD", 5)
    monkeypatch.setattr(read_ahead, "NEAR_REQUEST", MIB)
    store = store_of({"narrow": 4 * MIB, "wide": 8 * MIB})
    wide = [(store, "wide", 0, 4 * MIB), (store, "wide", 4 * MIB, 4 * MIB)]
    with ReadAhead([[[(store, "narrow", 0, 4 * MIB)], wide]]) as ahead:
        fetch(ahead.over(store), "narrow", 0, MIB)
        ahead._pool.shutdown()
        begun = sorted((span.start, file[1]) for file, span in ahead._order if span.content is not None)
    assert begun == [(0, "wide"), (MIB, "narrow"), (MIB, "wide"), (2 * MIB, "wide"), (3 * MIB, "wide")]


def test_threads_share_what_was_fetched() -> None:
    store = store_of({"a": 1 << 20})
    extents = [("a", i * KIB, KIB) for i in range(1024)]
    with ReadAhead(in_turn(store, extents)) as ahead:
        reader = ahead.over(store)
        wrong: list[int] = []

        def run(first: int) -> None:
            for name, start, nbytes in extents[first::4]:
                if fetch(reader, name, start, nbytes) != store._content(name)[start : start + nbytes]:
                    wrong.append(start)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not wrong
    assert store.counters["opens"] == 1
