"""The sampler's position: every sample once, over any change of the number of ranks."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from distckpt.engines.sampler import ResumableSampler, epoch_order
from distckpt.errors import ConfigError, IncompatibleState


class Numbers(Dataset[int]):
    """Sample i is i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def job(world: int, length: int, batch: int, state: Any = None, *, workers: int = 0, **settings: Any) -> list[Any]:
    """Return (sampler, tracked loader) of each rank of a job that resumes from ``state``."""
    ranks = []
    for rank in range(world):
        sampler = ResumableSampler(length, num_replicas=world, rank=rank, **settings)
        if state is not None:
            sampler.load_state_dict(state)
        loader = DataLoader(Numbers(length), batch_size=batch, sampler=sampler, num_workers=workers)
        ranks.append((sampler, sampler.track(loader)))
    return ranks


def run(ranks: list[Any], steps: int | None) -> tuple[list[int], dict[str, Any]]:
    """Take that many steps on all ranks together (None: to the epoch's end); return samples and the state."""
    seen: list[int] = []
    iterators = [iter(tracked) for _, tracked in ranks]
    taken = 0
    while steps is None or taken < steps:
        batches = [next(iterator, None) for iterator in iterators]
        for batch in batches:
            seen += [] if batch is None else batch.tolist()
        taken += 1
        if all(batch is None for batch in batches):
            break
    states = [sampler.state_dict() for sampler, _ in ranks]
    assert all(state == states[0] for state in states), "the state is replicated"
    return seen, states[0]


@given(
    length=st.integers(1, 60),
    batch=st.integers(1, 4),
    worlds=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=4),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_sample_exactly_once_over_any_change_of_ranks(
    length: int, batch: int, worlds: list[tuple[int, int]], seed: int, shuffle: bool
) -> None:
    state, seen = None, []
    for world, steps in worlds:
        part, state = run(job(world, length, batch, state, seed=seed, shuffle=shuffle, uneven="none"), steps)
        seen += part
        if state["epoch"] > 0 or state["consumed"] == length:
            break
    part, state = run(job(2, length, batch, state, seed=seed, shuffle=shuffle, uneven="none"), None)
    seen += part
    assert sorted(seen) == list(range(length))
    assert state["epoch"] == 0
    assert state["consumed"] == length


@pytest.mark.parametrize("uneven", ["pad", "drop", "none"])
def test_two_three_one_ranks_with_a_divisible_length(uneven: str) -> None:
    seen, state = run(job(2, 36, 3, uneven=uneven), 2)
    part, state = run(job(3, 36, 3, state, uneven=uneven), 2)
    rest, state = run(job(1, 36, 3, state, uneven=uneven), None)
    assert sorted(seen + part + rest) == list(range(36))


def test_the_order_does_not_depend_on_the_number_of_ranks() -> None:
    order = epoch_order(24, 7, 0)
    assert order is not None
    for world in (1, 2, 3, 4):
        samplers = [ResumableSampler(24, num_replicas=world, rank=rank, seed=7) for rank in range(world)]
        columns = [list(sampler) for sampler in samplers]
        assert [index for row in zip(*columns, strict=True) for index in row] == order.tolist()


@given(length=st.integers(0, 40), world=st.integers(1, 7), consumed=st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_uneven_ends(length: int, world: int, consumed: int) -> None:
    consumed = min(length, consumed)
    rest = [int(index) for index in epoch_order(length, 0, 0)[consumed:]]  # type: ignore[index]
    for uneven in ("pad", "drop", "none"):
        columns = []
        for rank in range(world):
            sampler = ResumableSampler(length, num_replicas=world, rank=rank, uneven=uneven)  # type: ignore[arg-type]
            sampler.load_state_dict({**sampler.state_dict(), "consumed": consumed})
            announced = len(sampler)
            columns.append(list(sampler))
            assert len(columns[-1]) == announced
        seen, sizes = Counter(index for column in columns for index in column), {len(c) for c in columns}
        if uneven == "none":
            assert seen == Counter(rest)
            assert max(sizes) - min(sizes) <= 1
        elif uneven == "drop":
            assert sizes == {len(rest) // world}
            assert seen <= Counter(rest)
        else:
            assert sizes == {-(-len(rest) // world)}
            assert Counter(rest) <= seen


def test_order_is_the_documented_rule_and_epochs_differ() -> None:
    from distckpt.format.digest import digest

    seed = int(digest(b"distckpt-sampler-1:3:2")[-16:], 16)
    expected = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(epoch_order(50, 3, 2), expected)  # type: ignore[arg-type]
    assert not torch.equal(epoch_order(50, 3, 2), epoch_order(50, 2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetched_samples_do_not_count(workers: int) -> None:
    (pair,) = job(1, 30, 2, workers=workers)
    sampler, tracked = pair
    iterator = iter(tracked)
    seen = [next(iterator).tolist() for _ in range(3)]
    assert sampler.state_dict()["consumed"] == 6
    rest, _ = run(job(1, 30, 2, sampler.state_dict(), workers=workers), None)
    assert sorted([index for batch in seen for index in batch] + rest) == list(range(30))
    del iterator


@pytest.mark.parametrize("uneven", ["pad", "drop", "none"])
def test_killed_anywhere_goes_on_as_if_never_stopped(uneven: str) -> None:
    """Same number of ranks, a length that divides by nothing, three epochs: the same batches, in order."""
    whole = job(2, 17, 3, uneven=uneven)
    batches: list[list[Any]] = [[], []]
    states: list[list[Any]] = [[], []]
    for rank, (sampler, tracked) in enumerate(whole):
        for _ in range(3):
            for batch in tracked:
                batches[rank].append(batch.tolist())
                states[rank].append(sampler.state_dict())
    for rank in (0, 1):
        for cut, state in enumerate(states[rank]):
            sampler, tracked = job(2, 17, 3, state, uneven=uneven)[rank]
            again = [batch.tolist() for _ in range(sampler.epoch, 3) for batch in tracked]
            assert again == batches[rank][cut + 1 :]


def test_last_partial_batch_ends_the_epoch() -> None:
    ((sampler, tracked),) = job(1, 7, 3)
    sizes = []
    for batch in tracked:
        sizes.append((len(batch), sampler.consumed))
    assert sizes == [(3, 3), (3, 6), (1, 7)]
    assert sampler.exhausted
    assert len(tracked) == 3, "the next epoch is a whole one"
    next(iter(tracked))
    assert (sampler.epoch, sampler.consumed) == (1, 3)


def test_drop_last_counts_as_consumed() -> None:
    sampler = ResumableSampler(10, num_replicas=1, rank=0)
    tracked = sampler.track(DataLoader(Numbers(10), batch_size=4, sampler=sampler, drop_last=True))
    assert [len(batch) for batch in tracked] == [4, 4]
    assert sampler.exhausted


@pytest.mark.parametrize("loop", ["set_epoch", "range", "next epoch"])
def test_saved_at_the_end_of_an_epoch(loop: str) -> None:
    """A save after an epoch's last batch neither repeats nor skips an epoch, whichever way the user loops."""
    ((first, tracked),) = job(1, 6, 2)
    list(tracked)
    ((sampler, tracked),) = job(1, 6, 2, first.state_dict())
    seen = []
    for epoch in range(1 if loop == "next epoch" else 0, 3):
        if loop != "range":
            sampler.set_epoch(epoch)
        seen += [(sampler.epoch, batch.tolist()) for batch in tracked]
    expected = [(epoch, epoch_order(6, 0, epoch)[i : i + 2].tolist()) for epoch in (1, 2) for i in (0, 2, 4)]  # type: ignore[index]
    assert seen == expected


def test_set_epoch_keeps_a_resumed_position() -> None:
    sampler = ResumableSampler(8, num_replicas=2, rank=0)
    sampler.advance(2)
    sampler.set_epoch(0)
    assert sampler.consumed == 4
    sampler.set_epoch(1)
    assert (sampler.epoch, sampler.consumed) == (1, 0)


def test_manual_advance_equals_track() -> None:
    sampler = ResumableSampler(10, num_replicas=2, rank=1, seed=4)
    loader = DataLoader(Numbers(10), batch_size=2, sampler=sampler)
    ((_, _), (other, tracked)) = job(2, 10, 2, seed=4)
    for mine, theirs in zip(loader, tracked, strict=True):
        sampler.advance(len(mine))
        assert mine.tolist() == theirs.tolist()
        assert sampler.state_dict() == other.state_dict()
    next(iter(loader))
    assert sampler.epoch == 1


def test_tracked_iteration_leaves_the_global_rng_alone() -> None:
    ((_, tracked),) = job(1, 6, 2)
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    list(tracked)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert tracked.loader.generator is None


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"length": 11}, "dataset has changed"),
        ({"seed": 1}, "saved seed"),
        ({"shuffle": False}, "saved setting"),
        ({"version": 2}, "version 2"),
        ({"consumed": 13}, "consumed=13"),
        ({"consumed": 1.0}, "consumed=1.0"),
        ({"epoch": -1}, "epoch=-1"),
    ],
)
def test_a_state_that_does_not_fit(change: dict[str, Any], advice: str) -> None:
    sampler = ResumableSampler(12, num_replicas=1, rank=0)
    sampler.advance(3)
    before = sampler.state_dict()
    with pytest.raises(IncompatibleState, match=advice):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before


def test_resuming_under_a_running_loop_is_refused() -> None:
    ((sampler, tracked),) = job(1, 12, 2)
    iterator = iter(tracked)
    next(iterator)
    sampler.load_state_dict({**sampler.state_dict(), "consumed": 6})
    with pytest.raises(IncompatibleState, match="resume first"):
        next(iterator)
    assert sampler.consumed == 6


def test_batches_of_any_make_are_counted() -> None:
    for batch in (
        [torch.zeros(3, 2), torch.zeros(3)],
        {"x": torch.zeros(3, 5)},
        torch.zeros(3),
        ["a", "b", "c"],
    ):
        sampler = ResumableSampler(12, num_replicas=2, rank=0)
        next(iter(sampler.track([batch])))
        assert sampler.consumed == 6
    with pytest.raises(ConfigError, match="advance"):
        next(iter(ResumableSampler(12, num_replicas=2, rank=0).track([object()])))


def test_unbatched_loader_counts_samples() -> None:
    sampler = ResumableSampler(5, num_replicas=1, rank=0)
    tracked = sampler.track(DataLoader(Numbers(5), batch_size=None, sampler=sampler))
    positions = [sampler.consumed for _ in tracked]
    assert positions == [1, 2, 3, 4, 5]


def test_loaders_that_cannot_be_tracked() -> None:
    sampler = ResumableSampler(4, num_replicas=1, rank=0)
    with pytest.raises(ConfigError, match="does not use this sampler"):
        sampler.track(DataLoader(Numbers(4)))
    with pytest.raises(ConfigError, match="in_order"):
        sampler.track(DataLoader(Numbers(4), sampler=sampler, in_order=False))


@pytest.mark.parametrize(
    "settings",
    [{"rank": 2, "num_replicas": 2}, {"rank": -1, "num_replicas": 1}, {"num_replicas": 0}, {"uneven": "x"}],
)
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ResumableSampler(4, **settings)


def test_declared_replicated() -> None:
    assert ResumableSampler.distckpt_state == "replicated"
