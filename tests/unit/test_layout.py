"""Layouts against torch itself: what DTensor's own placements cut out of a real tensor is what ``held_boxes`` says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from distckpt.boxes import Box, tiling_error
from distckpt.format.layout import (
    Layout,
    Mesh,
    candidate_ranks,
    flat_range,
    held_boxes,
    local_shape,
    parse_placement,
    replica_of,
    replicated,
)

Placement = Replicate | Shard | _StridedShard


@dataclass(frozen=True)
class Case:
    """A tensor's shape, and how it lies on a mesh, in torch's words and in ours."""

    shape: tuple[int, ...]
    mesh: Mesh
    placements: tuple[Placement, ...]

    @property
    def layout(self) -> Layout:
        return Layout(self.mesh, tuple(map(text, self.placements)))

    def coordinates(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*map(range, self.mesh.shape)))


def text(placement: Placement) -> str:
    if isinstance(placement, _StridedShard):
        return f"SS({placement.dim},{placement.split_factor})"
    return f"S({placement.dim})" if isinstance(placement, Shard) else "R"


@st.composite
def cases(draw: st.DrawFn, *, smallest: int = 1) -> Case:
    shape = draw(st.lists(st.integers(smallest, 9), max_size=3).map(tuple))
    mesh_shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    order = draw(st.permutations(range(math.prod(mesh_shape))))
    first = draw(st.integers(0, 3))
    placements: list[Placement] = []
    for _ in mesh_shape:
        kind = draw(st.sampled_from(["R", "S", "SS"])) if shape else "R"
        dim = draw(st.integers(0, len(shape) - 1)) if shape else 0
        factor = draw(st.integers(1, 4))
        placements.append(
            Replicate() if kind == "R" else Shard(dim) if kind == "S" else _StridedShard(dim, split_factor=factor)
        )
    return Case(shape, Mesh(mesh_shape, tuple(first + rank for rank in order)), tuple(placements))


def torchs_local(case: Case, coordinate: Sequence[int]) -> torch.Tensor:
    """Return the part of a tensor of flat indices that torch's placements give the rank at a coordinate."""
    local = torch.arange(math.prod(case.shape)).reshape(case.shape)
    for placement, extent, index in zip(case.placements, case.mesh.shape, coordinate, strict=True):
        if not isinstance(placement, Replicate):
            local = placement._split_tensor(local, extent, with_padding=False)[0][index]
    return local


def cut(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))


@settings(max_examples=300)
@given(cases())
def test_held_boxes_are_what_torch_cuts(case: Case) -> None:
    whole = torch.arange(math.prod(case.shape)).reshape(case.shape)
    for coordinate in case.coordinates():
        rank = case.mesh.rank_at(coordinate)
        assert case.mesh.coordinate(rank) == coordinate
        local = torchs_local(case, coordinate)
        assert local_shape(case.shape, case.layout, rank) == tuple(local.shape)
        rebuilt = torch.full_like(local, -1)
        for held in held_boxes(case.shape, case.layout, rank):
            rebuilt[cut(Box(held.local, held.box.sizes))] = whole[cut(held.box)]
        assert torch.equal(rebuilt, local)


@settings(max_examples=300)
@given(cases(smallest=0))
def test_local_shape_and_first_offset_are_torchs(case: Case) -> None:
    for coordinate in case.coordinates():
        rank = case.mesh.rank_at(coordinate)
        shape, offset = _compute_local_shape_and_global_offset(
            case.shape, case.mesh.shape, list(coordinate), case.placements
        )
        assert local_shape(case.shape, case.layout, rank) == shape
        boxes = [held.box for held in held_boxes(case.shape, case.layout, rank)]
        if math.prod(shape):
            assert min(box.offsets for box in boxes) == offset
            assert sum(box.numel for box in boxes) == math.prod(shape)
        elif math.prod(case.shape):
            assert boxes == []


@settings(max_examples=200)
@given(cases())
def test_one_replica_of_every_box_tiles_the_tensor(case: Case) -> None:
    layout = case.layout
    firsts, counts = [], set()
    for rank in case.mesh.ranks:
        index, count = replica_of(layout, rank)
        assert 0 <= index < count
        counts.add(count)
        if index == 0:
            firsts += [held.box for held in held_boxes(case.shape, layout, rank)]
    assert len(counts) == 1
    assert tiling_error(case.shape, firsts) is None


@settings(max_examples=200)
@given(cases())
def test_replicas_hold_the_same_and_have_distinct_numbers(case: Case) -> None:
    layout = case.layout
    groups: dict[tuple[Box, ...], list[int]] = {}
    for rank in case.mesh.ranks:
        boxes = tuple(held.box for held in held_boxes(case.shape, layout, rank))
        if boxes:
            groups.setdefault(boxes, []).append(replica_of(layout, rank)[0])
    for numbers in groups.values():
        assert sorted(numbers) == list(range(len(numbers)))


@settings(max_examples=300)
@given(cases(), st.data())
def test_candidate_ranks_are_exactly_those_that_hold_a_part(case: Case, data: st.DataObject) -> None:
    offsets = [data.draw(st.integers(0, extent - 1)) for extent in case.shape]
    sizes = [data.draw(st.integers(1, extent - o)) for extent, o in zip(case.shape, offsets, strict=True)]
    box = Box(tuple(offsets), tuple(sizes))
    holding = {
        rank
        for rank in case.mesh.ranks
        if any(held.box.intersect(box) for held in held_boxes(case.shape, case.layout, rank))
    }
    assert candidate_ranks(case.shape, case.layout, box) == holding


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout]:
    """Return a shape and a ZeRO layout that holds all of it: R for some mesh dimensions, F for one."""
    shape = draw(st.lists(st.integers(1, 6), max_size=3).map(tuple))
    mesh_shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple))
    at = draw(st.integers(0, len(mesh_shape) - 1))
    offset = draw(st.integers(0, 50))
    partition = -(-(offset + math.prod(shape)) // mesh_shape[at]) + draw(st.integers(0, 9))
    placements = ["R"] * len(mesh_shape)
    placements[at] = f"F({offset},{max(1, partition)})"
    order = draw(st.permutations(range(math.prod(mesh_shape))))
    return shape, Layout(Mesh(mesh_shape, tuple(order)), tuple(placements))


@settings(max_examples=200)
@given(partitions(), st.data())
def test_a_zero_partition_is_a_slice_of_the_flat_buffer(
    case: tuple[tuple[int, ...], Layout], data: st.DataObject
) -> None:
    shape, layout = case
    at = next(m for m, text in enumerate(layout.placements) if text != "R")
    offset, partition = map(int, layout.placements[at][2:-1].split(","))
    buffer = torch.full((offset + math.prod(shape),), -1)
    buffer[offset:] = torch.arange(math.prod(shape))
    whole = buffer[offset:].reshape(shape)
    ranges = {}
    for rank in layout.mesh.ranks:
        coordinate = layout.mesh.coordinate(rank)
        assert coordinate is not None
        mine = buffer[coordinate[at] * partition : (coordinate[at] + 1) * partition]
        mine = mine[mine >= 0]
        boxes = [held.box for held in held_boxes(shape, layout, rank)]
        found = torch.cat([torch.empty(0, dtype=torch.long), *(whole[cut(box)].reshape(-1) for box in boxes)])
        assert torch.equal(found, mine)
        start, stop = flat_range(shape, layout, rank) or (0, 0)
        assert list(range(start, stop)) == mine.tolist()
        ranges[rank] = set(mine.tolist())
    offsets = [data.draw(st.integers(0, extent - 1)) for extent in shape]
    sizes = [data.draw(st.integers(1, extent - o)) for extent, o in zip(shape, offsets, strict=True)]
    box = Box(tuple(offsets), tuple(sizes))
    wanted = set(whole[cut(box)].flatten().tolist())
    span = set(range(min(wanted), max(wanted) + 1))
    candidates = candidate_ranks(shape, layout, box)
    assert {rank for rank, elements in ranges.items() if elements & wanted} <= candidates
    assert candidates <= {rank for rank, elements in ranges.items() if elements & span}


def test_candidate_ranks_of_nothing_are_none() -> None:
    layout = Layout(Mesh.flat(range(4)), ("S(0)",))
    assert candidate_ranks((8, 2), layout, Box((1, 0), (0, 2))) == set()


def test_fsdp_after_tp_interleaves_rows() -> None:
    # torch's own example: 8 rows on a 2 x 2 mesh, cut by TP first.
    layout = Layout(Mesh((2, 2), (0, 1, 2, 3)), ("SS(0,2)", "S(0)"))
    rows = [[h.box.offsets[0] for h in held_boxes((8, 8), layout, rank)] for rank in range(4)]
    assert rows == [[0], [4], [2], [6]]


def test_an_uneven_strided_shard_is_several_boxes() -> None:
    layout = Layout(Mesh.flat([0, 1]), ("SS(0,2)",))
    assert [(h.box.offsets[0], h.box.sizes[0], h.local[0]) for h in held_boxes((7, 2), layout, 0)] == [
        (0, 2, 0),
        (4, 2, 2),
    ]
    assert [(h.box.offsets[0], h.box.sizes[0]) for h in held_boxes((7, 2), layout, 1)] == [(2, 2), (6, 1)]


def test_a_tensor_without_elements_is_one_box_of_one_rank() -> None:
    layout = Layout(Mesh.flat(range(3)), ("S(0)",))
    held = [held_boxes((0, 4), layout, rank) for rank in range(3)]
    assert [[h.box for h in found] for found in held] == [[Box((0, 0), (0, 4))], [], []]


def test_a_rank_outside_the_mesh_holds_nothing() -> None:
    layout = Layout(Mesh.flat([4, 5]), ("S(0)",))
    assert held_boxes((8,), layout, 0) == []
    assert replica_of(layout, 0) == (0, 1)
    assert layout.mesh.coordinate(0) is None


def test_explicit_boxes_are_taken_as_they_are() -> None:
    mine, other = Box((0, 0), (2, 3)), Box((2, 0), (1, 3))
    layout = Layout(Mesh.flat([2, 7]), ("E",), ((mine,), (other,)))
    assert [h.box for h in held_boxes((3, 3), layout, 7)] == [other]
    assert candidate_ranks((3, 3), layout, Box((1, 1), (1, 1))) == {2}
    assert replica_of(layout, 7) == (0, 1)


def test_replicated_is_whole_on_every_rank() -> None:
    layout = replicated([3, 5])
    assert [held_boxes((2,), layout, rank)[0].box for rank in (3, 5)] == [Box.whole((2,))] * 2
    assert [replica_of(layout, rank) for rank in (3, 5)] == [(0, 2), (1, 2)]


def test_a_mesh_needs_as_many_ranks_as_places() -> None:
    with pytest.raises(ValueError, match="with 3 ranks"):
        Mesh((2, 2), (0, 1, 2))


@pytest.mark.parametrize(
    ("written", "kind", "dim", "factor"),
    [
        ("R", "R", 0, 1),
        ("E", "E", 0, 1),
        ("S(0)", "S", 0, 1),
        ("S(12)", "S", 12, 1),
        ("SS(1,4)", "SS", 1, 4),
        ("F(0,1)", "F", 0, 1),
    ],
)
def test_placements_are_parsed(written: str, kind: str, dim: int, factor: int) -> None:
    found = parse_placement(written)
    assert (found.kind, found.dim, found.factor) == (kind, dim, factor)


@pytest.mark.parametrize(
    "written",
    [
        "", "r", "S", "S()", "S(-1)", "S(0) ", " S(0)", "S(0)\n", "S(100)", "S(01)", "SS(0)", "SS(0,0)", "SS(0,02)",
        "SS(0, 2)", "R,R", "P", "S(٣)", "S(３)", "SS(0,２)", "SS(0,1٢)", "F(0)", "F(0,0)", "F(01,2)", "F(0,٢)", "F(-1,2)",
    ],
)  # fmt: skip
def test_anything_else_is_no_placement(written: str) -> None:
    with pytest.raises(ValueError, match="unknown placement"):
        parse_placement(written)
