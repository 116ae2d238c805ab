"""Plans: every element is written exactly once, evenly, and what ranks say that does not fit together is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.boxes import Box
from distckpt.dcp.planner import (
    Plan,
    Row,
    check_tiling,
    gathered,
    manifest_tensors,
    pieces_for,
    runs,
    split_among_replicas,
)
from distckpt.dcp.tables import Table, decode_table, encode_table, merge_tables
from distckpt.errors import IncompatibleState, ReplicasDiffer
from distckpt.format import shares
from distckpt.format.layout import Layout, Mesh, held_boxes
from distckpt.format.placing import Piece
from distckpt.format.shard_index import layout_of, mesh_of

SIZES = {"float32": 4, "int8": 1, "float64": 8}


def row(shape: Sequence[int], placements: Sequence[str] = (), mesh: Mesh | None = None, dtype: str = "float32") -> Row:
    return Row(dtype, tuple(shape), Layout(mesh, tuple(placements)) if mesh is not None else None)


def whole_piece(fqn: str, shape: tuple[int, ...], dtype: str) -> Piece:
    return Piece(fqn, dtype, shape, Box.whole(shape))


def nbytes(pieces: Sequence[Piece]) -> int:
    return sum(p.box.numel * SIZES[p.dtype] for p in pieces)


def written(plan: Plan) -> list[list[Piece]]:
    return [pieces_for(plan, rank) for rank in range(plan.world_size)]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Return a plan of random tensors over a random mesh that may leave ranks out, plain tensors included."""
    mesh_shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple))
    world = math.prod(mesh_shape) + draw(st.integers(0, 2))
    mesh = Mesh(mesh_shape, tuple(draw(st.permutations(range(world)))[: math.prod(mesh_shape)]))
    everywhere, on_mesh = {}, {}
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 9), max_size=3).map(tuple))
        dtype = draw(st.sampled_from(sorted(SIZES)))
        if draw(st.booleans()):
            everywhere[f"plain{number}"] = row(shape, dtype=dtype)
            continue
        choices = ["R"] + ([f"S({d})" for d in range(len(shape))] + [f"SS({d},2)" for d in range(len(shape))])
        placements = [draw(st.sampled_from(choices)) for _ in mesh_shape]
        if draw(st.integers(0, 3)) == 0:  # a ZeRO partition that ends where the tensor does, or later
            offset = draw(st.integers(0, 20))
            least = -(-(offset + math.prod(shape)) // mesh_shape[-1])
            placements = ["R"] * (len(mesh_shape) - 1) + [f"F({offset},{max(1, least + draw(st.integers(0, 3)))})"]
        on_mesh[f"mesh{number}"] = row(shape, placements, mesh, dtype)
    inside, outside = Table(everywhere | on_mesh), Table(everywhere)
    return merge_tables([inside if rank in mesh.ranks else outside for rank in range(world)])


# ---------------------------------------------------------------- who writes what


@settings(max_examples=200)
@given(plans())
def test_all_ranks_together_write_every_element_once(plan: Plan) -> None:
    by_rank = written(plan)
    check_tiling(plan, by_rank)
    counts = {fqn: [0] * math.prod(r.shape) for fqn, r in plan.tensors.items()}
    for piece in itertools.chain.from_iterable(by_rank):
        strides = [math.prod(piece.global_shape[d + 1 :]) for d in range(piece.box.ndim)]
        for index in itertools.product(*(range(o, e) for o, e in zip(piece.box.offsets, piece.box.ends, strict=True))):
            counts[piece.fqn][sum(i * s for i, s in zip(index, strides, strict=True))] += 1
    assert all(count == 1 for found in counts.values() for count in found)


@settings(max_examples=200)
@given(plans())
def test_ranks_write_only_what_they_hold(plan: Plan) -> None:
    for rank, pieces in enumerate(written(plan)):
        for piece in pieces:
            layout = plan.tensors[piece.fqn].layout
            assert layout is not None
            held = [h.box for h in held_boxes(piece.global_shape, layout, rank)]
            assert any(box.contains(piece.box) for box in held)


@given(plans())
def test_a_tensor_without_elements_is_one_box(plan: Plan) -> None:
    pieces = list(itertools.chain.from_iterable(written(plan)))
    for fqn, r in plan.tensors.items():
        if not math.prod(r.shape):
            assert [p.box for p in pieces if p.fqn == fqn] == [Box.whole(r.shape)]


@given(plans())
def test_a_full_save_is_rank_0s_alone(plan: Plan) -> None:
    full = gathered(plan)
    by_rank = written(full)
    check_tiling(full, by_rank)
    assert [p.fqn for p in by_rank[0]] == sorted(plan.tensors)
    assert not any(by_rank[1:])


@st.composite
def held_alike(draw: st.DrawFn) -> list[Piece]:
    shapes = draw(st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=8))
    return [whole_piece(f"t{i}", shape, draw(st.sampled_from(sorted(SIZES)))) for i, shape in enumerate(shapes)]


@settings(max_examples=200)
@given(held_alike(), st.integers(1, 7), st.sampled_from([1, 64, 1 << 20]), st.sampled_from([0, 40, 1 << 14]))
def test_replicas_split_their_boxes_exactly_and_evenly(
    pieces: list[Piece], count: int, cut_bytes: int, small_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "CUT_BYTES", cut_bytes)
        patch.setattr(shares, "SMALL_BYTES", small_bytes)
        patch.setattr(shares, "SMALL_TOTAL", 4 * small_bytes)
        split = [split_among_replicas(pieces, index, count) for index in range(count)]
        line = shares.line_of([p.box for p in pieces], [SIZES[p.dtype] for p in pieces], count)
        for i, piece in enumerate(pieces):  # what readers think of who wrote what
            for first, last in [(0, line.rows[i]), *((r, r + 1) for r in range(line.rows[i]))]:
                wrote = [
                    index
                    for index, share in enumerate(line.share(index) for index in range(count))
                    if any(j == i and low < last and first < high for j, low, high in share)
                ]
                assert line.writers(i, first, last) == wrote or piece.box.numel == 0
    for piece in pieces:
        found = [p.box for share in split for p in share if p.fqn == piece.fqn]
        if piece.box.numel == 0:
            assert found == [piece.box]
            continue
        # Rows, in order, without a gap: the shares of one box are slices along its first dimension.
        assert sum(box.numel for box in found) == piece.box.numel
        starts = [box.offsets[0] for box in found if box.ndim]
        assert starts == sorted(starts)
        assert len(set(starts)) == len(starts)
    # A cut is off its place by less than a row of a large box, or by half of a small one.
    rows = [p.box.numel // max(1, p.box.sizes[0]) * SIZES[p.dtype] if p.box.ndim else SIZES[p.dtype] for p in pieces]
    whole = [nbytes([p]) for p in pieces if nbytes([p]) <= cut_bytes]
    slack = max([*rows, *whole, line.small, 0]) + 1
    for share in split:
        assert abs(nbytes(share) - nbytes(pieces) / count) <= 2 * slack


def test_one_large_replicated_tensor_is_spread_over_all_ranks() -> None:
    plan = merge_tables([Table({"w": row((4096, 1024))})] * 4)
    assert [nbytes(pieces) for pieces in written(plan)] == [4 << 20] * 4


def test_many_small_replicated_tensors_are_spread_whole() -> None:
    plan = merge_tables([Table({f"t{i:03}": row((20_000,)) for i in range(100)})] * 4)
    by_rank = written(plan)
    assert [len(pieces) for pieces in by_rank] == [25] * 4
    assert all(p.box == Box.whole((20_000,)) for pieces in by_rank for p in pieces)


def test_tiny_replicated_tensors_lie_together_and_the_rest_makes_up_for_it() -> None:
    tensors = {f"step{i:04}": row(()) for i in range(1000)} | {f"w{i}": row((1 << 18, 4)) for i in range(4)}
    by_rank = written(merge_tables([Table(tensors)] * 4))
    assert [sum(p.fqn.startswith("step") for p in pieces) for pieces in by_rank] == [1000, 0, 0, 0]
    assert max(map(nbytes, by_rank)) - min(map(nbytes, by_rank)) <= 3 * 16


def test_hsdp_replicas_share_each_shard() -> None:
    mesh = Mesh((2, 2), (0, 1, 2, 3))
    plan = merge_tables([Table({"w": row((4096, 1024), ("R", "S(0)"), mesh)})] * 4)
    assert [pieces[0].box for pieces in written(plan)] == [
        Box((offset, 0), (1024, 1024)) for offset in (0, 2048, 1024, 3072)
    ]


# ---------------------------------------------------------------- merging


def test_ranks_of_pipeline_stages_keep_their_own_tensors() -> None:
    first, second = Table({"a": row((2,)), "shared": row((3,))}), Table({"b": row((4,)), "shared": row((3,))})
    plan = merge_tables([first, first, second])
    holders = {fqn: r.layout.mesh.ranks for fqn, r in plan.tensors.items() if r.layout is not None}
    assert holders == {"a": (0, 1), "b": (2,), "shared": (0, 1, 2)}
    check_tiling(plan, written(plan))


def two_meshes(ranks: Sequence[Sequence[int]], **more: str) -> list[Table]:
    """Return every rank's table where each list of ranks shards the same tensor on a mesh of its own."""
    world = sum(map(len, ranks))
    tables = {
        rank: Table({"w": row((8, 2), ("S(0)",), Mesh.flat(group))}, objects=dict(more))
        for group in ranks
        for rank in group
    }
    return [tables[rank] for rank in range(world)]


@pytest.mark.parametrize("ranks", [[[0, 2], [1, 3]], [[0, 1], [2, 3]], [[0, 3], [1, 4], [2, 5]]])
def test_sub_meshes_that_hold_copies_become_one_mesh(ranks: list[list[int]]) -> None:
    plan = merge_tables(two_meshes(ranks))
    layout = plan.tensors["w"].layout
    assert layout is not None
    assert layout.placements == ("R", "S(0)")
    assert layout.mesh == Mesh((len(ranks), len(ranks[0])), tuple(itertools.chain.from_iterable(ranks)))
    check_tiling(plan, written(plan))


def test_ranks_of_one_sub_mesh_may_differ_in_other_things() -> None:
    tables = two_meshes([[0, 2], [1, 3]])
    own = [Table({**tables[rank].tensors, f"own{rank}": row((1,))}) for rank in range(4)]
    plan = merge_tables(own)
    layout = plan.tensors["w"].layout
    assert layout is not None
    assert layout.mesh == Mesh((2, 2), (0, 2, 1, 3))
    check_tiling(plan, written(plan))


def test_sub_meshes_that_overlap_are_refused() -> None:
    left, right = (Table({"w": row((8,), ("S(0)",), Mesh.flat(ranks))}) for ranks in ((0, 1), (1, 2)))
    with pytest.raises(ReplicasDiffer, match="w: ranks"):
        merge_tables([left, left, right])


@pytest.mark.parametrize(
    "other",
    [row((3,)), row((2,), dtype="float64"), row((2,), ("S(0)",), Mesh.flat([0, 1, 2]))],
    ids=["shape", "dtype", "layout"],
)
def test_ranks_that_disagree_on_a_tensor_are_named(other: Row) -> None:
    mine, theirs = Table({"model.w": row((2,))}), Table({"model.w": other})
    with pytest.raises(ReplicasDiffer, match=r"^model\.w: ranks \[0, 1\] hold .* ranks \[2\] hold"):
        merge_tables([mine, mine, theirs])


def test_a_rank_of_the_mesh_without_the_tensor_is_named() -> None:
    have, lack = Table({"model.w": row((8,), ("S(0)",), Mesh.flat([0, 1, 2]))}), Table({})
    with pytest.raises(IncompatibleState, match=r"model\.w .* ranks \[2\]"):
        merge_tables([have, have, lack])


def test_disagreement_about_objects_and_aliases_is_named() -> None:
    with pytest.raises(ReplicasDiffer, match=r"object sampler is replicated .* per_rank on ranks \[1\]"):
        merge_tables([Table({}, objects={"sampler": "replicated"}), Table({}, objects={"sampler": "per_rank"})])
    with pytest.raises(ReplicasDiffer, match=r"head is tied to embed .* to other on ranks \[1\]"):
        merge_tables([Table({}, aliases={"head": "embed"}), Table({}, aliases={"head": "other"})])


def test_replicated_objects_come_from_the_first_rank_that_has_them() -> None:
    tables = [
        Table({}, objects={"rng": "per_rank"}),
        Table({}, objects={"rng": "per_rank", "scheduler": "replicated", "optim.groups": "groups"}),
        Table({}, objects={"rng": "per_rank", "scheduler": "replicated", "optim.groups": "groups"}),
    ]
    assert merge_tables(tables).sources == {"scheduler": (1,), "optim.groups": (1, 2)}


def test_pieces_that_do_not_tile_are_named() -> None:
    plan = merge_tables([Table({"model.w": row((4,))})] * 2)
    with pytest.raises(IncompatibleState, match=r"model\.w \[4\]: boxes cover 0 of 4"):
        check_tiling(plan, [[], []])
    piece = whole_piece("model.w", (4,), "float32")
    with pytest.raises(IncompatibleState, match=r"model\.w \[4\]: boxes .* overlap"):
        check_tiling(plan, [[piece], [piece]])
    empty = merge_tables([Table({"none": row((0, 2))})])
    with pytest.raises(IncompatibleState, match="2 boxes for a tensor without elements"):
        check_tiling(empty, [[whole_piece("none", (0, 2), "float32")] * 2])


# ---------------------------------------------------------------- tables and manifests


def some_table() -> Table:
    mesh, box = Mesh((2, 2), (3, 1, 0, 2)), Box((0, 0), (2, 3))
    explicit = Layout(Mesh.flat([0, 1]), ("E",), ((box,), (Box((2, 0), (1, 3)), Box((3, 0), (1, 3)))))
    return Table(
        {
            "sharded": row((8, 4), ("SS(0,2)", "S(0)"), mesh, "bfloat16"),
            "again": row((8,), ("R", "S(0)"), mesh),
            "plain": row(()),
            "explicit": Row("int8", (4, 3), explicit),
        },
        aliases={"tied": "plain"},
        objects={"rng": "per_rank"},
    )


def test_a_table_survives_its_bytes() -> None:
    table = some_table()
    assert decode_table(encode_table(table)) == table


def test_equal_tables_have_equal_bytes_and_others_do_not() -> None:
    reordered = Table(
        dict(sorted(some_table().tensors.items())), dict(some_table().aliases), dict(some_table().objects)
    )
    assert encode_table(some_table()) == encode_table(some_table())
    assert encode_table(Table({**some_table().tensors, "more": row(())})) != encode_table(some_table())
    assert decode_table(encode_table(reordered)) == some_table()


def test_layouts_survive_the_manifest() -> None:
    table = some_table()
    sharded = {fqn: r for fqn, r in table.tensors.items() if r.layout is not None}
    plan = Plan(4, sharded, {}, {}, {})
    meshes, entries = manifest_tensors(plan)
    assert len(meshes) == 2
    grids = [mesh_of(mesh) for mesh in meshes]
    assert {fqn: layout_of(entry, grids) for fqn, entry in entries.items()} == {
        fqn: r.layout for fqn, r in sharded.items()
    }


def test_a_manifest_does_not_grow_with_the_number_of_ranks() -> None:
    def size(world: int) -> int:
        mesh = Mesh((world // 4, 4), tuple(range(world)))
        table = Table({f"layer{i}.w": row((4096, 64), ("S(0)", "S(1)"), mesh) for i in range(50)})
        return len(msgspec.json.encode(manifest_tensors(merge_tables([table] * world))))

    assert size(1024) - size(8) < 20


@given(st.lists(st.integers(0, 30), unique=True, max_size=12))
def test_runs_spell_ranks_in_their_order(ranks: list[int]) -> None:
    found = runs(ranks)
    assert [r for start, stop in found for r in range(start, stop)] == ranks
    assert all(a[1] != b[0] for a, b in itertools.pairwise(found))
