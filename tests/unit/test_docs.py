"""docs/format.md proved: a reader written from that page alone reads what the library writes, and the page's own bytes.

The first half imports nothing of distckpt: it knows only json, struct, xxhash, numpy and the text of the page.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "format.md").read_text(encoding="utf-8")

# ---------------------------------------------------------------- the reader


class Damaged(Exception):
    """Something on disk is not what a digest or a size says."""


def need(true: bool, what: str) -> None:
    if not true:
        raise Damaged(what)


def xxh3(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def spec_lineage(root: Path) -> list[tuple[int, int]]:
    """Return (generation, step) of the checkpoints that count, newest first (section 2)."""
    commits: dict[int, list[int]] = {}
    for path in root.glob("step-*/manifest-g*.json"):
        step, generation = int(path.parent.name[5:]), int(path.name[10:-5])
        if (path.parent.name, path.name) == (f"step-{step:010}", f"manifest-g{generation:06}.json"):
            commits.setdefault(generation, []).append(step)
    records = {int(p.stem): json.loads(p.read_bytes()) for p in root.glob("generations/*.json")}
    known, line = sorted({*commits, *records}), []
    current, bound = (known[-1] if known else None), math.inf
    while current is not None:
        taken = sorted((s for s in commits.get(current, []) if s <= bound), reverse=True)
        line += [(current, step) for step in taken]
        if current in records:
            current, bound = records[current]["resumed_from"] or (None, 0)
        else:
            bound = taken[-1] - 1 if taken else bound
            current = max((g for g in known if g < current), default=None)
    return line


def spec_manifest(root: Path, generation: int, step: int) -> dict[str, Any]:
    data = (root / f"step-{step:010}/manifest-g{generation:06}.json").read_bytes()
    body = data[61:-2]
    frame = b'{"digest":"xxh3-128:' + xxh3(body).encode() + b'","body":' + body + b"}\n"
    need(frame == data, "manifest digest")
    found: dict[str, Any] = json.loads(body)
    need(found["format"] == "distckpt" and found["version"][0] in (1, 2), "format")
    need((found["step"], found["generation"]) == (step, generation), "name")
    return found


def spec_header(folder: Path, manifest: dict[str, Any], index: int) -> tuple[Path, int, dict[str, Any], dict[str, Any]]:
    """Return (path, where data starts, safetensors entries, our metadata) of a shard (section 4)."""
    shard = manifest["shards"][index]
    path = folder / shard["path"]
    data = path.read_bytes()
    need(len(data) == shard["size"], "shard size")
    start = 8 + struct.unpack("<Q", data[:8])[0]
    need(xxh3(data[:start]) == shard["header"] and start % 4096 == 0, "header digest")
    entries = json.loads(data[8:start])
    ours = json.loads(entries.pop("__metadata__")["distckpt"])
    need((ours["save_id"], ours["rank"]) == (manifest["save_id"], index), "whose shard")
    return path, start, entries, ours


def spec_lists(
    shape: list[int], mesh: list[int], placements: list[str], coordinate: tuple[int, ...]
) -> list[list[int]]:
    """Return the indices that a rank held in each dimension (section 6)."""

    def chunk(items: list[int], parts: int, index: int) -> list[int]:
        size = math.ceil(len(items) / parts)
        return items[index * size : (index + 1) * size]

    lists = [list(range(extent)) for extent in shape]
    for parts, index, placement in zip(mesh, coordinate, placements, strict=True):
        if match := re.fullmatch(r"S\((\d+)\)", placement):
            lists[int(match[1])] = chunk(lists[int(match[1])], parts, index)
        elif match := re.fullmatch(r"SS\((\d+),(\d+)\)", placement):
            whole, factor = lists[int(match[1])], int(match[2])
            cut = [chunk(chunk(whole, factor, i), parts, index) for i in range(factor)]
            lists[int(match[1])] = list(itertools.chain.from_iterable(cut))
    return lists


def spec_held(manifest: dict[str, Any], tensor: dict[str, Any]) -> dict[int, np.ndarray]:
    """Return which elements each rank held, as a mask by rank; only ranks that held some."""
    mesh = manifest["meshes"][tensor["mesh"]]
    ranks = [rank for start, stop in mesh["ranks"] for rank in range(start, stop)]
    held = {}
    for number, (rank, coordinate) in enumerate(zip(ranks, itertools.product(*map(range, mesh["shape"])), strict=True)):
        mask = np.zeros(tensor["shape"], bool)
        if tensor["placements"] == ["E"]:
            for offsets, sizes in tensor["boxes"][number]:
                mask[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = True
        elif flat := [(m, text[2:-1].split(",")) for m, text in enumerate(tensor["placements"]) if text[0] == "F"]:
            ((m, (offset, length)),) = flat
            start = coordinate[m] * int(length) - int(offset)
            mask.reshape(-1)[max(0, start) : max(0, start + int(length))] = True
        else:
            mask[np.ix_(*spec_lists(tensor["shape"], mesh["shape"], tensor["placements"], coordinate))] = True
        if mask.any():
            held[rank] = mask
    return held


def spec_boxes(
    folder: Path, manifest: dict[str, Any], path: Path, start: int, entries: dict[str, Any], ours: dict[str, Any]
) -> list[tuple[dict[str, Any], bytes]]:
    """Return a shard's boxes and their bytes, wherever these lie (section 4)."""
    own = path.read_bytes()[start:]
    found = [(box, own[slice(*entries[key]["data_offsets"])]) for key, box in ours["tensors"].items()]
    packed = own[slice(*entries[ours["packed"]]["data_offsets"])] if "packed" in ours else b""
    others = []
    for other, size, header in ours.get("files", []):
        folders = {r["attempt"]: (r["shards"], [n for run in r["ranks"] for n in range(*run)]) for r in manifest["reused"]}
        attempt, _, leaf = other.rpartition("/")
        rank, count = int(leaf[:5]), int(leaf[9:14])
        need(folders[attempt][0] == count and rank in folders[attempt][1], "a file that the manifest names")
        others.append((folder.parent / other).read_bytes())
        need(len(others[-1]) == size, "size of a file that is referred to")
        need(xxh3(others[-1][: 8 + struct.unpack("<Q", others[-1][:8])[0]]) == header, "its header")
    for box in ours["reused"]:
        left, data = math.prod(box["sizes"]) * np.dtype(box["dtype"]).itemsize, b""
        for blocks, *there in box["runs"]:
            size = min(blocks * ours["block"], left)
            left -= size
            if there:
                data += others[there[0]][there[1] : there[1] + size]
            else:
                data, packed = data + packed[:size], packed[size:]
        found.append((box, data))
    need(not packed, "own runs fill the packed blocks")
    return found


def spec_tensor(folder: Path, manifest: dict[str, Any], name: str, itemsize: int) -> np.ndarray:
    """Return a tensor's bytes, of shape [..., itemsize], asking only the shards that its layout names."""
    name = manifest["aliases"].get(name, name)
    tensor = manifest["tensors"][name]
    result = np.zeros([*tensor["shape"], itemsize], np.uint8)
    times = np.zeros(tensor["shape"], int)
    held = spec_held(manifest, tensor) if len(manifest["shards"]) > 1 else {0: np.ones(tensor["shape"], bool)}
    for rank, mask in held.items():
        path, start, entries, ours = spec_header(folder, manifest, rank)
        for box, data in spec_boxes(folder, manifest, path, start, entries, ours):
            if box["fqn"] != name:
                continue
            blocks = [data[at : at + ours["block"]] for at in range(0, len(data), ours["block"])]
            need([xxh3(block) for block in blocks] == box["digests"], f"block of {name}")
            place = tuple(slice(o, o + s) for o, s in zip(box["offsets"], box["sizes"], strict=True))
            need(bool(mask[place].all()), "stored where it was held")
            result[place] = np.frombuffer(data, np.uint8).reshape([*box["sizes"], itemsize])
            times[place] += 1
    need(bool((times == 1).all()), "every element once")
    return result


def spec_value(plain: Any) -> Any:
    """Return a value of typed JSON (section 7), as far as plain Python and NumPy go."""
    if isinstance(plain, list):
        return [spec_value(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if not any(key.startswith("$") for key in plain):
        return {key: spec_value(item) for key, item in sorted(plain.items())}
    ((tag, payload),) = plain.items()
    return {
        "$int": lambda: int(payload, 16),
        "$float": lambda: float(payload),
        "$bytes": lambda: base64.b64decode(payload),
        "$complex": lambda: complex(*map(spec_value, payload)),
        "$tuple": lambda: tuple(map(spec_value, payload)),
        "$set": lambda: set(map(spec_value, payload)),
        "$dict": lambda: {spec_value(key): spec_value(item) for key, item in payload},
        "$str": lambda: base64.b64decode(payload).decode("utf-8", "surrogatepass"),
        "$range": lambda: range(*map(spec_value, payload)),
        "$ndarray": lambda: np.frombuffer(base64.b64decode(payload["data"]), payload["dtype"]).reshape(
            payload["shape"]
        ),
        "$numpy": lambda: np.frombuffer(base64.b64decode(payload[1]), payload[0])[0],
    }[tag]()


# ---------------------------------------------------------------- against the library

import builders  # noqa: E402
import msgspec  # noqa: E402

from distckpt.boxes import Box  # noqa: E402
from distckpt.dcp.planner import Row, manifest_tensors, pieces_for  # noqa: E402
from distckpt.dcp.tables import Table, merge_tables  # noqa: E402
from distckpt.format import dtypes, names, typed_arrays, typed_decode, typed_json, typed_leaves  # noqa: E402
from distckpt.format.commit import commit  # noqa: E402
from distckpt.format.digest import block_digests, digest  # noqa: E402
from distckpt.format.layout import Layout, Mesh  # noqa: E402
from distckpt.format.lineage import create_generation, lineage, list_committed, read_generations  # noqa: E402
from distckpt.format.manifest import ShardEntry  # noqa: E402
from distckpt.format.shard import plan_shard, render_header  # noqa: E402
from distckpt.storage import open_store  # noqa: E402
from distckpt.storage.base import Store  # noqa: E402

OBJECTS = {
    "scheduler": {"last_epoch": 3, "betas": (0.9, 0.99), "names": {"b": 1, "a": 2}, 7: None},
    "odd": [float("inf"), 2**80, -(2**60), b"\x00\xff", 1 - 2j, {3, 1}, {"$tuple": []}, "\ud800", range(3)],
    "array": {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "s": np.float32(0.1)},
}


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:010}"


@pytest.mark.parametrize("cut", ["rows", "columns", "replicated"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_reader_reads_what_the_library_wrote(tmp_path: Path, cut: str, world: int) -> None:
    tensors = builders.some_tensors(1)
    builders.build_checkpoint(
        open_store(tmp_path), 12, world=world, tensors=tensors, cut=cut, aliases={"model.tied": "model.embed.weight"},
        metrics={"loss": float("nan"), "accuracy": 0.75}, objects=OBJECTS, rank_objects={"rng": lambda rank: (rank,)},
        block=4096,
    )  # fmt: skip
    manifest = spec_manifest(tmp_path, *spec_lineage(tmp_path)[0])
    assert set(manifest["tensors"]) == set(tensors)
    for name, array in {**tensors, "model.tied": tensors["model.embed.weight"]}.items():
        found = spec_tensor(folder_of(tmp_path, 12), manifest, name, array.itemsize)
        assert found.tobytes() == array.tobytes()
    assert np.isnan(spec_value(manifest["metrics"]["loss"]))
    assert spec_value(manifest["metrics"]["accuracy"]) == 0.75
    for name in ("scheduler", "odd"):
        value = spec_value(manifest["objects"][name])
        assert value == OBJECTS[name]
        assert repr(value) == repr(OBJECTS[name])  # the order of dicts too
    array = spec_value(manifest["objects"]["array"])
    assert array["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert array["s"] == np.float32(0.1)
    for rank in range(world):
        ours = spec_header(folder_of(tmp_path, 12), manifest, rank)[3]
        assert spec_value(ours["objects"]["rng"]) == (rank,)


LAYOUTS = {
    "strided": Layout(Mesh((2, 2), (0, 1, 2, 3)), ("SS(0,2)", "S(0)")),
    "strided.alone": Layout(Mesh.flat([2, 0]), ("SS(0,2)",)),
    "hsdp": Layout(Mesh((2, 2), (3, 1, 0, 2)), ("R", "S(0)")),
    "2d": Layout(Mesh((2, 2), (0, 1, 2, 3)), ("S(0)", "S(1)")),
    "both.same": Layout(Mesh((2, 2), (0, 2, 1, 3)), ("S(1)", "S(1)")),
    "explicit": Layout(Mesh.flat([1, 3]), ("E",), ((Box((0, 0), (2, 5)), Box((6, 0), (1, 5))), (Box((2, 0), (4, 5)),))),
    "zero": Layout(Mesh((2, 2), (0, 1, 2, 3)), ("R", "F(11,23)")),
    "zero.alone": Layout(Mesh.flat([3, 1, 2]), ("F(100,48)",)),
    "strided#1": Layout(Mesh.flat([0, 1, 2, 3]), ("S(0)",)),
}


def write_laid_out(store: Store, arrays: dict[str, np.ndarray], layouts: dict[str, Layout]) -> None:
    """Commit step 7: each array lies on four ranks as its layout says, and replicas share the writing."""
    rows = {name: Row(str(arrays[name].dtype), arrays[name].shape, layout) for name, layout in layouts.items()}
    plan = merge_tables([Table(rows)] * 4)
    draft = builders.prepare(store, 7, world=4, tensors={})
    shards = []
    for rank in range(4):
        pieces = pieces_for(plan, rank)
        data = [
            arrays[p.fqn][tuple(slice(o, e) for o, e in zip(p.box.offsets, p.box.ends, strict=True))].tobytes()
            for p in pieces
        ]
        layout = plan_shard(pieces, rank=rank, world_size=4, save_id=draft.save_id, objects={}, block=4096)
        header = render_header(layout, [block_digests(memoryview(octets), 4096) for octets in data])
        path = f"{names.attempt_name(1, '0123abcd')}/{names.shard_name(rank, 4)}"
        writer = store.open_writer(f"{names.step_folder(7)}/{path}", layout.size)
        writer.write_at(0, memoryview(header))
        for start, octets in zip(layout.starts, data, strict=True):
            writer.write_at(start, memoryview(octets))
        writer.commit()
        shards.append(ShardEntry(path=path, size=layout.size, header=digest(header)))
    meshes, tensors = manifest_tensors(plan)
    commit(store, msgspec.structs.replace(draft, meshes=meshes, tensors=tensors, shards=shards), check_fencing=False)


def test_the_reader_finds_every_layout(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 1 << 30, (7, 5)) for name in LAYOUTS}
    write_laid_out(open_store(tmp_path), arrays, LAYOUTS)
    manifest = spec_manifest(tmp_path, 1, 7)
    for name, array in arrays.items():
        assert spec_tensor(folder_of(tmp_path, 7), manifest, name, 8).tobytes() == array.tobytes()
    # Rank 0 held several boxes of one tensor, beside a tensor with the name that the second one's key would have.
    held = [set(spec_header(folder_of(tmp_path, 7), manifest, rank)[2]) for rank in range(4)]
    assert any({"strided", "strided#1", "strided.alone", "strided.alone#1"} <= keys for keys in held)


def test_the_reader_notices_every_flipped_byte(tmp_path: Path) -> None:
    builders.build_checkpoint(open_store(tmp_path), 3, tensors={"w": np.arange(6, dtype=np.float32).reshape(3, 2)})
    files = [path for path in folder_of(tmp_path, 3).rglob("*") if path.is_file()]
    for path in files:
        good = path.read_bytes()
        for at in [*range(0, len(good), 97), len(good) - 1]:
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises((Damaged, ValueError, KeyError, struct.error)):
                spec_tensor(folder_of(tmp_path, 3), spec_manifest(tmp_path, 1, 3), "w", 4)
        path.write_bytes(good)


def test_the_reader_reads_incremental_saves(tmp_path: Path) -> None:
    import torch

    from distckpt import CheckpointConfig, CheckpointManager

    model = torch.nn.ParameterDict({f"p{n}": torch.randn(n, 1000) for n in (1, 9, 20)})
    config = CheckpointConfig(
        tmp_path, incremental=True, block_bytes=4096, preemption_signals=(), control_file=None, save_total_limit=2
    )
    with CheckpointManager(config, model) as manager:
        for step in range(1, 6):
            with torch.no_grad():
                model["p9"].data[step] += 1
                model["p20"].data[3 * step] += 1
            manager.save(step=step)
            manifest = spec_manifest(tmp_path, *spec_lineage(tmp_path)[0])
            assert manifest["version"] == ([2, 0] if step > 1 else [1, 0])
            assert ("reused" in manifest) == (step > 1)
            for name, value in model.named_parameters():
                found = spec_tensor(folder_of(tmp_path, step), manifest, f"model.{name}", 4)
                assert found.tobytes() == value.detach().numpy().tobytes()
    assert len({r["attempt"].partition("/")[0] for r in manifest["reused"]}) > 2


@pytest.mark.parametrize("lost", [None, 1, 2, 3, 4])
def test_the_reader_follows_the_same_lineage(tmp_path: Path, lost: int | None) -> None:
    store = open_store(tmp_path)
    for resumed_from in (None, (1, 100), (2, 150), (1, 100)):
        create_generation(store, resumed_from=resumed_from)
    for generation, step in ((1, 100), (1, 200), (2, 150), (2, 250), (3, 120), (3, 250), (1, 300), (3, 400), (4, 120)):
        builders.build_checkpoint(store, step, generation=generation, tensors={})
    if lost is not None:
        (tmp_path / names.generation_file(lost)).unlink()
    line = lineage(list_committed(store), read_generations(store))
    assert spec_lineage(tmp_path) == [(c.generation, c.step) for c in line]
    assert lost is not None or [c.step for c in line] == [120, 100]


# ---------------------------------------------------------------- the page's own bytes and tables


def example(store: Store) -> None:
    """Write the checkpoint of section 10."""
    manifest = builders.prepare(
        store, 100, world=2, tensors={"model.w": np.arange(6, dtype=np.float32).reshape(3, 2)}, metrics={"loss": 0.5},
        objects={"scheduler": {"betas": (0.9, 0.99), "last_epoch": 1}}, rank_objects={"rng": lambda rank: 7 + rank},
        aliases={"model.tied": "model.w"}, epoch=1, nonce="1a2b3c4d", save_id="g1/2-save",
    )  # fmt: skip
    commit(store, msgspec.structs.replace(manifest, time="2026-01-31T12:00:00Z"), check_fencing=False)


def test_the_example_is_what_the_library_writes(tmp_path: Path) -> None:
    example(open_store(tmp_path))
    section = PAGE.partition("## 10. Example")[2]
    manifest, length, header, data = re.findall(r"```(?:json)?\n(.*?)\n```", section, re.DOTALL)
    written = (folder_of(tmp_path, 100) / "manifest-g000001.json").read_bytes()
    assert written == manifest.encode() + b"\n"
    assert len(written) == 850
    shard = (folder_of(tmp_path, 100) / "g000001-1a2b3c4d/00000-of-00002.safetensors").read_bytes()
    assert shard == bytes.fromhex(length) + header.encode().ljust(4088, b" ") + bytes.fromhex(data)
    assert (len(header), len(shard)) == (489, 4112)
    assert json.loads(header)["__metadata__"]["distckpt"].count(digest(bytes.fromhex(data))) == 1


def cells(section: str) -> list[list[str]]:
    text = PAGE.partition(section)[2].partition("\n## ")[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_table_of_dtypes_is_complete() -> None:
    page: dict[str, tuple[str | None, int]] = {}
    for row in cells("## 5. Dtypes")[2:]:
        for name, tag, size in (row[:3], row[4:]):
            if name:
                page[name.strip("`")] = (None if tag == "–" else tag, int(size))
    page |= {f"{sign}int{bits}": (None, 1) for sign in ("", "u") for bits in range(1, 8)}
    assert page == {name: (dtypes.safetensors_tag(name), size) for name, size in dtypes.ITEMSIZES.items()}


def test_the_table_of_tags_is_complete() -> None:
    page = {tag for row in cells("## 7. Typed JSON")[2:] for tag in re.findall(r"`(\$[A-Za-z.]+)`", row[0])}
    assert page == {*typed_leaves.READERS, *typed_arrays.READERS, *typed_decode._BUILDERS}


def test_the_table_of_layouts_is_right() -> None:
    rows = cells("## 6. Layouts")[2:]
    checked = 0
    for mesh, placements, *ranks in rows:
        if placements == "`E`" or placements.startswith("`F"):
            continue
        shape = [int(extent) for extent in mesh.split(" × ")]
        texts = [text.strip("` ") for text in re.findall(r"`[^`]+`", placements)]
        for coordinate, told in zip(itertools.product(*map(range, shape)), ranks, strict=False):
            indices, columns = spec_lists([7, 2], shape, texts, coordinate)
            rows_told, _, column = told.partition(", column ")
            wanted = []
            for part in rows_told.split(" and "):
                first, _, last = part.partition("–")
                wanted += range(int(first), int(last or first) + 1)
            assert (indices, columns) == (wanted, [int(column)] if column else [0, 1])
            checked += 1
    assert checked == 22


def test_facts_in_the_text() -> None:
    assert f'`digest("")` is `{digest(b"")}`' in " ".join(PAGE.split())
    assert typed_json.encode(2**53) == {"$int": hex(2**53)}
    assert typed_json.encode(2**53 - 1) == 2**53 - 1


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_pages_name_only_what_exists(page: Path) -> None:
    """Every path below distckpt/, tests/, launch/ or docs/ that a page mentions is there."""
    top = DOCS.parent
    mentioned = re.findall(r"(?<![\w/])(?:distckpt|tests|launch|docs)/[\w./-]*\w", page.read_text(encoding="utf-8"))
    assert [path for path in mentioned if not (top / path).exists()] == []
