"""Manifests: round trip, the frame that any language can check, and refusal to write what can't be read."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import ManifestError, UnserializableState, UnsupportedVersion
from distckpt.format import manifest as manifest_module
from distckpt.format import manifest_checks
from distckpt.format.digest import digest
from distckpt.format.manifest import (
    Manifest,
    MeshEntry,
    ShardEntry,
    TensorEntry,
    decode_manifest,
    encode_manifest,
)
from distckpt.format.plain_json import canonical

ATTEMPT = "g000003-1a2b3c4d"


def manifest(**changed: Any) -> Manifest:
    """Return a manifest of four ranks with each kind of layout."""
    fields: dict[str, Any] = {
        "step": 1200,
        "epoch": 2.5,
        "time": "2026-01-02T03:04:05Z",
        "generation": 3,
        "attempt": ATTEMPT,
        "save_id": "3-1200-abc",
        "world_size": 4,
        "engine": "torch",
        "meshes": [MeshEntry(shape=[2, 2], ranks=[[0, 4]]), MeshEntry(shape=[3], ranks=[[2, 4], [0, 1]])],
        "tensors": {
            "model.w": TensorEntry(dtype="float32", shape=[8, 4], mesh=0, placements=["SS(0,2)", "S(0)"]),
            "model.b": TensorEntry(dtype="bfloat16", shape=[], mesh=0, placements=["R", "R"]),
            "optim.flat": TensorEntry(
                dtype="float64",
                shape=[3, 2],
                mesh=1,
                placements=["E"],
                boxes=[[[[0, 0], [1, 2]], [[1, 0], [1, 1]]], [], [[[1, 1], [1, 1]], [[2, 0], [1, 2]]]],
            ),
        },
        "aliases": {"model.head": "model.w"},
        "objects": {"scheduler": {"last": [1, 2], "näme": None}},
        "per_rank": ["rng"],
        "metrics": {"loss": 0.25},
        "config": {"lr": 1e-3},
        "provenance": None,
        "software": {"torch": "2.13.0"},
        "shards": [
            ShardEntry(path=f"{ATTEMPT}/0000{i}-of-00004.safetensors", size=4096 + i, header=digest(b"%d" % i))
            for i in range(4)
        ],
    }
    return Manifest(**fields | changed)


def test_round_trip() -> None:
    data = encode_manifest(manifest())
    assert decode_manifest(data, where="m", step=1200, generation=3) == manifest()
    assert encode_manifest(decode_manifest(data, where="m")) == data


def test_any_language_can_check_the_frame() -> None:
    """The digest stands at a fixed place and covers a slice; the whole is JSON and the body is canonical."""
    data = encode_manifest(manifest())
    assert data[:20] == b'{"digest":"xxh3-128:'
    assert data[52:61] == b'","body":'
    body = data[61:-2]
    assert data[20:52].decode() == digest(body)
    assert data[-2:] == b"}\n"
    plain = json.loads(data)["body"]
    assert plain["version"] == [1, 0]
    assert plain["format"] == "distckpt"
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert text.encode() == body


@given(
    step=st.integers(0, 2**62),
    epoch=st.none() | st.integers(-10, 2**61) | st.floats(-1e9, 1e9),
    metrics=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), st.floats(-1e300, 1e300)),
    config=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**64), 2**64),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    ),
)
@settings(max_examples=60, deadline=None)
def test_values_survive(step: int, epoch: float | None, metrics: dict[str, float], config: Any) -> None:
    before = manifest(step=step, epoch=epoch, metrics=metrics, config=config)
    after = decode_manifest(encode_manifest(before), where="m", step=step)
    assert after == before
    assert type(after.epoch) is type(epoch)


@settings(max_examples=60)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 2**40), max_size=3), max_size=5))
def test_tensors_are_written_as_the_rest_of_the_body_is(shapes: dict[str, list[int]]) -> None:
    tensors = {n: TensorEntry(dtype="int8", shape=s, mesh=0, placements=["R", "R"]) for n, s in shapes.items()}
    try:
        data = encode_manifest(manifest(tensors=tensors, aliases={}, config={"tensors": {}, "a": {"tensors": {}}}))
    except ManifestError:  # a name or size that no tensor may have
        return
    body = json.loads(data)["body"]
    assert canonical(body) in data
    assert decode_manifest(data, where="here").tensors == tensors


def test_tensors_that_are_read_at_once_are_those_that_are_read_strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_manifest(manifest())
    body = data[data.index(b'"body":') + 7 : -2]
    rest, _, tensors = manifest_module._split(body)
    assert tensors == manifest().tensors
    assert b"float64" not in rest
    monkeypatch.setattr(manifest_module, "_split", lambda body: None)
    manifest_module._parsed.clear()
    assert decode_manifest(data, where="here") == manifest()


@pytest.mark.parametrize(
    "spoil",
    [
        (b'"dtype":"bfloat16"', b'"dtype":"int8","dtype":"bfloat16"'),
        (b'"boxes":null,"dtype":"bfloat16"', b'"dtype":"int8","dtype":"bfloat16"'),
        (b'"boxes":null,"dtype":"bfloat16"', b'"boxes":null,"boxes":null,"dtype":"bfloat16"'),
        (
            b'"model.b":{',
            b'"model.b":{"boxes":null,"dtype":"int8","mesh":0,"placements":["R","R"],"shape":[]},"model.b":{',
        ),
        (b'"model.b":{', b'"model.\\u0062":{'),
        (b'"model.b":{', b'"model.b" :{'),
    ],
)
def test_what_may_hide_a_key_twice_is_not_read_at_once(spoil: tuple[bytes, bytes]) -> None:
    data = encode_manifest(manifest())
    body = data[data.index(b'"body":') + 7 : -2]
    assert spoil[0] in body
    assert manifest_module._split(body) is not None
    assert manifest_module._split(body.replace(*spoil)) is None


def test_tensors_of_a_run_are_checked_once_for_the_same_meshes(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    real = manifest_checks._tensor_problem

    def counting(found: Manifest) -> str | None:
        checked.append(found.step)
        return real(found)

    monkeypatch.setattr(manifest_checks, "_tensor_problem", counting)
    manifest_module._parsed.clear()
    manifest_module._tables.clear()
    for step in (1, 2, 3):
        data = encode_manifest(manifest(step=step))
        assert decode_manifest(data, where="here").tensors == manifest().tensors
    assert checked == [1]
    meshes = manifest().meshes
    wrong = [msgspec.structs.replace(mesh, shape=[*mesh.shape, 1]) for mesh in meshes]
    with pytest.raises(ManifestError, match="placements"):  # the same tensors mean nothing on other meshes
        encode_manifest(manifest(step=4, meshes=wrong))
    encode_manifest(manifest(step=5))
    assert checked == [1, 4]


def test_one_shard_may_hold_a_whole_world() -> None:
    shard = ShardEntry(path=f"{ATTEMPT}/00000-of-00001.safetensors", size=4096, header="0" * 32)
    decode_manifest(encode_manifest(manifest(shards=[shard])), where="m")


def test_a_reader_of_today_reads_later_minor_versions() -> None:
    later = msgspec.to_builtins(manifest()) | {"version": [1, 7], "comment": {"new": [1]}}
    later["tensors"]["model.w"] |= {"quantized": None}
    found = decode_manifest(framed(later), where="m")
    assert found.tensors == manifest().tensors
    assert found.version == (1, 7)


def test_a_later_major_version_says_what_to_do() -> None:
    later = {"format": "distckpt", "version": [3, 1], "everything": "else"}
    with pytest.raises(UnsupportedVersion, match=r"m: \$: written in format 3\.1.*reads up to 2\.x.*upgrade"):
        decode_manifest(framed(later), where="m")


def framed(plain: Any) -> bytes:
    """Return plain JSON in a frame whose digest is right."""
    body = json.dumps(plain).encode()
    return b'{"digest":"xxh3-128:' + digest(body).encode() + b'","body":' + body + b"}\n"


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"generation": 4}, "attempt"),
        ({"world_size": 5}, "shards has 4 entries for 5 ranks"),
        ({"step": -1}, r"\$\.step"),
        ({"step": True}, "got `bool`"),
        ({"aliases": {"a": "nowhere"}}, "no stored tensor"),
        ({"tensors": {"w": TensorEntry(dtype="quint8", shape=[1], mesh=0, placements=["R", "R"])}}, "dtype"),
    ],
)
def test_what_can_not_be_read_is_not_written(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        encode_manifest(manifest(**changed))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1j, object(), "\ud800", {1: "int key", "a": 0}])
def test_what_is_no_plain_json_is_not_written(value: Any) -> None:
    with pytest.raises(UnserializableState, match=r"step 1200.*typed_json"):
        encode_manifest(manifest(config=value))


def test_the_size_cap_holds_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_manifest(manifest())
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST", len(data) - 1)
    with pytest.raises(ManifestError, match=rf"m: {len(data)} bytes"):
        decode_manifest(data, where="m")
    monkeypatch.setattr(manifest_module, "_MAX_BODY", 100)
    with pytest.raises(ManifestError, match="more than the 100"):
        encode_manifest(manifest(step=1201))  # bytes not checked before


def test_a_moved_manifest_is_refused() -> None:
    data = encode_manifest(manifest())
    with pytest.raises(ManifestError, match=r"m: \$\.step is 1200.*says 1300"):
        decode_manifest(data, where="m", step=1300)
    with pytest.raises(ManifestError, match=r"m: \$\.generation is 3.*says 4"):
        decode_manifest(data, where="m", generation=4)
