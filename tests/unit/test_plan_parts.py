"""What plans are made of: the sum that proves a cover, boxes as columns, tables in classes, claims about replicas."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import plans, row

from distckpt.boxes import Box, flat_range_to_boxes
from distckpt.dcp.agreed import recall
from distckpt.dcp.cover import PRIME, added, cover_of, cover_of_table, whole_cover
from distckpt.dcp.planner import Plan, Row, check_layouts, pieces_for
from distckpt.dcp.replicas import Claims, disagreeing, refuse
from distckpt.dcp.tables import (
    Table,
    decode_plan,
    encode_plan,
    encode_table,
    merge_tables,
    part_of,
    spans,
)
from distckpt.errors import IncompatibleState, ReplicasDiffer
from distckpt.format.box_columns import BoxColumns
from distckpt.format.layout import Layout, Mesh, candidate_ranks, held_boxes, meeting_cells, replicas_at
from distckpt.manager.exchange import common_names, names_of, offer_names

# ---------------------------------------------------------------- covers


@st.composite
def some_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(st.lists(st.integers(1, 4), max_size=3).map(tuple))
    boxes = []
    for _ in range(draw(st.integers(0, 6))):
        offsets = tuple(draw(st.integers(0, extent - 1)) for extent in shape)
        sizes = tuple(draw(st.integers(1, extent - o)) for extent, o in zip(shape, offsets, strict=True))
        boxes.append(Box(offsets, sizes))
    if draw(st.booleans()):  # else next to none would cover exactly
        cuts = sorted(draw(st.lists(st.integers(0, math.prod(shape)), max_size=4)))
        bounds = [0, *cuts, math.prod(shape)]
        boxes = [box for a, b in itertools.pairwise(bounds) for box in flat_range_to_boxes(shape, a, b)]
        if boxes and draw(st.booleans()):
            boxes[draw(st.integers(0, len(boxes) - 1))] = draw(st.sampled_from(boxes))
    return shape, boxes


@settings(max_examples=300)
@given(some_boxes(), st.sampled_from(["a", "b"]))
def test_covers_add_up_only_where_every_element_is_covered_once(case: tuple[tuple[int, ...], list[Box]], seed: str) -> None:
    shape, boxes = case
    counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    for box in boxes:
        for index in itertools.product(*(range(o, e) for o, e in zip(box.offsets, box.ends, strict=True))):
            counts[index] += 1
    exact = all(count == 1 for count in counts.values())
    assert (added(cover_of([("w", box)], seed) for box in boxes) == whole_cover([("w", shape)], seed)) == exact


def test_covers_tell_tensors_dimensions_and_seeds_apart() -> None:
    box = Box((1, 2), (3, 3))
    found = {
        cover_of([("a", box)], "s"),
        cover_of([("b", box)], "s"),
        cover_of([("a", Box((2, 1), (3, 3)))], "s"),
        cover_of([("a", box)], "t"),
        cover_of([("a", box), ("a", box)], "s"),
    }
    assert len(found) == 5
    assert all(0 <= value < PRIME for value in found)


def test_covers_work_on_extents_beyond_32_bits() -> None:
    numel = 3 << 40
    halves = [("flat", Box((0,), (numel // 3,))), ("flat", Box((numel // 3,), (numel - numel // 3,)))]
    assert cover_of(halves, "s") == whole_cover([("flat", (numel,))], "s")
    short = [halves[0], ("flat", Box((numel // 3,), (numel - numel // 3 - 1,)))]
    assert cover_of(short, "s") != whole_cover([("flat", (numel,))], "s")


def test_an_empty_tensor_counts_as_one_box() -> None:
    empty = ("none", Box((0, 0), (0, 4)))
    assert cover_of([empty], "s") == whole_cover([("none", (0, 4))], "s") != 0
    assert cover_of([empty, empty], "s") != whole_cover([("none", (0, 4))], "s")


@given(plans())
def test_all_ranks_covers_of_any_plan_add_up(plan: Plan) -> None:
    covers = [cover_of(((p.fqn, p.box) for p in pieces_for(plan, rank)), "s") for rank in range(plan.world_size)]
    assert added(covers) == whole_cover(((fqn, r.shape) for fqn, r in plan.tensors.items()), "s")


# ---------------------------------------------------------------- columns


@st.composite
def columns(draw: st.DrawFn) -> list[list[Box]]:
    ndim = draw(st.integers(0, 3))
    number = st.integers(0, 1 << 40)
    box = st.tuples(st.tuples(*[number] * ndim), st.tuples(*[number] * ndim)).map(lambda pair: Box(*pair))
    return draw(st.lists(st.lists(box, max_size=3), max_size=5))


@given(columns())
def test_boxes_survive_columns_and_their_bytes(by_rank: list[list[Box]]) -> None:
    found = BoxColumns.of(by_rank)
    assert [list(held) for held in found] == by_rank
    again = BoxColumns.unpack(found.pack())
    assert [list(held) for held in again] == by_rank
    assert again.pack() == found.pack()


@given(some_boxes(), st.data())
def test_columns_find_the_ranks_that_a_box_meets(case: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, boxes = case
    by_rank = [boxes[:2], [], boxes[2:3], boxes[3:]]
    layout = Layout(Mesh.flat([7, 3, 5, 0]), ("E",), tuple(map(tuple, by_rank)))
    wanted = data.draw(st.sampled_from(boxes)) if boxes else Box.whole(shape)
    meets = {r for r, held in zip(layout.mesh.ranks, by_rank, strict=True) if any(b.intersect(wanted) for b in held)}
    assert candidate_ranks(shape, layout, wanted) == meets


@pytest.mark.parametrize("damage", [b"", b"no", BoxColumns.of([[Box((0,), (4,))]]).pack()[:-3]])
def test_bytes_that_are_no_columns_are_refused(damage: bytes) -> None:
    with pytest.raises(ValueError, match="columns"):
        BoxColumns.unpack(damage)


def test_sixteen_thousand_listed_boxes_are_proved_and_packed_as_columns() -> None:
    world = 16384
    by_rank = [(Box((rank * 3 + rank // 5, 0), (3 + (rank % 5 == 4), 8)),) for rank in range(world)]
    extent = by_rank[-1][0].ends[0]
    layout = Layout(Mesh.flat(range(world)), ("E",), tuple(by_rank))
    table = Table({"w": Row("float32", (extent, 8), layout)})
    assert len(encode_table(table)) < 4 * world
    plan = merge_tables([table] * world)
    check_layouts(plan)
    assert isinstance(layout.explicit, BoxColumns)
    assert cover_of_table("w", layout.explicit.table(), "s") == whole_cover([("w", (extent, 8))], "s")
    twisted = Layout(layout.mesh, ("E",), (by_rank[1], *by_rank[1:]))
    with pytest.raises(IncompatibleState, match=r"w \[\d+, 8\]: boxes .* overlap"):
        check_layouts(merge_tables([Table({"w": Row("float32", (extent, 8), twisted)})] * world))


def test_a_zero_partition_that_ends_too_early_is_named() -> None:
    plan = merge_tables([Table({"model.w": row((10, 10), ("F(30,32)",), Mesh.flat(range(4)))})] * 4)
    with pytest.raises(IncompatibleState, match=r"model\.w \[10, 10\]: 4 partitions of 32 elements end before"):
        check_layouts(plan)


# ---------------------------------------------------------------- tables and classes


@given(st.lists(st.integers(0, 40), unique=True, max_size=12))
def test_spans_spell_ranks_in_their_order(ranks: list[int]) -> None:
    assert [first + i * step for first, count, step in spans(ranks) for i in range(count)] == ranks


def test_regular_sub_meshes_are_few_spans() -> None:
    assert spans(range(3, 16384, 64)) == [(3, 256, 64)]
    assert len(spans([base + i for base in (0, 1000, 2000) for i in range(8)])) == 3


def test_ranks_need_only_their_part_of_a_plan() -> None:
    shared, mesh = row((100,)), Mesh.flat([0, 1])
    first = Table({"a": row((6, 4), ("S(0)",), mesh), "s": shared}, {"tied": "a"}, {"lr": "replicated", "g": "groups"})
    second = Table({"b": row((8,), ("S(0)",), Mesh.flat([2, 3])), "s": shared}, {}, {"lr": "replicated"})
    by_rank = [first, first, second, second]
    whole = merge_tables(by_rank)
    for rank, table in enumerate(by_rank):
        part = decode_plan(encode_plan(part_of(whole, table)))
        assert pieces_for(part, rank) == pieces_for(whole, rank)
        assert part.tensors == {fqn: whole.tensors[fqn] for fqn in table.tensors}
        assert part.sources.get("lr") == (0,)


def test_objects_that_the_same_ranks_have_are_compared_together() -> None:
    everywhere = {"a": "replicated", "b": "replicated"}
    plan = merge_tables([Table({}, {}, everywhere | {"c": "replicated"}), Table({}, {}, everywhere)])
    assert plan.shared["a"] == plan.shared["b"] != plan.shared["c"]


def test_a_rank_recalls_a_plan_only_if_its_own_state_fits_it() -> None:
    from benchmarks.sim.measure import plan as agree
    from benchmarks.sim.shapes import MODELS, parallel
    from benchmarks.sim.storage import manifest_of

    job = parallel(MODELS["8B"], 16, tp=2, pp=4)
    whole = agree(job).plans[0]
    manifest = manifest_of(whole.held, whole.entry())
    for rank in (0, 5, 15):
        table = job.table_of(rank)
        found = recall(manifest, table, rank, 16)
        assert found is not None
        assert found.id == whole.id
        assert list(found.pieces) == pieces_for(whole.held, rank)
        name = next(iter(table.tensors))
        assert recall(manifest, Table({**table.tensors, "more": row((1,))}, {}, table.objects), rank, 16) is None
        assert recall(manifest, Table({**table.tensors, name: row((7, 7))}, {}, table.objects), rank, 16) is None
        assert recall(manifest, Table(table.tensors, {}, {**table.objects, "x": "per_rank"}), rank, 16) is None
        assert recall(manifest, table, rank, 17) is None
    short = msgspec.structs.replace(manifest, plan=msgspec.structs.replace(whole.entry(), sources={}))
    assert recall(short, job.table_of(0), 0, 16) is None


# ---------------------------------------------------------------- cells


@given(plans(), st.data())
def test_cells_and_replicas_name_every_holder_once(plan: Plan, data: st.DataObject) -> None:
    fqn = data.draw(st.sampled_from(sorted(plan.tensors)))
    found = plan.tensors[fqn]
    assert found.layout is not None
    if not math.prod(found.shape):
        return
    ranks = [r for cell in meeting_cells(found.shape, found.layout, Box.whole(found.shape))
             for r in replicas_at(found.layout, cell)]  # fmt: skip
    assert len(ranks) == len(set(ranks))
    assert set(ranks) >= {r for r in range(plan.world_size) if held_boxes(found.shape, found.layout, r)}


# ---------------------------------------------------------------- what ranks say of replicas and names


def test_claims_cost_one_digest_a_set_and_name_what_differs() -> None:
    values = {f"model.w{i}": f"{i:032x}" for i in range(1000)}
    mine, theirs = Claims({"tensors x": values}), Claims({"tensors x": {**values, "model.w7": "0" * 32}})
    other = Claims({"tensors y": {"model.w7": "1" * 32}})
    assert len(mine.encode()) < 64
    assert disagreeing([mine.encode(), mine.encode(), other.encode()]) == []
    keys = disagreeing([mine.encode(), theirs.encode(), other.encode(), mine.encode()])
    assert keys == ["tensors x"]
    with pytest.raises(ReplicasDiffer, match=r"differ: model\.w7 \(ranks \[0, 3\] / \[1\]\)\. "):
        refuse([claims.details(keys) for claims in (mine, theirs, other, mine)])
    objects = [Claims({"objects 0": {"scheduler.last": d}}).details(["objects 0"]) for d in ("a", "b")]
    with pytest.raises(ReplicasDiffer, match=r"object 'scheduler\.last' differs between ranks \[0\] / \[1\]"):
        refuse(objects)


class _Blobs:
    """The two calls of an agreement that offering names takes."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def post_blob(self, name: str, blob: bytes) -> None:
        self.blobs[name] = blob

    def get_blob(self, name: str) -> bytes:
        return self.blobs[name]


@given(st.lists(st.sets(st.integers(0, 20)), min_size=1, max_size=5))
def test_the_names_that_all_ranks_miss_are_found_from_bits(by_rank: list[set[int]]) -> None:
    every = [f"n{i:02}" for i in range(21)]
    own = [{every[i] for i in missing} for missing in by_rank]
    agreement = _Blobs()
    offers = [offer_names(agreement, every, names) for names in own]  # type: ignore[arg-type]
    answer = common_names(agreement, offers)  # type: ignore[arg-type]
    assert all(names_of(answer, every, names) == set.intersection(*own) for names in own)
    assert max(map(len, offers)) <= 32
