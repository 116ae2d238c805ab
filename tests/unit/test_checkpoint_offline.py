"""Offline reading: what a path means, and that every tensor comes back bit for bit or as a named error."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from builders import build_checkpoint, prepare, shard_paths, some_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.boxes import Box
from distckpt.errors import (
    ConfigError,
    IncompatibleState,
    ShardError,
)
from distckpt.format import box_reader, read_ahead, typed_json
from distckpt.format.checkpoint import Checkpoint, open_checkpoint
from distckpt.format.lineage import Committed, read_manifest
from distckpt.storage.memory import MemoryStore
from distckpt.storage.posix import PosixStore


@pytest.fixture
def store(tmp_path: Path) -> PosixStore:
    return PosixStore(tmp_path / "root")


def flip(store: PosixStore, name: str, offset: int) -> None:
    path = Path(store.path_of(name))
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("cut", ["rows", "columns", "replicated"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_tensor_comes_back(store: PosixStore, cut: str, world: int) -> None:
    tensors = some_tensors(3)
    build_checkpoint(store, 100, world=world, tensors=tensors, cut=cut, block=4096)
    checkpoint = open_checkpoint(store.root)
    assert set(checkpoint.tensors) == set(tensors)
    for fqn, array in tensors.items():
        found = checkpoint.read(fqn)
        assert tuple(found.shape) == array.shape
        assert str(found.dtype) == f"torch.{checkpoint.tensors[fqn].dtype}"
        assert bits(found) == array.tobytes()
        info = checkpoint.tensors[fqn]
        assert (info.shape, info.nbytes) == (array.shape, array.nbytes)
        assert sum(box.numel for box in info.boxes) == array.size


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        "float16",
        "uint16",
        "complex32",
        "complex128",
        "float8_e4m3fn",
        "float8_e8m0fnu",
        "uint64",
        "bool",
        "float4_e2m1fn_x2",
        "int4",
    ],
)
def test_every_kind_of_dtype_keeps_its_bits(dtype: str) -> None:
    store = MemoryStore()
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2 if dtype == "bool" else 256, (11, 6, size), dtype=np.uint8)
    as_numpy = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}[size]
    array = raw.view(as_numpy)[..., 0]
    scalar = array[0, 0]
    committed = build_checkpoint(
        store, 1, tensors={"w": array, "s": scalar}, cut="columns", dtypes={"w": dtype, "s": dtype}
    )
    checkpoint = Checkpoint(store, committed, read_manifest(store, committed))
    assert checkpoint.read("w").dtype == getattr(torch, dtype)
    assert checkpoint.read("w").shape == (11, 6)
    assert bits(checkpoint.read("w")) == raw.tobytes()
    assert checkpoint.read("s").shape == ()
    assert bits(checkpoint.read("s").reshape(1)) == raw[0, 0].tobytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_box_is_that_region(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple))
    world = data.draw(st.integers(1, 4))
    cut = data.draw(st.sampled_from(["rows", "columns", "replicated"]))
    array = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    store = MemoryStore()
    committed = build_checkpoint(store, 1, world=world, tensors={"w": array}, cut=cut, block=4096)
    offsets = tuple(data.draw(st.integers(0, s)) for s in shape)
    sizes = tuple(data.draw(st.integers(0, s - o)) for s, o in zip(shape, offsets, strict=True))
    checkpoint = Checkpoint(store, committed, read_manifest(store, committed))
    found = checkpoint.read_box("w", Box(offsets, sizes))
    expected = array[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
    assert np.array_equal(found.numpy(), expected)


def test_a_box_reads_only_the_blocks_that_it_touches(store: PosixStore) -> None:
    array = np.arange(4 << 20, dtype=np.uint8).reshape(1024, 4096)
    build_checkpoint(store, 1, world=4, tensors={"w": array, "v": array}, cut="rows", block=4096)
    checkpoint = open_checkpoint(store.root)
    assert isinstance(checkpoint.store, PosixStore)
    opened = checkpoint.store.counters
    checkpoint.read_box("w", Box((10, 0), (1, 1)))
    before = opened["bytes_read"]
    found = checkpoint.read_box("w", Box((300, 5), (2, 3)))
    # Another rank's header (at most one first read of 64 KiB, and its rest), and two blocks of 4 KiB.
    assert found.tolist() == array[300:302, 5:8].tolist()
    assert checkpoint._index.opened == 2
    header = checkpoint._index.header(1).nbytes
    assert opened["bytes_read"] - before == max(header, 64 << 10) + 2 * 4096


def test_memory_and_requests_are_bounded(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"w": np.random.default_rng(0).integers(0, 255, (512, 2048), dtype=np.uint8)}
    build_checkpoint(store, 1, world=2, tensors=tensors, cut="columns", block=4096)
    sizes: list[int] = []
    read_into = PosixStore.read_into

    def spy(self: PosixStore, name: str, offset: int, destination: memoryview) -> None:
        sizes.append(len(destination))
        read_into(self, name, offset, destination)

    monkeypatch.setattr(PosixStore, "read_into", spy)
    monkeypatch.setattr(box_reader, "REQUEST", 32 << 10)
    assert np.array_equal(open_checkpoint(store.root).read("w").numpy(), tensors["w"])
    assert max(sizes) == 32 << 10
    assert sum(sizes) == 512 * 2048


def test_a_state_dict_is_read_in_the_order_that_was_told(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the files, where wide dtypes come first; the manifest has names in their own order."""
    kinds = (np.uint8, np.float64, np.float32, np.uint8, np.float64)
    tensors = {f"model.{i}": np.full(200_000 // np.dtype(kind).itemsize, i, kind) for i, kind in enumerate(kinds)}
    build_checkpoint(store, 1, world=1, tensors=tensors)
    monkeypatch.setattr(read_ahead, "NEAR_REQUEST", 256 << 10)
    asked: list[int] = []
    begin = read_ahead.ReadAhead._begin

    def spy(self: Any, wanted: Any) -> None:
        asked.extend(span.place for span in wanted)
        begin(self, wanted)

    monkeypatch.setattr(read_ahead.ReadAhead, "_begin", spy)
    state = open_checkpoint(store.root).state_dict()
    assert all(np.array_equal(state[name[6:]].numpy(), tensors[name]) for name in tensors)
    assert len(set(asked)) >= 4
    assert asked == sorted(asked)


def test_aliases_and_state_dict(store: PosixStore) -> None:
    tensors = some_tensors(1)
    build_checkpoint(store, 1, tensors=tensors, aliases={"model.lm_head.weight": "model.embed.weight"})
    checkpoint = open_checkpoint(store.root)
    assert checkpoint.tensors["model.lm_head.weight"] == checkpoint.tensors["model.embed.weight"]
    assert torch.equal(checkpoint.read("model.lm_head.weight"), checkpoint.read("model.embed.weight"))
    state = checkpoint.state_dict()
    assert list(state) == [*sorted(n[6:] for n in tensors if n.startswith("model.")), "lm_head.weight"]
    assert state["lm_head.weight"] is state["embed.weight"]
    assert set(checkpoint.state_dict(prefix="")) == {*tensors, "model.lm_head.weight"}
    assert set(checkpoint.state_dict(prefix="optim.")) == {"step"}
    with pytest.raises(IncompatibleState, match=r"model\."):
        checkpoint.state_dict(prefix="module.")


def test_names_and_boxes_that_are_not_there(store: PosixStore) -> None:
    build_checkpoint(store, 1)
    checkpoint = open_checkpoint(store.root)
    with pytest.raises(IncompatibleState, match=r"did you mean model\.head\.weight"):
        checkpoint.read("model.head.wieght")
    for box in (Box((0, 0), (38, 16)), Box((-1, 0), (2, 2)), Box((0,), (3,))):
        with pytest.raises(IncompatibleState, match="outside shape"):
            checkpoint.read_box("model.embed.weight", box)


# ---------------------------------------------------------------- damage


def test_a_flipped_bit_names_file_and_tensor_and_others_stay_readable(store: PosixStore) -> None:
    committed = build_checkpoint(store, 1, world=2, block=4096)
    path = shard_paths(store, committed)[1]
    flip(store, path, store.size(path) // 2)
    checkpoint = open_checkpoint(store.root)
    with pytest.raises(ShardError) as error:
        checkpoint.read("model.big")
    assert path in str(error.value)
    assert "model.big" in str(error.value)
    assert "rank 1" in str(error.value)
    assert bits(checkpoint.read("model.embed.weight")) == some_tensors(1)["model.embed.weight"].tobytes()
    # A part that does not touch the damage is given out.
    assert checkpoint.read_box("model.big", Box((0, 0), (350, 1000))).shape == (350, 1000)
    with pytest.raises(ShardError):
        checkpoint.state_dict()
    assert not checkpoint.verify(mode="full").ok
    assert checkpoint.verify().ok


def test_every_damaged_block_is_found_by_reading(store: PosixStore) -> None:
    array = np.random.default_rng(0).integers(0, 255, (64, 1024), dtype=np.uint8)
    committed = build_checkpoint(store, 1, world=2, tensors={"w": array}, cut="columns", block=4096)
    for path in shard_paths(store, committed):
        start = store.size(path) - array.size // 2
        for offset in range(start, store.size(path), 4096):
            flip(store, path, offset + 7)
            with pytest.raises(ShardError, match=path):
                open_checkpoint(store.root).read("w")
            flip(store, path, offset + 7)
    assert np.array_equal(open_checkpoint(store.root).read("w").numpy(), array)


def test_missing_swapped_and_truncated_shards(store: PosixStore) -> None:
    tensors = {"w": np.arange(64, dtype=np.float32).reshape(8, 8)}
    committed = build_checkpoint(store, 1, world=2, tensors=tensors)
    one, two = (Path(store.path_of(p)) for p in shard_paths(store, committed))
    step = f"{store.root}/{committed.folder}"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(ShardError, match="00000-of-00002"):
        open_checkpoint(step).read("w")
    one.write_bytes(first[:-1])
    with pytest.raises(ShardError, match=r"00000-of-00002.*rank 0"):
        open_checkpoint(step).read("w")
    one.unlink()
    with pytest.raises(ShardError, match=r"00000-of-00002.*missing"):
        open_checkpoint(step).read("w")


def test_a_manifest_that_contradicts_its_shards() -> None:
    """All digests are right, but the manifest promises other rows, another dtype, another save, or a huge tensor."""
    store = MemoryStore()
    honest = prepare(store, 1, tensors={"w": np.zeros((8, 4), np.float32)})

    def read(**changed: object) -> None:
        lie = (
            {"tensors": {"w": msgspec.structs.replace(honest.tensors["w"], **changed)}}
            if "save_id" not in changed
            else changed
        )
        manifest = msgspec.structs.replace(honest, **lie)  # type: ignore[arg-type]
        Checkpoint(store, Committed(1, 1, "unused"), manifest).read("w")

    read()
    for changed in ({"shape": [9, 4]}, {"shape": [8, 5]}, {"dtype": "int32"}, {"shape": [1 << 40, 1 << 18]}):
        with pytest.raises(ShardError, match=r"of rank 0.*in the manifest"):
            read(**changed)
    with pytest.raises(ShardError, match="mixed up"):
        read(save_id="another")


def test_shards_that_leave_a_hole_are_not_read() -> None:
    """Memory that nothing was read into must never be handed out."""
    store = MemoryStore()
    manifest = prepare(store, 1, tensors={"w": np.ones((8, 4), np.float32)})
    checkpoint = Checkpoint(store, Committed(1, 1, "unused"), manifest)
    checkpoint._index.open([0, 1])
    checkpoint._index._boxes[1] = {}
    with pytest.raises(ShardError, match=r"'w' exactly once: boxes cover 16 of 32"):
        checkpoint.read("w")
    assert checkpoint.read_box("w", Box((0, 0), (4, 4))).sum() == 16


# ---------------------------------------------------------------- the rest of a checkpoint


def test_everything_else_in_it(store: PosixStore) -> None:
    objects = {"scheduler": {"last": (1, 2.5), 3: {4, 5}}, "big": typed_json.Ref("model.big")}
    build_checkpoint(
        store,
        1200,
        generation=3,
        world=2,
        metrics={"loss": float("inf"), "acc": 0.5},
        objects=objects,
        rank_objects={"rng": lambda rank: (rank, b"state")},
        config={"layers": 3},
        epoch=2,
    )
    checkpoint = open_checkpoint(store.root)
    assert (checkpoint.step, checkpoint.epoch, checkpoint.generation, checkpoint.world_size) == (1200, 2, 3, 2)
    assert checkpoint.metrics == {"loss": float("inf"), "acc": 0.5}
    assert checkpoint.objects == objects
    assert checkpoint.config == {"layers": 3}
    assert checkpoint.format_version == (1, 0)
    assert [checkpoint.rank_objects(r) for r in (0, 1)] == [{"rng": (0, b"state")}, {"rng": (1, b"state")}]
    with pytest.raises(ConfigError, match="no rank 2"):
        checkpoint.rank_objects(2)
    assert checkpoint.verify(mode="full").ok


def test_reading_in_threads(store: PosixStore) -> None:
    from concurrent.futures import ThreadPoolExecutor

    tensors = some_tensors(1)
    build_checkpoint(store, 1, world=4, tensors=tensors, block=4096)
    checkpoint = open_checkpoint(store.root)
    with ThreadPoolExecutor(8) as pool:
        fqns = list(itertools.chain.from_iterable(itertools.repeat(list(tensors), 4)))
        for fqn, found in zip(fqns, pool.map(checkpoint.read, fqns), strict=True):
            assert bits(found) == tensors[fqn].tobytes()


def test_torch_and_numpy_are_imported_only_to_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = PosixStore(Path(folder) / "root")
        build_checkpoint(store, 1, rank_objects={"n": 1})
        script = (
            "import sys\n"
            "from distckpt.format.checkpoint import open_checkpoint, list_checkpoints\n"
            f"c = open_checkpoint({store.root!r}); c.tensors; c.objects; c.rank_objects(0); c.verify(mode='full')\n"
            f"list_checkpoints({store.root!r})\n"
            "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'\n"
            "c.read('model.mask')\n"
            "assert 'torch' in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
