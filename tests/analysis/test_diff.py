"""Differences of checkpoints: of any two formats, layouts and dtypes, with figures that are right, and what is read."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diff_support import FORMATS, by_name, flags_of, saved, weights, written

from distckpt import diff_checkpoints
from distckpt.analysis import diff as diffs
from distckpt.boxes import Box
from distckpt.errors import ConfigError, IncompatibleState, ShardError
from distckpt.export.stream import Stream
from distckpt.storage import open_store

UP = "model.layers.0.up.weight"


# ---------------------------------------------------------------- formats and layouts


@pytest.mark.parametrize(("one", "other"), itertools.combinations_with_replacement(FORMATS, 2))
def test_formats_against_one_another(tmp_path: Path, one: str, other: str) -> None:
    first, second = weights(), weights()
    a, b = written(tmp_path / "a", one, first), written(tmp_path / "b", other, second)
    same = diff_checkpoints(a, b)
    assert same.equal, same.summary
    assert (same.a.kind, same.b.kind, len(same.tensors)) == (one, other, 5)
    second[UP][3, 5] += 1.0
    found = diff_checkpoints(a, written(tmp_path / "c", other, second))
    assert [t.name for t in found.differing] == [UP]
    change = found.differing[0].change
    assert change is not None
    assert (change.changed, change.at) == (1, (3, 5))
    assert change.max_abs == pytest.approx(1.0)
    assert not found.equal


@pytest.fixture
def narrow_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Box, int]]:
    """Read in blocks of 16 KiB; returns (box, bytes) of every read."""
    reads: list[tuple[Box, int]] = []
    plain = Stream.fill

    def fill(self: Stream, box: Box, start: int, stop: int, view: memoryview) -> None:
        assert len(view) == stop - start
        reads.append((box, stop - start))
        plain(self, box, start, stop, view)

    monkeypatch.setattr(diffs, "BLOCK_BYTES", 16 << 10)
    monkeypatch.setattr(Stream, "fill", fill)
    return reads


LAYOUTS = [(1, "replicated"), (2, "rows"), (3, "columns"), (4, "columns")]


@pytest.mark.parametrize(("one", "other"), itertools.combinations(LAYOUTS, 2))
def test_layouts_are_compared_without_gathering(
    tmp_path: Path, narrow_reads: list[tuple[Box, int]], one: tuple[int, str], other: tuple[int, str]
) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((301, 97)).astype(np.float32)
    y = x.copy()
    y[200:210, ::3] *= 1.5
    y[300, 96] = -50
    a = saved(tmp_path / "a", {"model.w": x}, world=one[0], cut=one[1])
    b = saved(tmp_path / "b", {"model.w": y}, world=other[0], cut=other[1])
    found = diff_checkpoints(a, b, threads=1)
    change = found.tensors[0].change
    assert change is not None
    wide = y.astype(np.float64) - x
    assert change.changed == np.count_nonzero(wide)
    assert change.at == (300, 96)
    assert change.update_norm == pytest.approx(np.linalg.norm(wide))
    assert change.relative_update == pytest.approx(np.linalg.norm(wide) / np.linalg.norm(x.astype(np.float64)))
    assert found.relaid
    assert max(nbytes for _, nbytes in narrow_reads) <= 16 << 10
    assert sum(nbytes for _, nbytes in narrow_reads) == found.read_bytes
    assert found.read_bytes + found.skipped_bytes == 2 * x.nbytes
    layouts_alone = diff_checkpoints(a, saved(tmp_path / "c", {"model.w": x}, world=other[0], cut=other[1]))
    assert layouts_alone.equal
    assert layouts_alone.relaid


# ---------------------------------------------------------------- what is read


def test_equal_digests_are_not_read() -> None:
    store, block = open_store("memory://diff-digests"), 4096
    x = {f"model.{i}.w": np.arange(i, i + 64 * 1024, dtype=np.float32).reshape(64, 1024) for i in range(4)}
    y = {name: value.copy() for name, value in x.items()}
    y["model.3.w"][40, 7] = 0  # one block of 64, of the second rank's shard
    more = {"world": 2, "block": block}
    a, b = (saved("memory://diff-digests", t, step=s, **more) for s, t in ((1, x), (2, y)))  # type: ignore[arg-type]

    def read(one: str, other: str) -> int:
        before = store.counters["bytes_read"]
        diff_checkpoints(one, other)
        return store.counters["bytes_read"] - before

    found = diff_checkpoints(a, b)
    whole = 64 * 4096
    assert [t.how for t in found.tensors] == ["digests"] * 3 + ["values"]
    assert found.skipped == 3
    assert found.read_bytes == whole + block
    assert found.skipped_bytes == 7 * whole - block
    headers = (read(a, a) + read(b, b)) // 2  # and manifests: of tensors, nothing is read then
    assert read(a, b) == headers + whole + block
    change = by_name(found)["model.3.w"].change
    assert change is not None
    wide = y["model.3.w"].astype(np.float64)
    assert (change.changed, change.at, change.elements) == (1, (40, 7), 64 * 1024)
    assert change.norm_b == pytest.approx(np.linalg.norm(wide))
    assert change.norm_a == pytest.approx(np.linalg.norm(x["model.3.w"].astype(np.float64)))
    again = diff_checkpoints(a, a)
    assert (again.equal, again.read_bytes, again.skipped_bytes) == (True, 0, 8 * whole)


@pytest.mark.parametrize(("cut", "equal"), [("rows", "digests"), ("columns", "values")])
def test_digests_of_other_layouts_count_where_blocks_meet(tmp_path: Path, cut: str, equal: str) -> None:
    x = {"model.w": np.arange(64 * 1024, dtype=np.float32).reshape(64, 1024)}
    a = saved(tmp_path / "a", x, world=2, block=4096)
    b = saved(tmp_path / "b", x, world=4, cut=cut, block=4096)
    found = diff_checkpoints(a, b)
    assert (found.equal, found.tensors[0].how) == (True, equal)
    other = saved(tmp_path / "c", x, world=4, cut=cut, block=8192)
    assert diff_checkpoints(a, other).tensors[0].how == "values"


def test_damage_is_found_where_it_is_read(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", weights())
    b = saved(tmp_path / "b", weights(1))
    shard = next(Path(b).rglob("00000-of-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match="do not match their digest"):
        diff_checkpoints(a, b)


def peak_kib() -> int:
    """Return the most memory that was resident since it was last forgotten (proc(5), clear_refs)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    nbytes = 128 << 20  # more than what a busy process' allocator and thread pools may add by the way
    header = b'{"w":{"dtype":"BF16","shape":[2,%d],"data_offsets":[0,%d]}}' % (nbytes // 4, nbytes)
    for name, last in (("a", b"\0"), ("b", b"\1")):
        with open(tmp_path / f"{name}.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + nbytes - 1)
            file.seek(0, 2)
            file.write(last)
    saved(tmp_path / "small", weights())
    diff_checkpoints(tmp_path / "small", tmp_path / "a.safetensors", only=["layers.*"])  # imports what it needs
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = peak_kib()
    found = diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    change = found.tensors[0].change
    assert change is not None
    assert (change.changed, change.at, found.read_bytes) == (1, (1, nbytes // 4 - 1), 2 * nbytes)
    assert peak_kib() - before < 96 << 10


# ---------------------------------------------------------------- what differs


def test_names_shapes_and_dtypes(tmp_path: Path) -> None:
    x, y = weights(), weights()
    x["model.old"] = np.ones(3, np.float32)
    y["model.new"] = np.ones(3, np.float32)
    y[UP] = y[UP][:30]
    y["model.layers.0.up.bias"] = y["model.layers.0.up.bias"].astype(np.complex64)
    y["model.scale"] = y["model.scale"].astype(np.float32)
    found = diff_checkpoints(saved(tmp_path / "a", x), saved(tmp_path / "b", y))
    assert (found.only_a, found.only_b) == (("model.old",), ("model.new",))
    tensors = by_name(found)
    assert (tensors[UP].how, tensors[UP].shapes) == ("shape", ((40, 24), (30, 24)))
    assert tensors["model.layers.0.up.bias"].how == "dtype"
    assert tensors["model.scale"].dtypes == ("float64", "float32")
    assert tensors["model.empty"].relative_update == 0.0
    assert {t.name for t in found.differing} == {UP, "model.layers.0.up.bias", "model.scale"}
    assert not found.equal


def test_bfloat16_against_float32(tmp_path: Path) -> None:
    values = torch.randn(1000)
    half = values.bfloat16()
    bits = {"model.w": half.view(torch.uint16).numpy()}
    a = saved(tmp_path / "a", {"model.w": values.numpy()})
    for changed in (False, True):
        if changed:
            half[17] *= 2
        b = saved(tmp_path / f"b{changed}", bits, dtypes={"model.w": "bfloat16"})
        tensor = diff_checkpoints(a, b).tensors[0]
        assert tensor.dtypes == ("float32", "bfloat16")
        assert tensor.change is not None
        assert tensor.change.rounded is not changed
        assert changed or tensor.change.max_rel <= 2**-8
    assert tensor.change.at == (17,)
    assert not diff_checkpoints(a, b, rtol=0.01).equal
    assert diff_checkpoints(b, b, rtol=0.01).equal


def test_nan_infinities_and_signed_zero(tmp_path: Path) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, 1.0, 2.0], np.float32)
    y = np.array([np.nan, np.inf, -np.inf, -0.0, 1.0, 2.0], np.float32)
    y[0] = np.uint32(0x7FC00001).view(np.float32)  # another NaN
    a = saved(tmp_path / "a", {"model.w": x})
    same = diff_checkpoints(a, saved(tmp_path / "b", {"model.w": y}))
    assert same.equal
    y[4:] = np.nan, 3.0
    found = diff_checkpoints(a, saved(tmp_path / "c", {"model.w": y}))
    change = found.tensors[0].change
    assert change is not None
    assert (change.changed, change.beyond, change.nan, change.inf) == (2, 2, (1, 2), (2, 2))
    assert (change.max_abs, change.at) == (1.0, (5,))
    assert math.isnan(found.tensors[0].relative_update or 0)
    assert flags_of(found)["not-finite"] == ("model.w",)


def test_integers_beyond_doubles_and_dtypes_that_are_no_numbers(tmp_path: Path) -> None:
    x = {"model.n": np.array([2**60, 3], np.int64), "model.packed": np.array([1, 2, 3], np.uint8)}
    y = {"model.n": np.array([2**60 + 1, 3], np.int64), "model.packed": np.array([1, 9, 3], np.uint8)}
    kinds = {"model.packed": "float4_e2m1fn_x2"}
    found = diff_checkpoints(saved(tmp_path / "a", x, dtypes=kinds), saved(tmp_path / "b", y, dtypes=kinds))
    assert {name: t.change.changed for name, t in by_name(found).items() if t.change} == {
        "model.n": 1,
        "model.packed": 1,
    }
    assert len(found.differing) == 2


def test_tolerance(tmp_path: Path) -> None:
    x = np.array([0.0, 1.0, 100.0])
    a, b = (saved(tmp_path / n, {"model.w": v}) for n, v in (("a", x), ("b", x + np.array([1e-3, 1e-3, 0.5]))))
    beyond = [diff_checkpoints(a, b, **t).tensors[0].change for t in ({}, {"atol": 0.01}, {"rtol": 0.01}, {"atol": 1})]
    assert [c and c.beyond for c in beyond] == [3, 1, 1, 0]
    assert diff_checkpoints(a, b, atol=1).equal
    assert diff_checkpoints(a, b, atol=0.002, rtol=0.01).equal
    with pytest.raises(ConfigError, match="not negative"):
        diff_checkpoints(a, b, atol=-1)


def test_tied_names_are_compared_once_and_lost_ties_told(tmp_path: Path) -> None:
    x = {"model.embed": np.ones((4, 2), np.float32)}
    tied = saved(tmp_path / "a", x, aliases={"model.head": "model.embed"})
    apart = saved(tmp_path / "b", x | {"model.head": np.ones((4, 2), np.float32)})
    found = diff_checkpoints(tied, apart)
    assert (found.equal, found.ties, len(found.tensors)) == (True, ("model.head",), 2)
    moved = saved(tmp_path / "c", x | {"model.head": np.zeros((4, 2), np.float32)})
    assert [t.name for t in diff_checkpoints(tied, moved).differing] == ["model.head"]
    assert len(diff_checkpoints(tied, tied).tensors) == 1


def test_selections(tmp_path: Path) -> None:
    x, y = weights(), weights(1)
    average = {name.replace("model.", "ema."): value for name, value in y.items()}
    a = saved(tmp_path / "a", x | average, metrics={"loss": 1.0})
    found = diff_checkpoints(a, a, prefix_b="ema.")
    assert (len(found.tensors), len(found.differing), found.values) == (5, 4, ())
    b = saved(tmp_path / "b", x, metrics={"loss": 2.0})
    assert len(diff_checkpoints(a, b).only_a) == 5
    assert diff_checkpoints(a, b, weights=True).equal
    assert [t.name for t in diff_checkpoints(a, b, only=["layers.0.*.weight"]).tensors] == [UP]
    with pytest.raises(ConfigError, match="neither checkpoint has"):
        diff_checkpoints(a, b, only=["nothing*"])
    with pytest.raises(IncompatibleState, match="no tensor's name starts with"):
        diff_checkpoints(a, b, prefix_a="other.")


# ---------------------------------------------------------------- other values


def test_values_by_section(tmp_path: Path) -> None:
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["w"]}]
    state = {"last_epoch": 3, "history": list(range(40)), "gone": 1, "best": float("nan")}
    more = {"metrics": {"loss": 1.0}, "config": {"width": 8, "act": "relu"}, "epoch": 1}
    a = saved(tmp_path / "a", weights(), **more, objects={"optim.param_groups": groups, "scheduler": state})
    groups = [{"lr": 0.2, "betas": (0.9, 0.99), "params": ["w"]}]
    state = {"last_epoch": 4, "history": [9, *range(1, 40)], "best": float("nan"), "new": True}
    more = {"metrics": {"loss": 0.5}, "config": {"width": 8, "act": "gelu"}, "epoch": 1}
    b = saved(tmp_path / "b", weights(), **more, objects={"optim.param_groups": groups, "scheduler": state})
    found = {(v.section, v.path): (v.a, v.b) for v in diff_checkpoints(a, b).values}
    assert found == {
        ("metrics", "loss"): ("1.0", "0.5"),
        ("config", "act"): ("'relu'", "'gelu'"),
        ("optimizer", "param_groups[0].lr"): ("0.1", "0.2"),
        ("state", "scheduler.last_epoch"): ("3", "4"),
        ("state", "scheduler.history"): ("40 items", "40 items, 1 of them differ"),
        ("state", "scheduler.gone"): ("1", None),
        ("state", "scheduler.new"): (None, "True"),
    }


def test_rng_of_each_rank(tmp_path: Path) -> None:
    def rng(shift: int) -> dict[str, object]:
        return {"rng": lambda rank: {"torch": bytes([rank + shift]) * 100, "numpy": {"pos": 4}}}

    a = saved(tmp_path / "a", weights(), world=3, rank_objects=rng(0))
    assert diff_checkpoints(a, a).equal
    moved = diff_checkpoints(a, saved(tmp_path / "b", weights(), world=3, rank_objects=rng(7)))
    assert [(v.section, v.path, v.ranks) for v in moved.values] == [("rng", "rng.torch", (0, 1, 2))]
    assert not moved.flags
    swapped = diff_checkpoints(a, saved(tmp_path / "c", weights(), world=3, rank_objects=rng(1)))
    assert [flag.text for flag in swapped.flags if flag.kind == "rng-moved"] == [
        "ranks of B have other ranks' random number states of A: rank 0 what rank 1 had, rank 1 what rank 2 had"
    ]
    fewer = diff_checkpoints(a, saved(tmp_path / "d", weights(), world=2, rank_objects=rng(0)))
    assert fewer.equal
    assert "3 ranks against 2" in fewer.notes[0]
    none = diff_checkpoints(a, saved(tmp_path / "e", weights(), world=3))
    assert [(v.path, v.b) for v in none.values] == [("rng", None)]


def test_what_a_format_has_no_place_for_is_noted(tmp_path: Path) -> None:
    more = {"optim.state.layers.0.up.bias.exp_avg": np.ones(40, np.float32)}
    a = saved(tmp_path / "a", weights() | more, metrics={"loss": 1.0})
    found = diff_checkpoints(a, written(tmp_path / "b", "huggingface", weights()))
    assert found.equal
    assert any("optim.*: 1 tensors" in note for note in found.notes)
    assert any(note.startswith("checkpoint, metrics: not compared") for note in found.notes)
    same_kind = diff_checkpoints(a, saved(tmp_path / "c", weights(), metrics={"loss": 1.0}))
    assert same_kind.only_a == tuple(more)
    assert not same_kind.equal
