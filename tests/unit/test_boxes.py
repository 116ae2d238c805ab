"""Geometry against numpy and brute force: every property here is checked element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.boxes import Box, flat_range_to_boxes, is_flat_range, tiling_error

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)
ROOMY = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def grid(shape: Sequence[int]) -> np.ndarray:
    """Return an array whose elements are their own flat indices."""
    return np.arange(math.prod(shape)).reshape(shape)


def cut(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))


def elements(shape: Sequence[int], box: Box) -> set[int]:
    return set(grid(shape)[cut(box)].flatten().tolist())


@st.composite
def boxes_in(draw: st.DrawFn, shape: Sequence[int], *, smallest: int = 0) -> Box:
    offsets, sizes = [], []
    for extent in shape:
        offset = draw(st.integers(0, max(0, extent - smallest)))
        offsets.append(offset)
        sizes.append(draw(st.integers(min(smallest, extent - offset), extent - offset)))
    return Box(tuple(offsets), tuple(sizes))


@st.composite
def tilings(draw: st.DrawFn, shape: Sequence[int]) -> list[Box]:
    """Cut a tensor again and again at random planes: the result tiles it, and is often no grid."""
    done, todo = [], [Box.whole(shape)]
    while todo:
        box = todo.pop()
        long = [dim for dim, size in enumerate(box.sizes) if size > 1]
        if not long or len(done) + len(todo) > 8 or draw(st.integers(0, 3)) == 0:
            done.append(box)
            continue
        dim = draw(st.sampled_from(long))
        at = draw(st.integers(1, box.sizes[dim] - 1))
        low, high = list(box.sizes), list(box.sizes)
        low[dim], high[dim] = at, box.sizes[dim] - at
        shifted = list(box.offsets)
        shifted[dim] += at
        todo += [Box(box.offsets, tuple(low)), Box(tuple(shifted), tuple(high))]
    return draw(st.permutations(done))


# ---------------------------------------------------------------- boxes


@given(st.data(), SHAPES)
def test_intersection_and_containment_are_those_of_sets(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common = elements(shape, a) & elements(shape, b)
    found = a.intersect(b)
    assert found == b.intersect(a)
    assert (elements(shape, found) if found is not None else set()) == common
    if found is not None:
        assert found.numel == len(common)
        assert a.contains(found)
        assert b.contains(found)
    if b.numel:
        assert a.contains(b) == (elements(shape, b) <= elements(shape, a))


@given(st.data(), SHAPES)
def test_moving_there_and_back_changes_nothing(data: st.DataObject, shape: tuple[int, ...]) -> None:
    outer = data.draw(boxes_in(shape))
    inner = data.draw(boxes_in(outer.sizes))
    absolute = inner.moved_by(outer.offsets)
    assert absolute.relative_to(outer.offsets) == inner
    assert np.array_equal(grid(shape)[cut(outer)][cut(inner)], grid(shape)[cut(absolute)])


def test_rows_count_from_the_boxs_own_start() -> None:
    assert Box((4, 1), (6, 2)).rows(2, 5) == Box((6, 1), (3, 2))


def test_a_box_needs_as_many_offsets_as_sizes() -> None:
    with pytest.raises(ValueError, match="2 offsets and 1 sizes"):
        Box((0, 0), (1,))


def test_zero_dimensions() -> None:
    scalar = Box.whole(())
    assert (scalar.numel, scalar.ndim) == (1, 0)
    assert scalar.intersect(scalar) == scalar
    assert flat_range_to_boxes((), 0, 1) == [scalar]
    assert flat_range_to_boxes((), 0, 0) == []
    assert is_flat_range(scalar, ()) == (0, 1)
    assert tiling_error((), [scalar]) is None
    assert tiling_error((), []) is not None
    assert tiling_error((), [scalar, scalar]) is not None


# ---------------------------------------------------------------- flat ranges


@given(st.data(), SHAPES)
def test_a_flat_range_becomes_few_boxes_in_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    boxes = flat_range_to_boxes(shape, start, stop)
    in_order = [i for box in boxes for i in grid(shape)[cut(box)].flatten().tolist()]
    assert in_order == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(st.data(), SHAPES)
def test_is_flat_range_says_where_numpy_finds_consecutive_elements(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(boxes_in(shape, smallest=1))
    found = grid(shape)[cut(box)].flatten()
    consecutive = found[-1] - found[0] + 1 == len(found)
    assert is_flat_range(box, shape) == ((found[0], found[-1] + 1) if consecutive else None)


@given(st.data(), SHAPES)
def test_single_box_ranges_go_back_to_the_range(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(boxes_in(shape, smallest=1))
    flat = is_flat_range(box, shape)
    if flat is not None:
        pieces = flat_range_to_boxes(shape, *flat)
        assert set().union(*(elements(shape, p) for p in pieces)) == elements(shape, box)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7)])
def test_a_range_outside_the_tensor_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="flat range"):
        flat_range_to_boxes((2, 3), start, stop)


# ---------------------------------------------------------------- tiling


def covers_once(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[cut(box)] += 1
    return bool((counts == 1).all())


@given(st.data(), SHAPES)
def test_every_tiling_is_accepted(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(tilings(shape))
    assert covers_once(shape, boxes)
    assert tiling_error(shape, boxes) is None


@given(st.data(), SHAPES)
def test_a_tiling_with_one_box_changed_is_judged_as_by_brute_force(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(tilings(shape))
    index = data.draw(st.integers(0, len(boxes) - 1))
    replacement = data.draw(boxes_in(shape))
    change = data.draw(st.sampled_from(["drop", "twice", "replace", "add"]))
    if change == "drop":
        boxes = boxes[:index] + boxes[index + 1 :]
    elif change == "twice":
        boxes = [*boxes, boxes[index]]
    elif change == "replace":
        boxes = [*boxes[:index], replacement, *boxes[index + 1 :]]
    else:
        boxes = [*boxes, replacement]
    assert (tiling_error(shape, boxes) is None) == covers_once(shape, boxes)


@given(st.data(), ROOMY)
def test_random_boxes_are_judged_as_by_brute_force(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(st.lists(boxes_in(shape), max_size=5))
    assert (tiling_error(shape, boxes) is None) == covers_once(shape, boxes)


def test_boxes_that_wind_around_each_other_tile_without_any_cutting_plane() -> None:
    pinwheel = [
        Box((0, 0), (1, 2)),
        Box((0, 2), (2, 1)),
        Box((2, 1), (1, 2)),
        Box((1, 0), (2, 1)),
        Box((1, 1), (1, 1)),
    ]
    assert tiling_error((3, 3), pinwheel) is None
    assert "cover 8 of 9" in str(tiling_error((3, 3), pinwheel[:4]))
    assert "overlap" in str(tiling_error((3, 3), [*pinwheel[:4], Box((1, 1), (1, 2))]))


@pytest.mark.parametrize(
    "box", [Box((0, 2), (2, 2)), Box((-1, 0), (2, 3)), Box((0,), (2,))], ids=["beyond", "negative", "dims"]
)
def test_a_box_outside_the_shape_is_named(box: Box) -> None:
    assert "outside shape" in str(tiling_error((2, 3), [box]))


def test_boxes_without_elements_are_ignored() -> None:
    assert tiling_error((2, 3), [Box.whole((2, 3)), Box((5, 5), (0, 1))]) is None
    assert tiling_error((0, 3), []) is None


def test_a_million_elements_in_many_boxes_cost_no_pairs() -> None:
    rows = [Box((i, 0), (1, 100)) for i in range(20_000)]
    assert tiling_error((20_000, 100), rows) is None
    assert "cover" in str(tiling_error((20_000, 100), rows[:-1]))
