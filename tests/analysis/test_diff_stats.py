"""The figures of a difference against plain NumPy, at any cut; the geometry of equal digests; layers and kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distckpt.analysis import stats
from distckpt.analysis.sides import Region, equal_regions, segments
from distckpt.analysis.stats import Totals, comparable
from distckpt.boxes import Box
from distckpt.format.shard import StoredBox

VALUES = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf")]))
PAIRS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=VALUES)


@settings(max_examples=40, deadline=None)
@given(data=PAIRS, cut=st.integers(1, 7), stride=st.integers(2, 9))
def test_figures_are_those_of_numpy(data: np.ndarray, cut: int, stride: int) -> None:
    a = data.reshape(-1).astype(np.float32)
    b = a.copy()
    b[::stride] = np.roll(a, 1)[::stride]
    totals = Totals(("float32", "float32"))
    for first in range(0, a.size, cut):
        totals.add(torch.from_numpy(a[first : first + cut]), torch.from_numpy(b[first : first + cut]))
    found = totals.change()
    x, y = a.astype(np.float64), b.astype(np.float64)
    assert found.elements == a.size
    assert found.changed == np.sum((x != y) & ~(np.isnan(x) & np.isnan(y)))
    assert found.nan == (np.isnan(x).sum(), np.isnan(y).sum())
    assert found.inf == (np.isinf(x).sum(), np.isinf(y).sum())
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    size = np.abs(y - x)
    assert found.max_abs == max([0.0, *size])
    assert found.mean_abs == pytest.approx(size.sum() / max(len(x), 1), rel=1e-12)
    assert found.update_norm == pytest.approx(np.sqrt(np.sum(size**2)), rel=1e-12)
    assert found.norm_a == pytest.approx(np.sqrt(np.sum(x**2)), rel=1e-12)
    assert found.norm_b == pytest.approx(np.sqrt(np.sum(y**2)), rel=1e-12)
    largest = np.maximum(np.abs(x), np.abs(y))
    relative = np.divide(size, largest, out=np.zeros_like(size), where=largest > 0)
    assert found.max_rel == max([0.0, *relative])
    assert found.mean_rel == pytest.approx(relative.sum() / max(len(x), 1), rel=1e-12)
    assert sum(count for _, count in found.histogram) == np.count_nonzero(size)
    for exponent, count in found.histogram:
        assert count == np.sum((size >= 2.0**exponent) & (size < 2.0 ** (exponent + 1)))


def test_the_figures_do_not_depend_on_blocks() -> None:
    a, b = torch.randn(2, 5 * stats.PIECE + 17).unbind()
    found = set()
    for cut in (a.numel(), stats.PIECE, 2 * stats.PIECE):
        totals = Totals(("float32", "float32"))
        for one, other in zip(torch.split(a, cut), torch.split(b, cut), strict=True):
            totals.add(one, other)
        found.add(totals.change())
    assert len(found) == 1
    change = found.pop()
    assert change.cosine == pytest.approx(float(torch.cosine_similarity(a.double(), b.double(), 0)))


@pytest.mark.parametrize("dtype", ["bool", "uint16", "int64", "uint64", "float8_e4m3fn", "complex32", "complex128"])
def test_every_kind_of_number(dtype: str) -> None:
    a, b = (torch.tensor(v).to(getattr(torch, dtype)) for v in ([0.0, 1.0, 1.0], [0.0, 1.0, 0.0]))
    totals = Totals((dtype, dtype))
    totals.add(a, b)
    assert (totals.change().changed, totals.change().max_abs, totals.at) == (1, 1.0, 2)


def test_what_can_be_compared() -> None:
    assert comparable("float32", "bfloat16")
    assert comparable("complex64", "complex128")
    assert comparable("int8", "float16")
    assert comparable("bits8", "bits8")
    assert not comparable("float32", "complex64")
    assert not comparable("bits8", "uint8")


# ---------------------------------------------------------------- digests


def stored(box: Box, shape: tuple[int, ...], digests: str) -> tuple[int, StoredBox]:
    """Return a box of bytes with one letter a block of 16 bytes as its digest."""
    return 16, StoredBox("k", "w", "uint8", shape, box, 0, box.numel, tuple(digests))


def test_the_same_boxes_are_compared_one_by_one() -> None:
    shape, left, right = (4, 16), Box((0, 0), (4, 8)), Box((0, 8), (4, 8))
    found = equal_regions(
        shape, 1, [stored(left, shape, "ab"), stored(right, shape, "cd")],
        [stored(right, shape, "xd"), stored(left, shape, "ab")],
    )  # fmt: skip
    assert found == [Region(left, ((0, 32),)), Region(right, ((16, 32),))]
    assert [region.all_equal for region in found] == [True, False]


def test_runs_of_other_layouts_share_blocks_that_begin_and_end_alike() -> None:
    shape = (4, 16)
    whole = [stored(Box.whole(shape), shape, "abcd")]
    halves = [stored(Box((0, 0), (2, 16)), shape, "ax"), stored(Box((2, 0), (2, 16)), shape, "cd")]
    assert equal_regions(shape, 1, whole, halves) == [Region(Box.whole(shape), ((0, 16), (32, 64)))]
    columns = [stored(Box((0, 0), (4, 8)), shape, "ab"), stored(Box((0, 8), (4, 8)), shape, "cd")]
    assert equal_regions(shape, 1, whole, columns) == [Region(Box.whole(shape))]
    uneven = [stored(Box((0, 0), (1, 16)), shape, "a"), stored(Box((1, 0), (3, 16)), shape, "bcd")]
    assert equal_regions(shape, 1, whole, uneven)[0].all_equal


def test_boxes_with_a_hole_tell_nothing() -> None:
    shape = (4, 16)
    torn = [stored(Box((0, 0), (2, 16)), shape, "ab")]
    assert equal_regions(shape, 1, torn, torn) == [Region(Box.whole(shape))]


def test_segments_cover_a_region_once_in_order() -> None:
    region = Region(Box.whole((100,)), ((10, 30), (90, 100)))
    cut = segments(region, 16)
    assert [first for first, _, _ in cut] == [0, *(last for _, last, _ in cut[:-1])]
    assert cut[-1][1] == 100
    assert max(last - first for first, last, _ in cut) <= 16
    assert sum(last - first for first, last, equal in cut if equal) == 30
