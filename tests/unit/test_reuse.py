"""What an incremental save refers to, as pure functions: runs, the choice of files, headers out and in again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from distckpt.boxes import Box
from distckpt.format import reuse as module
from distckpt.format.digest import block_digests, digest
from distckpt.format.placing import Piece
from distckpt.format.reuse import FEWER_FILES, LEAST_SHARE, MOST_FILES, Base, base_of, reuse, used_files, worth_keeping
from distckpt.format.runs import FileRef, Run, attempt_problem, cut, file_problem, joined, overlap, place, run_bytes
from distckpt.format.shard import PACKED, Reuse, ShardPlan, plan_shard, render_header, stored_boxes
from distckpt.format.shard_header import parse_header

BLOCK = 4096
ROOT_FILES = [f"step-{step:010d}/g000001-{step:08x}/00000-of-00001.safetensors" for step in range(1, 60)]

places = st.lists(
    st.one_of(
        st.just((None, 0)),
        st.tuples(st.sampled_from(ROOT_FILES[:3]), st.integers(0, 9).map(lambda n: 4096 + n * BLOCK)),
    ),
    min_size=1,
    max_size=30,
)


@given(places)
def test_runs_give_back_the_places_that_they_were_made_of(where: list[tuple[str | None, int]]) -> None:
    runs = joined(where, BLOCK)
    assert sum(run.count for run in runs) == len(where)
    assert [run.first for run in runs] == [sum(r.count for r in runs[:i]) for i in range(len(runs))]
    for number, at in enumerate(where):
        found = place(runs, number, BLOCK)
        assert found[0] == at[0]
        assert at[0] is None or found == at
    for first in range(0, len(where), 3):
        parts = list(cut(runs, first, first + 5, BLOCK))
        covered = [(n, place(parts, n, BLOCK)) for part in parts for n in range(part.first, part.first + part.count)]
        assert covered == [(n, place(runs, n, BLOCK)) for n in range(first, min(first + 5, len(where)))]
    assert sum(run_bytes(run, len(where) * BLOCK - 5, BLOCK) for run in runs) == len(where) * BLOCK - 5


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 40), st.integers(1, 10)), max_size=8))
def test_overlaps_are_found(spans: list[tuple[str, int, int]]) -> None:
    seen: set[tuple[str, int]] = set()
    twice = False
    for path, start, size in spans:
        mine = {(path, byte) for byte in range(start, start + size)}
        twice |= bool(seen & mine)
        seen |= mine
    found = overlap((Run(0, 1, path, start), size) for path, start, size in spans)
    assert (found is not None) == twice


@given(
    st.dictionaries(st.sampled_from(ROOT_FILES), st.tuples(st.integers(0, 1000), st.integers(1000, 2000)), max_size=50)
)
def test_few_files_are_kept_and_none_for_a_trifle(files: dict[str, tuple[int, int]]) -> None:
    used, sizes = {p: u for p, (u, _) in files.items()}, {p: s for p, (_, s) in files.items()}
    kept = worth_keeping(used, sizes)
    assert len(kept) <= MOST_FILES
    assert all(used[path] >= LEAST_SHARE * sizes[path] for path in kept)
    worthy = [path for path in used if used[path] >= LEAST_SHARE * sizes[path]]
    assert len(kept) == (len(worthy) if len(worthy) <= MOST_FILES else FEWER_FILES)
    assert all(used[path] <= min((used[k] for k in kept), default=0) for path in worthy if path not in kept)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (ROOT_FILES[0], None),
        ("../step-0000000001/g000001-00000001/00000-of-00001.safetensors", "no shard"),
        ("/step-0000000001/g000001-00000001/00000-of-00001.safetensors", "no shard"),
        ("step-0000000001/../00000-of-00001.safetensors", "no shard"),
        ("step-0000000001/g000001-00000001/manifest-g000001.json", "no shard"),
        ("step-0000000001/g000001-00000001/x/00000-of-00001.safetensors", "no shard"),
        ("step-1/g000001-00000001/00000-of-00001.safetensors", "no shard"),
        ("step-0000000001\n/g000001-00000001/00000-of-00001.safetensors", "no shard"),
        ("", "no shard"),
    ],
)
def test_only_shards_can_be_referred_to(path: str, problem: str | None) -> None:
    found = file_problem(path)
    assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("step-0000000005/g000002-00000001", None),
        ("step-0000000006/g000002-00000001", "later step"),
        ("step-0000000005/g000003-00000001", "later step"),
        ("step-0000000005", "no attempt"),
        ("../step-0000000005/g000002-00000001", "no attempt"),
        ("step-0000000005/g000002-00000001/x", "no attempt"),
    ],
)
def test_only_earlier_attempts_can_be_referred_to(folder: str, problem: str | None) -> None:
    found = attempt_problem(folder, step=5, generation=2)
    assert found is None if problem is None else problem in str(found)


# ---------------------------------------------------------------- a chain of saves


class Disk:
    """Shards in memory: every save plans, writes its own bytes, and is read back through runs alone."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.base: Base | None = None

    def save(self, step: int, pieces: list[Piece], data: list[bytes]) -> ShardPlan:
        path = ROOT_FILES[step - 1]
        digests = [block_digests(memoryview(octets), BLOCK) for octets in data]
        known = reuse(self.base, pieces, digests) if self.base is not None else None
        plan = plan_shard(pieces, rank=0, world_size=1, save_id=str(step), objects={}, block=BLOCK, reuse=known)
        header = render_header(plan, digests)
        body = b"".join(data[e.piece][e.start : e.stop] for e in plan.extents)
        self.files[path] = header + body
        assert len(self.files[path]) == plan.size
        parsed = parse_header(self.files[path], file_size=plan.size, where=path)
        assert sorted(parsed.boxes, key=lambda b: b.key) == sorted(stored_boxes(plan, digests), key=lambda b: b.key)
        assert parsed.files == plan.files
        for other, used in used_files(known, plan.nbytes, BLOCK) if known is not None else ():
            assert 0 < used <= other.size == len(self.files[other.path])
        for box in parsed.boxes:
            index = plan.keys.index(box.key)
            for number, wanted in enumerate(box.digests):
                file, start = place(box.runs, number, BLOCK) if box.runs else (None, box.start + number * BLOCK)
                assert file != path
                octets = self.files[file or path][start : start + min(BLOCK, box.nbytes - number * BLOCK)]
                assert digest(octets) == wanted
                assert octets == data[index][number * BLOCK : number * BLOCK + len(octets)]
        file = FileRef(path, plan.size, digest(header))
        self.base = base_of(parsed.boxes, file, parsed.files, block=BLOCK, step=step, generation=1, manifest_path="m")
        return plan


SIZES = [0, 8, 4096, 5000, 40_000]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_chain_of_saves_refers_one_level_deep_and_reads_back(data: st.DataObject) -> None:
    disk = Disk()
    disk_pieces = [Piece(f"t{i}", "uint8", (size,), Box((0,), (size,))) for i, size in enumerate(SIZES)]
    disk_pieces += [Piece("cut", "float32", (4, 2048), Box((r, 0), (1, 2048))) for r in range(4)]
    disk_pieces += [Piece(PACKED, "uint8", (9,), Box((0,), (9,)))]  # somebody's tensor may be called that
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = [bytearray(rng.bytes(p.box.numel * (4 if p.dtype == "float32" else 1))) for p in disk_pieces]
    for step in range(1, data.draw(st.integers(2, 7)) + 1):
        keep = sorted(data.draw(st.sets(st.integers(0, len(values) - 1), min_size=5)))
        order = data.draw(st.permutations(keep))
        plan = disk.save(step, [disk_pieces[i] for i in order], [bytes(values[i]) for i in order])
        assert all(file.path in disk.files for file in plan.files)
        for index in data.draw(st.lists(st.integers(0, len(values) - 1), max_size=4)):
            if values[index]:
                values[index][data.draw(st.integers(0, len(values[index]) - 1))] ^= 255


def test_only_what_is_the_same_box_is_reused() -> None:
    pieces = [Piece("w", "float32", (8, 1024), Box((0, 0), (8, 1024)))]
    octets = np.random.default_rng(0).bytes(8 * 4096)
    digests = [block_digests(memoryview(octets), BLOCK)]
    plan = plan_shard(pieces, rank=0, world_size=1, save_id="1", objects={}, block=BLOCK)
    file = FileRef(ROOT_FILES[0], plan.size, "0" * 32)
    base = base_of(stored_boxes(plan, digests), file, (), block=BLOCK, step=1, generation=1, manifest_path="m")
    assert reuse(base, pieces, digests) == Reuse(((Run(0, 8, file.path, plan.data_start),),), (file,))
    for other in (
        Piece("v", "float32", (8, 1024), Box((0, 0), (8, 1024))),
        Piece("w", "int32", (8, 1024), Box((0, 0), (8, 1024))),
        Piece("w", "float32", (16, 1024), Box((0, 0), (8, 1024))),
        Piece("w", "float32", (8, 1024), Box((0, 0), (8, 1023))),
    ):
        assert reuse(base, [other], digests) is None
    assert reuse(base, pieces, [["0" * 32] * 8]) is None
    assert reuse(base.limited_to([]), pieces, digests) is None
    moved = [digests[0][1:] + digests[0][:1]]  # the same blocks in other places are other content
    assert reuse(base, pieces, moved) is None


def test_the_files_left_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block changes at every save: old files are let go one by one, and no shard refers to more than allowed."""
    monkeypatch.setattr(module, "MOST_FILES", 3)
    monkeypatch.setattr(module, "FEWER_FILES", 2)
    disk, rng = Disk(), np.random.default_rng(1)
    piece = Piece("w", "uint8", (40 * BLOCK,), Box((0,), (40 * BLOCK,)))
    octets = bytearray(rng.bytes(40 * BLOCK))
    for step in range(1, 15):
        plan = disk.save(step, [piece], [bytes(octets)])
        assert len(plan.files) <= 3
        octets[(step * 2 % 40) * BLOCK : (step * 2 % 40 + 2) * BLOCK] = rng.bytes(2 * BLOCK)
    assert plan.files


def test_safetensors_reads_what_is_in_the_file(tmp_path: Path) -> None:
    """The file stays an ordinary one: keys only for what is physically there, changed blocks as bytes under one key."""
    disk = Disk()
    pieces = [
        Piece("same", "float32", (2048,), Box((0,), (2048,))),
        Piece("partly", "bfloat16", (8, 1024), Box((0, 0), (8, 1024))),
        Piece("new", "float64", (3,), Box((0,), (3,))),
        Piece("empty", "float32", (0,), Box((0,), (0,))),
    ]
    values = [bytearray(np.random.default_rng(i).bytes(n)) for i, n in enumerate((8192, 16384, 24, 0))]
    disk.save(1, pieces, [bytes(v) for v in values])
    values[1][5000] ^= 1
    values[2][0] ^= 1
    disk.save(2, pieces, [bytes(v) for v in values])
    path = tmp_path / "x.safetensors"
    path.write_bytes(disk.files[ROOT_FILES[1]])
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == {"new", "empty", PACKED}
        assert file.get_tensor("new").tobytes() == bytes(values[2])
        assert file.get_tensor(PACKED).tobytes() == bytes(values[1][4096:8192])
        ours = json.loads(file.metadata()["distckpt"])
        sharding = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    assert sharding.keys() == {"new", "empty", PACKED}
    assert ours["version"] == [2, 0]
    assert {r["key"]: [len(run) for run in r["runs"]] for r in ours["reused"]} == {"same": [3], "partly": [3, 1, 3]}


@pytest.mark.parametrize(("percent", "written", "kept"), [(1, 0.03, 4.0), (5, 0.08, 4.0)])
def test_over_many_saves_little_is_written_again_and_the_space_is_bounded(
    percent: int, written: float, kept: float
) -> None:
    """Blocks change at random and two steps are kept: both stay bounded, by counts, in the steady state."""
    blocks, saves, rng = 200, 150, np.random.default_rng(0)
    piece = Piece("w", "uint8", (blocks * BLOCK,), Box((0,), (blocks * BLOCK,)))
    values = np.arange(blocks)
    base: Base | None = None
    sizes: dict[str, int] = {}
    needed: list[set[str]] = []
    shares, space = [], []
    for step in range(1, saves + 1):
        digests = [[f"{value:032x}" for value in values]]
        known = reuse(base, [piece], digests) if base is not None else None
        plan = plan_shard([piece], rank=0, world_size=1, save_id="s", objects={}, block=BLOCK, reuse=known)
        path = f"step-{step:010d}/g000001-00000000/00000-of-00001.safetensors"
        sizes[path] = sum(extent.stop - extent.start for extent in plan.extents)
        file = FileRef(path, plan.size, "0" * 32)
        base = base_of(
            stored_boxes(plan, digests), file, plan.files, block=BLOCK, step=step, generation=1, manifest_path="m"
        )
        needed = [*needed[-1:], {path} | {other.path for other in plan.files}]
        shares.append(sizes[path] / (blocks * BLOCK))
        space.append(sum(sizes[name] for name in set().union(*needed)) / (blocks * BLOCK))
        values[rng.choice(blocks, blocks * percent // 100, replace=False)] = rng.integers(1 << 40, 1 << 60)
        values[rng.choice(blocks, 1)] += 1 << 61  # no two steps alike
    assert shares[0] == 1.0
    assert np.mean(shares[1:]) < written
    assert max(space) < kept
