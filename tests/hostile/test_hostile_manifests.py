"""Manifests that are damaged, or made wrong on purpose behind a right digest: each is refused by a named error."""

from __future__ import annotations

import contextlib
import copy
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import ManifestError, UnsupportedVersion
from distckpt.format.digest import digest
from distckpt.format.manifest import decode_manifest

Plain = dict[str, Any]
MEMORY = 64 << 20
ATTEMPT = "g000000-00000000"


def honest() -> Plain:
    """Return a small manifest's body: two ranks, a cut tensor, a tensor with explicit boxes, an alias."""
    return {
        "format": "distckpt",
        "version": [1, 0],
        "step": 5,
        "epoch": 1,
        "time": "t",
        "generation": 0,
        "attempt": ATTEMPT,
        "save_id": "s",
        "world_size": 2,
        "engine": "torch",
        "meshes": [{"shape": [2], "ranks": [[0, 2]]}],
        "tensors": {
            "w": {"dtype": "int8", "shape": [4, 2], "mesh": 0, "placements": ["S(1)"]},
            "x": {
                "dtype": "int8",
                "shape": [4, 2],
                "mesh": 0,
                "placements": ["E"],
                "boxes": [[[[0, 0], [2, 2]]], [[[2, 0], [2, 1]], [[2, 1], [2, 1]]]],
            },
        },
        "aliases": {"t": "w"},
        "objects": {},
        "per_rank": ["rng"],
        "metrics": {},
        "config": None,
        "provenance": None,
        "software": {},
        "shards": [
            {"path": f"{ATTEMPT}/0000{i}-of-00002.safetensors", "size": 9, "header": "0" * 32} for i in range(2)
        ],
    }


def framed(body: bytes) -> bytes:
    return b'{"digest":"xxh3-128:' + digest(body).encode() + b'","body":' + body + b"}\n"


def written(plain: Any) -> bytes:
    return framed(json.dumps(plain, separators=(",", ":")).encode())


def refused(data: bytes, match: str) -> None:
    """Assert the error, the file's name in it, that it is short, and that little memory was taken."""
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError, match=match) as caught:
            decode_manifest(data, where="step-5/manifest", step=5, generation=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("step-5/manifest: ")
    assert len(str(caught.value)) < 1000
    assert peak < MEMORY


def test_the_honest_manifest_is_accepted() -> None:
    found = decode_manifest(written(honest()), where="m", step=5, generation=0)
    assert sorted(found.tensors) == ["w", "x"]


def test_every_flipped_bit_is_refused() -> None:
    data = bytearray(written(honest()))
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(ManifestError, match=r"^m: "):
                decode_manifest(bytes(data), where="m")
            data[at] ^= 1 << bit


def test_every_truncation_is_refused() -> None:
    data = written(honest())
    for kept in range(len(data)):
        with pytest.raises(ManifestError, match=r"^m: "):
            decode_manifest(data[:kept], where="m")


def test_anything_added_is_refused() -> None:
    data = written(honest())
    for extra in (b"\n", b"\0", b"}\n", b" ", data):
        refused(data + extra, "framed|digest")
        refused(extra + data, "framed|digest")


def test_other_algorithms_and_lengths_of_digest() -> None:
    body = json.dumps(honest()).encode()
    for stated in (
        b"sha256:" + b"0" * 64,
        b"xxh3-128:" + digest(body).upper().encode(),
        b"xxh3-128:" + digest(body)[:-1].encode(),
        b"xxh3-128:" + digest(body).encode() + b"0",
        b"xxh3-128:" + b"0" * 32,
        b"xxh3-128:",
        b"",
    ):
        refused(b'{"digest":"' + stated + b'","body":' + body + b"}\n", "framed|digest")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "JSON"),
        (b"null", "no manifest"),
        (b"[]", "no manifest"),
        (b"{}", "no manifest"),
        (b'{"format":"zip"}', "no manifest"),
        (b'{"format":"distckpt"}', "version"),
        (b'{"format":"distckpt","version":[0,1]}', "version"),
        (b'{"format":"distckpt","version":[1]}', "version"),
        (b'{"format":"distckpt","version":[true,0]}', "version"),
        (b'{"format":"distckpt","version":"1.0"}', "version"),
        (b'{"format":"distckpt","version":[1,0]}', "missing required field"),
        (b'{"format":"distckpt","format":"distckpt","version":[1,0]}', "stands twice"),
        (b"[" * 10_000 + b"]" * 10_000, "deep"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "deep"),
        (b"[" * 201 + b"]" * 201, "deep"),
        (b"[" * 1_000_000, "deep|JSON"),
        (b'{"a":1e999}', "overflows"),
        (b'{"a":-1e999}', "overflows"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":Infinity}', "Infinity"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":' + b"9" * 400 + b"}", "digits"),
        (b'{"a":' + b"9" * 1_000_000 + b"}", "digits|JSON"),
        (b'{"a":"\xff"}', "UTF-8"),
        (b'{"a":"\\ud800"}', "UTF-8"),
        (b"{} {}", "JSON"),
        (b'{"a":1}x', "JSON"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_manifest(body: bytes, match: str) -> None:
    refused(framed(body), match)


def test_a_key_twice_at_any_depth() -> None:
    text = json.dumps(honest(), separators=(",", ":"))
    for once in ('"step":5', '"dtype":"int8"', '"size":9', '"w":', '"shape":[2]'):
        at = text.index(once)
        twice = text[:at] + once + ("{}," if once.endswith(":") else ",") + text[at:]
        refused(framed(twice.encode()), "stands twice")


def _set(*path: Any) -> Callable[[Plain], None]:
    """Return a change that puts the last argument at the path of the others."""
    *steps, last, value = path

    def change(plain: Plain) -> None:
        target: Any = plain
        for step in steps:
            target = target[step]
        target[last] = value

    return change


def _tensor(**fields: Any) -> Callable[[Plain], None]:
    return lambda plain: plain["tensors"]["w"].update(fields)


def _boxes(*boxes: Any) -> Callable[[Plain], None]:
    """Give rank 0 these boxes of ``x`` and rank 1 none."""
    return _set("tensors", "x", "boxes", [list(boxes), []])


def _path(path: Any) -> Callable[[Plain], None]:
    return _set("shards", 1, "path", path)


def _named(name: str) -> Callable[[Plain], None]:
    return lambda plain: plain["tensors"].update({name: plain["tensors"].pop("w")}) or plain["aliases"].clear()


def _worlds(world: int) -> Callable[[Plain], None]:
    return lambda plain: plain.update(world_size=world, shards=plain["shards"][:1])


NAME = "00001-of-00002.safetensors"
ATTACKS: dict[str, tuple[Callable[[Plain], None], str]] = {
    "step negative": (_set("step", -1), r"`\$\.step`"),
    "step as text": (_set("step", "5"), "got `str`"),
    "step bool": (_set("step", True), "got `bool`"),
    "step float": (_set("step", 5.0), "got `float`"),
    "step null": (_set("step", None), "got `null`"),
    "step of 39 digits": (_set("step", 10**38), "Expected `int` <="),
    "step of another folder": (_set("step", 6), "name says 5"),
    "generation of another name": (_set("generation", 1), "attempt"),
    "epoch as text": (_set("epoch", "1"), "epoch"),
    "epoch huge": (_set("epoch", 1e300), "epoch"),
    "epoch a huge int": (_set("epoch", -(10**38)), "epoch"),
    "no step": (lambda plain: plain.pop("step"), "missing required field `step`"),
    "attempt of another generation": (_set("attempt", "g000001-00000000"), "attempt"),
    "attempt a path": (_set("attempt", "../.."), "attempt"),
    "attempt empty": (_set("attempt", ""), "attempt"),
    "save id of a megabyte": (_set("save_id", "x" * (1 << 20)), "save_id"),
    "engine no string": (_set("engine", ["torch"]), "engine"),
    "signature no string": (_set("signature", 1), "signature"),
    "world 0": (_set("world_size", 0), "world_size"),
    "world of billions": (_worlds(1 << 40), "world_size"),
    "world larger than its shards": (_set("world_size", 3), "shards has 2 entries for 3"),
    "a shard too few": (_set("shards", []), "shards has 0"),
    "meshes an object": (_set("meshes", {}), "Expected `array`"),
    "mesh too large": (_set("meshes", 0, "shape", [1 << 40]), "2 ranks for shape"),
    "mesh overflow": (_set("meshes", 0, "shape", [1 << 62] * 64), "2 ranks for shape"),
    "mesh of 65 dimensions": (_set("meshes", 0, "shape", [1] * 65), "dimensions"),
    "mesh with a zero": (_set("meshes", 0, "shape", [0]), "none of them 0"),
    "mesh rank beyond the world": (_set("meshes", 0, "ranks", [[0, 3]]), "run"),
    "mesh rank far beyond": (_set("meshes", 0, "ranks", [[0, 1 << 62]]), "run"),
    "mesh rank twice": (_set("meshes", 0, "ranks", [[0, 1], [0, 1]]), "rank 0 twice"),
    "mesh run empty": (_set("meshes", 0, "ranks", [[0, 2], [1, 1]]), "run"),
    "mesh run reversed": (_set("meshes", 0, "ranks", [[2, 0]]), "run"),
    "mesh run of one number": (_set("meshes", 0, "ranks", [[0]]), "run"),
    "mesh run empty list": (_set("meshes", 0, "ranks", [[]]), "run"),
    "mesh run of three": (_set("meshes", 0, "ranks", [[0, 1, 2]]), "run"),
    "mesh rank bool": (_set("meshes", 0, "ranks", [[False, True]]), "got `bool`"),
    "mesh index": (_tensor(mesh=1), "mesh is 1"),
    "mesh index negative": (_tensor(mesh=-1), "mesh"),
    "dtype unknown": (_tensor(dtype="float128"), "dtype"),
    "dtype of a megabyte": (_tensor(dtype="f" * (1 << 20)), "dtype"),
    "shape overflows": (_tensor(shape=[1 << 31, 1 << 31]), r"2\*\*62"),
    "shape wraps to zero": (_tensor(shape=[1 << 62, 4]), r"2\*\*62"),
    "shape overflows in bytes": (_tensor(shape=[1 << 61], dtype="float32", placements=["R"]), r"2\*\*62"),
    "shape negative": (_tensor(shape=[-4, 2]), "shape"),
    "shape bool": (_tensor(shape=[True, 2]), "got `bool`"),
    "shape of text": (_tensor(shape="42"), "Expected `array`"),
    "5,000 dimensions": (_tensor(shape=[0] * 5000), "5000 dimensions"),
    "no placement": (_tensor(placements=[]), "0 entries"),
    "a placement too many": (_tensor(placements=["R", "R"]), "2 entries"),
    "placement unknown": (_tensor(placements=["P"]), "unknown placement"),
    "placement of another dimension": (_tensor(placements=["S(2)"]), "dimension 2"),
    "placement negative": (_tensor(placements=["S(-1)"]), "unknown placement"),
    "placement in other digits": (_tensor(placements=["S(\u0661)"]), "unknown placement"),
    "placement with a line feed": (_tensor(placements=["S(1)\n"]), "unknown placement"),
    "placement strided by 0": (_tensor(placements=["SS(0,0)"]), "unknown placement"),
    "placement strided by far too much": (_tensor(placements=["SS(0,9999999)"]), "unknown placement"),
    "placement of a megabyte": (_tensor(placements=["S" * (1 << 20)]), "unknown placement"),
    "placement no string": (_tensor(placements=[0]), "Expected `str`"),
    "E without boxes": (_tensor(placements=["E"]), "0 of the mesh's 2"),
    "E beside another": (_tensor(placements=["E", "E"]), "entries|alone"),
    "boxes without E": (_set("tensors", "x", "placements", ["R"]), 'go with'),
    "boxes of too few ranks": (_set("tensors", "x", "boxes", [[[[0, 0], [4, 2]]]]), "1 of the mesh's 2"),
    "boxes overlap": (_boxes([[0, 0], [3, 2]], [[2, 0], [2, 2]]), "overlap"),
    "box twice": (_boxes([[0, 0], [4, 2]], [[0, 0], [4, 2]]), "overlap"),
    "boxes leave a gap": (_boxes([[0, 0], [3, 2]]), "6 of 8"),
    "no boxes": (_boxes(), "0 of 8"),
    "box outside": (_boxes([[0, 0], [4, 3]]), "outside shape"),
    "box far outside": (_boxes([[1 << 62, 0], [1 << 62, 2]]), "outside shape"),
    "box negative": (_boxes([[-1, 0], [5, 2]]), "boxes"),
    "empty box outside": (_boxes([[0, 0], [4, 2]], [[5, 0], [0, 2]]), "outside shape"),
    "box in one dimension": (_boxes([[0], [8]]), "2 dimensions"),
    "box without sizes": (_boxes([[0, 0]]), "2 dimensions"),
    "box of three lists": (_boxes([[0, 0], [4, 2], [0, 0]]), "2 dimensions"),
    "box of floats": (_boxes([[0, 0], [4.0, 2]]), "got `float`"),
    "alias to nothing": (_set("aliases", "t", "nowhere"), "no stored tensor"),
    "alias to an alias": (_set("aliases", "u", "t"), "no stored tensor"),
    "alias to itself": (_set("aliases", "u", "u"), "no stored tensor"),
    "alias hides a tensor": (_set("aliases", "x", "w"), "stored tensor too"),
    "alias with an empty name": (_set("aliases", "", "w"), "empty"),
    "alias with NUL": (_set("aliases", "a\0", "w"), "NUL"),
    "tensor without a name": (_named(""), "empty"),
    "tensor name with NUL": (_named("a\0b"), "NUL"),
    "tensor name with a line break": (_named("a\nb"), "line break"),
    "tensor name reserved": (_named("__metadata__"), "reserved"),
    "tensor name of a megabyte": (_named("x" * (1 << 20)), "bytes"),
    "object per rank twice": (_set("per_rank", ["rng", "rng"]), "twice"),
    "objects a list": (_set("objects", []), "Expected `object`"),
    "software no strings": (_set("software", {"torch": 2}), "Expected `str`"),
    "path absolute": (_path("/" + NAME), "path"),
    "path with ..": (_path(f"../{NAME}"), "path"),
    "path with .. inside": (_path(f"{ATTEMPT}/../{NAME}"), "path"),
    "path with .": (_path(f"./{NAME}"), "path"),
    "path empty": (_path(""), "path"),
    "path with backslash": (_path(f"{ATTEMPT}\\{NAME}"), "path"),
    "path with a drive": (_path(f"C:/{NAME}"), "path"),
    "path with NUL": (_path(f"{ATTEMPT}/{NAME}\0"), "path"),
    "path with a line feed": (_path(f"{ATTEMPT}/{NAME}\n"), "path"),
    "path too long": (_path(f"{ATTEMPT}/{'x' * 256}"), "path"),
    "path of a megabyte": (_path("x/" * (1 << 19)), "path"),
    "path a device": (_path(f"{ATTEMPT}/con.safetensors"), "path"),
    "path no string": (_path(None), "path"),
    "path in no attempt": (_path(NAME), "attempt's folder"),
    "path in another folder": (_path(f"evaluations/{NAME}"), "attempt's folder"),
    "path two folders deep": (_path(f"{ATTEMPT}/deeper/{NAME}"), "not the shard"),
    "path the folder itself": (_path(ATTEMPT), "not the shard"),
    "path of a strange file": (_path(f"{ATTEMPT}/model.pt"), "not the shard"),
    "path of another rank": (_path(f"{ATTEMPT}/00000-of-00002.safetensors"), "not the shard"),
    "path differing in case only": (_path(f"{ATTEMPT}/00000-OF-00002.safetensors"), "not the shard"),
    "path of another world": (_path(f"{ATTEMPT}/00001-of-00003.safetensors"), "not the shard"),
    "size negative": (_set("shards", 0, "size", -1), "size"),
    "size beyond 2^62": (_set("shards", 0, "size", 1 << 62), "size"),
    "size bool": (_set("shards", 0, "size", True), "got `bool`"),
    "digest too short": (_set("shards", 0, "header", "0" * 31), "digest"),
    "digest of another kind": (_set("shards", 0, "header", "sha256:" + "0" * 64), "digest"),
    "digest in capitals": (_set("shards", 0, "header", "A" * 32), "digest"),
    "digest null": (_set("shards", 0, "header", None), "header"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str) -> None:
    change, match = ATTACKS[name]
    plain = honest()
    change(plain)
    refused(written(plain), match)


@pytest.mark.parametrize("name", ["../x", "/x", "C:\\x", "..", "a/b", "con", "x" * 65536])
def test_names_like_paths_are_names(name: str) -> None:
    """Tensor names are never made into paths, so these are accepted, as they are."""
    plain = honest()
    _named(name)(plain)
    assert name in decode_manifest(written(plain), where="m").tensors


def test_a_newer_major_version() -> None:
    with pytest.raises(UnsupportedVersion, match=r"^m: .*upgrade"):
        decode_manifest(written(honest() | {"version": [3, 0]}), where="m")


def test_many_explicit_boxes_are_checked_without_comparing_all_pairs() -> None:
    """Cuts along the last dimension, where a sweep over the first would compare every two boxes."""
    count = 20_000
    plain = honest()
    boxes = [[[0, i], [8, 1]] for i in range(count)]
    plain["tensors"]["x"] |= {"shape": [8, count], "boxes": [boxes[::2], boxes[1::2]]}
    decode_manifest(written(plain), where="m")
    plain["tensors"]["x"]["boxes"][0][7][0][1] -= 1
    refused(written(plain), "overlap")


def test_many_small_wrong_entries() -> None:
    """Types are checked as a whole before meaning is; a wrong list costs what its JSON costs, and no more."""
    plain = honest()
    plain["tensors"] = {f"t{i}": [] for i in range(100_000)}
    refused(written(plain), "Expected `object`")
    plain = honest()
    plain["shards"] = plain["shards"] * 50_000
    refused(written(plain), "shards has 100000 entries")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(sorted(honest())),
)
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_is_a_named_error_or_harmless(value: Any, field: str) -> None:
    plain = copy.deepcopy(honest())
    plain[field] = value
    with contextlib.suppress(ManifestError, UnsupportedVersion):
        decode_manifest(written(plain), where="m", step=5, generation=0)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_behind_a_right_digest_is_a_named_error_or_harmless(data: st.DataObject) -> None:
    body = bytearray(json.dumps(honest(), separators=(",", ":")).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with contextlib.suppress(ManifestError, UnsupportedVersion):
        decode_manifest(framed(bytes(body)), where="m")
