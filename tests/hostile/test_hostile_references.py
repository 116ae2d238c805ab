"""References that someone made wrong on purpose: each is refused by a named error, on reading and by verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from distckpt import open_checkpoint
from distckpt.boxes import Box
from distckpt.dcp.incremental import merged
from distckpt.errors import CorruptCheckpoint, ManifestError, ShardError
from distckpt.format import names
from distckpt.format.commit import begin_attempt, commit
from distckpt.format.digest import block_digests, digest
from distckpt.format.lineage import Committed, list_committed
from distckpt.format.manifest import Manifest, MeshEntry, ShardEntry, TensorEntry
from distckpt.format.placing import Piece
from distckpt.format.reuse import Base, base_of, reuse, used_files
from distckpt.format.runs import FileRef
from distckpt.format.shard import plan_shard, render_header, stored_boxes
from distckpt.format.shard_header import parse_header
from distckpt.format.verify import verify
from distckpt.storage import PosixStore

BLOCK = 4096
PIECES = [
    Piece("a", "uint8", (4 * BLOCK,), Box((0,), (4 * BLOCK,))),
    Piece("b", "uint8", (2 * BLOCK,), Box((0,), (2 * BLOCK,))),
]
Ours = dict[str, Any]


def octets(seed: int, blocks: int) -> bytearray:
    return bytearray(np.random.default_rng(seed).bytes(blocks * BLOCK))


def save(store: PosixStore, step: int, data: list[bytes], base: Base | None, spoil: Callable[[Ours], None]) -> Base:
    """Commit a checkpoint of one rank; ``spoil`` changes our part of the header, with all digests made right after."""
    digests = [block_digests(memoryview(d), BLOCK) for d in data]
    known = reuse(base, PIECES, digests) if base is not None else None
    plan = plan_shard(PIECES, rank=0, world_size=1, save_id=f"s{step}", objects={}, block=BLOCK, reuse=known)
    header = spoiled(render_header(plan, digests), spoil)
    attempt = begin_attempt(store, step=step, generation=1, nonce=f"{step:08x}")
    path = f"{names.step_folder(step)}/{attempt}/{names.shard_name(0, 1)}"
    writer = store.open_writer(path, plan.size)
    body = b"".join(data[e.piece][e.start : e.stop] for e in plan.extents)
    writer.write_at(0, memoryview(header + body))
    writer.commit()
    manifest = Manifest(
        step=step, epoch=None, time="2026-01-01T00:00:00Z", generation=1, attempt=attempt, save_id=f"s{step}",
        world_size=1, engine="test", meshes=[MeshEntry(shape=[1], ranks=[[0, 1]])],
        tensors={p.fqn: TensorEntry(dtype=p.dtype, shape=list(p.global_shape), mesh=0, placements=["R"]) for p in PIECES},
        aliases={}, objects={}, per_rank=[], metrics={}, config=None, provenance=None, software={},
        shards=[ShardEntry(path=path.partition("/")[2], size=plan.size, header=digest(header))],
    )  # fmt: skip
    found = merged([used_files(known, plan.nbytes, BLOCK)]) if known is not None else []
    committed = commit(store, manifest.referring(found), check_fencing=False)
    file = FileRef(path, plan.size, digest(header))
    boxes = stored_boxes(plan, digests)
    return base_of(boxes, file, plan.files, block=BLOCK, step=step, generation=1, manifest_path=committed)


def spoiled(header: bytes, spoil: Callable[[Ours], None]) -> bytes:
    """Return the header with our metadata changed, of the same length: it has room for some more."""
    outer = json.loads(header[8:])
    ours = json.loads(outer["__metadata__"]["distckpt"])
    spoil(ours)
    outer["__metadata__"]["distckpt"] = json.dumps(ours, separators=(",", ":"))
    text = json.dumps(outer, separators=(",", ":")).encode()
    assert len(text) <= len(header) - 8
    return header[:8] + text.ljust(len(header) - 8)


def build(
    root: Path, spoil: Callable[[Ours], None] = lambda ours: None, steps: int = 2
) -> tuple[PosixStore, Committed]:
    """Return a root of two or three checkpoints: in each of the later ones one more block of ``a`` has changed."""
    store = PosixStore(root)
    data, base = [octets(1, 4), octets(2, 2)], None
    for step in range(1, steps + 1):
        base = save(store, step, [bytes(d) for d in data], base, spoil if step == steps else lambda ours: None)
        data[0][step * BLOCK : step * BLOCK + 8] = bytes(8)
    return store, max(list_committed(store))


def run_of(ours: Ours, key: str = "a") -> list[int]:
    return next(run for entry in ours["reused"] if entry["key"] == key for run in entry["runs"] if len(run) == 3)


def change(key: str, value: Any) -> Callable[[Ours], None]:
    return lambda ours: ours.update({key: value})


def edit(place: int, value: int) -> Callable[[Ours], None]:
    """Set one number (blocks, file, byte) of the first run of ``a``."""

    def spoil(ours: Ours) -> None:
        run_of(ours)[place] = value

    return spoil


def outside(name: str) -> Callable[[Ours], None]:
    def spoil(ours: Ours) -> None:
        ours["files"][0][0] = name

    return spoil


def no_run(ours: Ours) -> None:
    ours["reused"][0]["runs"] = [[4]]


def twice(ours: Ours) -> None:
    """``b`` points to bytes of ``a``: both cannot be theirs."""
    run_of(ours, "b")[2] = run_of(ours)[2]


def same_key(ours: Ours) -> None:
    ours["reused"][1]["key"] = "a"


def packed_unknown(ours: Ours) -> None:
    ours["packed"] = "other"


def unused(ours: Ours) -> None:
    ours["files"].append(["step-0000000001/g000001-0000000f/00000-of-00001.safetensors", 99, "0" * 32])


def two_files(ours: Ours) -> None:
    ours["files"].append(list(ours["files"][0]))


def blocks_of_others(ours: Ours) -> None:
    """The own run of ``a`` takes more blocks than are packed."""
    runs = ours["reused"][0]["runs"]
    ours["reused"][0]["runs"] = [[sum(r[0] for r in runs) - 1], [1, 0, run_of(ours)[2]]]


PARSED = {
    "outside the root": (outside("../x/g000001-00000001/00000-of-00001.safetensors"), "no shard of a step"),
    "absolute": (outside("/etc/passwd"), "no shard of a step"),
    "a manifest": (outside("step-0000000001/manifest-g000001.json"), "no shard of a step"),
    "no such file number": (edit(1, 7), "there is no file 7"),
    "before the data": (edit(2, 3), "are outside"),
    "past the end": (edit(2, 1 << 40), "are outside"),
    "negative": (edit(2, -1), "int"),
    "more blocks than digests": (edit(0, 9), "digests"),
    "no blocks": (edit(0, 0), "a run is not"),
    "overlapping": (twice, "referred to twice"),
    "nothing elsewhere": (no_run, "none of its blocks"),
    "one key twice": (same_key, "stands twice"),
    "unknown packed": (packed_unknown, "one of the header's two lists"),
    "no packed": (change("packed", None), "one of the header's two lists"),
    "a file that nobody uses": (unused, "holds nothing"),
    "a file twice": (two_files, "twice"),
    "more own blocks than packed": (blocks_of_others, "packed"),
    "of format 1": (change("version", [1, 9]), "format .1, 9. does not do"),
    "too many files": (change("files", [["x", 1, "0" * 32]] * 65), "refers to 65 files"),
    "a digest that is none": (lambda ours: ours["files"][0].__setitem__(2, "z"), "not a digest"),
    "reused a number": (change("reused", 1), "reused"),
}


@pytest.mark.parametrize(("spoil", "match"), PARSED.values(), ids=PARSED)
def test_hostile_headers_are_refused(tmp_path: Path, spoil: Callable[[Ours], None], match: str) -> None:
    store, newest = build(tmp_path, spoil)
    for read in (lambda: open_checkpoint(tmp_path / newest.folder).read("a"),):
        with pytest.raises(ShardError, match=match) as refused:
            read()
        assert newest.folder in str(refused.value)
    problems = verify(store, newest).problems
    assert problems
    assert problems[0].file.startswith(newest.folder)


def test_the_honest_one_is_accepted(tmp_path: Path) -> None:
    store, newest = build(tmp_path, steps=3)
    assert verify(store, newest, mode="full").ok
    wanted = octets(1, 4)
    wanted[BLOCK : BLOCK + 8] = wanted[2 * BLOCK : 2 * BLOCK + 8] = bytes(8)
    assert open_checkpoint(tmp_path).read("a").numpy().tobytes() == bytes(wanted)


# What only the manifest and the other file can tell.


def other_file(name: str) -> Callable[[Ours], None]:
    return outside(f"step-0000000001/g000001-{name}/00000-of-00001.safetensors")


def through_the_second(ours: Ours) -> None:
    """The third refers to where the second says that its block is, though the second only refers itself."""
    place = next(i for i, file in enumerate(ours["files"]) if file[0].startswith("step-0000000002"))
    run_of(ours, "b")[1] = place


def shifted(ours: Ours) -> None:
    run_of(ours, "b")[2] += 8


def swapped(ours: Ours) -> None:
    """The two blocks of ``b`` stand for each other."""
    entry = next(e for e in ours["reused"] if e["key"] == "b")
    count, file, start = entry["runs"][0]
    assert count == 2
    entry["runs"] = [[1, file, start + BLOCK], [1, file, start]]


def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    """So what is not committed with the checkpoint (an attempt that nobody protects) cannot be referred to."""
    store, newest = build(tmp_path, other_file("0badbeef"))
    with pytest.raises(ShardError, match="which the manifest does not name"):
        open_checkpoint(tmp_path / newest.folder).read("a")
    assert any("does not name" in p.what for p in verify(store, newest).problems)


@pytest.mark.parametrize("spoil", [through_the_second, shifted, swapped])
def test_references_that_do_not_hit_the_right_block_are_refused(tmp_path: Path, spoil: Callable[[Ours], None]) -> None:
    store, newest = build(tmp_path, spoil, steps=3)
    with pytest.raises(CorruptCheckpoint, match=r"do not match their digest|are outside|cannot be read"):
        open_checkpoint(tmp_path / newest.folder).read("b")
    for mode in ("quick", "full"):
        found = [p for p in verify(store, newest, mode=mode).problems if p.tensor == "b" or "'b'" in p.what]
        assert found, verify(store, newest, mode=mode).problems


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("attempt", "step-0000000002/g000001-00000002", "this very attempt"),
        ("attempt", "step-0000000003/g000001-00000002", "later step or generation"),
        ("attempt", "step-0000000001/g000002-00000002", "later step or generation"),
        ("attempt", "../../etc/passwd", "no attempt at a step"),
        ("attempt", "step-0000000001/g000001-00000001/..", "no attempt at a step"),
        ("used", 1 << 50, "bytes used of"),
        ("size", -1, "int"),
        ("shards", 0, "outside"),
        ("shards", 1 << 30, "outside"),
        ("ranks", [], "0 runs of ranks"),
        ("ranks", [[0, 2]], r"no \[start, stop\)"),
        ("ranks", [[0, 0]], r"no \[start, stop\)"),
        ("ranks", [[0, 1], [0, 1]], r"no \[start, stop\)"),
        ("ranks", [[0]], r"no \[start, stop\)"),
    ],
)
def test_hostile_manifests_are_refused(tmp_path: Path, field: str, value: Any, match: str) -> None:
    store, newest = build(tmp_path)
    path = tmp_path / newest.manifest_path
    plain = json.loads(path.read_bytes())["body"]
    plain["reused"][0][field] = value
    write_manifest(path, plain)
    with pytest.raises(ManifestError, match=match):
        open_checkpoint(tmp_path / newest.folder)
    assert verify(store, newest).problems[0].file == newest.manifest_path


def test_manifests_that_name_a_file_twice_or_say_version_1(tmp_path: Path) -> None:
    _, newest = build(tmp_path)
    path = tmp_path / newest.manifest_path
    plain = json.loads(path.read_bytes())["body"]
    write_manifest(path, {**plain, "reused": plain["reused"] * 2})
    with pytest.raises(ManifestError, match="stands twice"):
        open_checkpoint(tmp_path / newest.folder)
    many = {**plain["reused"][0], "shards": 1 << 20, "ranks": [[0, 1 << 20]]}
    write_manifest(path, {**plain, "reused": [many]})
    with pytest.raises(ManifestError, match="1048576 files for 1 shards"):
        open_checkpoint(tmp_path / newest.folder)
    write_manifest(path, {**plain, "version": [1, 5]})
    with pytest.raises(ManifestError, match=r"format \(1, 5\) does not do"):
        open_checkpoint(tmp_path / newest.folder)


def test_another_file_in_the_place_of_the_one_referred_to(tmp_path: Path) -> None:
    """Whole in itself and of the right size: the digest of its header, and of every block, tells."""
    store, newest = build(tmp_path)
    other, _ = build(tmp_path / "other", steps=1)
    reference = open_checkpoint(tmp_path / newest.folder).manifest.references[0].paths[0]
    data = bytearray((tmp_path / reference).read_bytes())
    at = data.find(b"s1")
    data[at : at + 2] = b"s9"
    (tmp_path / reference).write_bytes(data)
    problems = verify(store, newest).problems
    assert [p.file for p in problems] == [reference]
    assert "step 2 refers to it" in problems[0].what
    assert other.url != store.url


def write_manifest(path: Path, plain: dict[str, Any]) -> None:
    body = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(b'{"digest":"xxh3-128:' + digest(body).encode() + b'","body":' + body + b"}\n")


def test_a_header_parses_in_bounded_memory_whatever_its_runs_claim(tmp_path: Path) -> None:
    store, newest = build(tmp_path)
    shard = open_checkpoint(tmp_path / newest.folder).manifest.shards[0]
    data = (tmp_path / newest.folder / shard.path).read_bytes()
    for claim in (1 << 61, (1 << 62) - 1):
        hostile = spoiled(data[: 8 + int.from_bytes(data[:8], "little")], edit(0, claim))
        with pytest.raises(ShardError):
            parse_header(hostile, file_size=len(data), where="x")
    assert msgspec.to_builtins(open_checkpoint(store.root).manifest)["reused"]
