"""Which blocks of a stored box a cut needs: those that hold an element of it, by brute force."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from distckpt.boxes import Box
from distckpt.dcp import read_plan
from distckpt.dcp.read_plan import CUT, PART, WHOLE, Want
from distckpt.format.shard import StoredBox


def a_box(rng: random.Random, shape: tuple[int, ...]) -> Box:
    low = tuple(rng.randrange(extent) for extent in shape)
    return Box(low, tuple(rng.randint(1, extent - at) for extent, at in zip(shape, low, strict=True)))


def needed(stored: Box, cut: Box, itemsize: int, block: int) -> set[int]:
    places = np.arange(stored.numel).reshape(stored.sizes)[cut.relative_to(stored.offsets).slices].reshape(-1) * itemsize
    return {int(at) // block for at in places} | {(int(at) + itemsize - 1) // block for at in places}


@pytest.mark.parametrize("seed", range(300))
def test_the_blocks_that_hold_wanted_elements_are_read(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 4)))
    stored_box = a_box(rng, shape)
    inner = a_box(rng, stored_box.sizes)
    cut = inner.moved_by(stored_box.offsets)
    block = rng.choice([4, 8, 16, 32, 64])
    stored = StoredBox("w", "w", "float32", shape, stored_box, 0, 4 * stored_box.numel, ())
    use = read_plan._use(Want("w", cut, torch.empty(cut.sizes)), stored)
    spans = read_plan._touched(stored, use, block)
    found = {number for first, last in spans for number in range(first, last)}
    right = needed(stored_box, cut, 4, block)
    assert found == right if len(shape) < 3 else found >= right  # walked along the slowest dimension only
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))  # in order, apart


@pytest.mark.parametrize(("shape", "cut", "kind"), [
    ((8, 8), Box((0, 0), (8, 8)), WHOLE),
    ((8, 8), Box((2, 0), (3, 8)), PART),
    ((8, 8), Box((0, 2), (8, 3)), CUT),
    ((8,), Box((2,), (3,)), PART),
])  # fmt: skip
def test_kinds_of_wants(shape: tuple[int, ...], cut: Box, kind: int) -> None:
    whole = Box.whole(shape)
    stored = StoredBox("w", "w", "float32", shape, whole, 0, 4 * whole.numel, ())
    assert read_plan._kind(read_plan._use(Want("w", cut, torch.empty(cut.sizes)), stored), stored) == kind


@pytest.mark.parametrize(("spans", "widened"), [
    ([(1, 9)], [(0, 10)]),
    ([(0, 9)], [(0, 10)]),
    ([(0, 4), (4, 10)], [(0, 10)]),
    ([(2, 10)], [(2, 10)]),
    ([(0, 4), (5, 10)], [(0, 4), (5, 10)]),
])  # fmt: skip
def test_only_a_block_at_each_end_is_added(spans: list[tuple[int, int]], widened: list[tuple[int, int]]) -> None:
    assert read_plan._widened(read_plan._union(spans), 10) == widened
