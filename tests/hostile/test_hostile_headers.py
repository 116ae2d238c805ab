"""Shard headers that someone made wrong on purpose: each is refused by a named error, and cheaply."""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.boxes import Box
from distckpt.errors import DistckptError, ShardError, UnsupportedVersion
from distckpt.format.placing import Piece
from distckpt.format.shard import plan_shard, render_header
from distckpt.format.shard_header import parse_header

Header = dict[str, Any]
MEMORY = 64 << 20


def honest() -> tuple[bytes, int]:
    """Return (header, file size) of a small shard: a cut matrix, a second box of it, a complex scalar, an empty."""
    pieces = [
        Piece("m", "float32", (4, 6), Box((0, 0), (2, 6))),
        Piece("m", "float32", (4, 6), Box((2, 0), (2, 3))),
        Piece("c", "complex128", (), Box((), ())),
        Piece("e", "int8", (0, 3), Box((0, 0), (0, 3))),
    ]
    plan = plan_shard(pieces, rank=1, world_size=2, save_id="s", objects={"rng": [1]}, block=4096)
    return render_header(plan, [["0" * 32]] * 3 + [[]]), plan.size


def taken_apart() -> tuple[Header, Header]:
    """Return the outer header and our own metadata in it, to be changed."""
    outer = json.loads(honest()[0][8:])
    return outer, json.loads(outer["__metadata__"]["distckpt"])


def framed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def put_together(outer: Header, ours: Header) -> tuple[bytes, int]:
    """Return (header, file size), the size being right for where the last tensor ends."""
    outer["__metadata__"]["distckpt"] = json.dumps(ours)
    header = framed(json.dumps(outer).encode())
    found = [v["data_offsets"] for k, v in outer.items() if k != "__metadata__"]
    ends = [offsets[1] for offsets in found if isinstance(offsets, list) and type(offsets[1]) is int]
    return header, len(header) + max(ends)


def refused(data: bytes, size: int, match: str, kind: type[DistckptError] = ShardError) -> None:
    """Assert the error, the file's name in it, that it is short, and that little memory was taken."""
    tracemalloc.start()
    try:
        with pytest.raises(kind, match=match) as caught:
            parse_header(data, file_size=size, where="step-1/shard")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("step-1/shard: ")
    assert len(str(caught.value)) < 1000
    assert peak < MEMORY


def test_the_honest_header_is_accepted() -> None:
    """Also after being taken apart: the attacks below fail for what they change, not for how they are built."""
    data, size = honest()
    boxes = parse_header(data, file_size=size, where="f").boxes
    rebuilt, rebuilt_size = put_together(*taken_apart())
    again = parse_header(rebuilt, file_size=rebuilt_size, where="f").boxes
    assert [b.key for b in boxes] == [b.key for b in again] == ["c", "m", "m#1", "e"]


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_absurd_lengths(length: int) -> None:
    data, _ = honest()
    refused(length.to_bytes(8, "little") + data[8:], 1 << 62, "header length")


def test_lengths_past_the_end() -> None:
    data, size = honest()
    for length in (size - 7, size, 99_999_999):
        refused(length.to_bytes(8, "little") + data[8:], size, "truncated")
    refused(data, size - 1, "file has")
    refused(data, size + 1, "file has")
    refused(data, len(data), "file has")


def test_truncated_at_every_byte() -> None:
    data, size = honest()
    for kept in range(len(data)):
        with pytest.raises(ShardError, match="truncated"):
            parse_header(data[:kept], file_size=size, where="f")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"  ", "not a JSON object"),
        (b"{}", "distckpt is missing"),
        (b'{"__metadata__":{}}', "distckpt is missing"),
        (b'{"__metadata__":{"distckpt":1}}', r"Expected `str`"),
        (b'{"__metadata__":{"distckpt":"[]"}}', "not an object"),
        (b'{"__metadata__":{"distckpt":"{"}}', "distckpt"),
        (b'{"__metadata__":{"distckpt":"{}"}}', "version must be"),
        (b'{"__metadata__":[]}', "Expected `object`"),
        (b'{"__metadata__":{"distckpt":"{\\"version\\":[1,0]}"}}', "missing required field"),
        (b'{"w":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested too deep"),
        (b"{" * 10_000, "JSON"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested too deep"),
        (b'{"\xff\xfe":1}', "JSON"),
        (b'{"w":1', "JSON"),
        (b"{\0}", "JSON"),
    ],
)
def test_texts_that_are_no_header(text: bytes, match: str) -> None:
    refused(framed(text), 8 + len(text), match)


def test_nesting_where_anything_may_stand() -> None:
    """Objects are free-form and unknown fields are ignored, yet neither may nest without end."""
    for place in ('"objects":{"a":%s}', '"objects":{},"unknown":%s'):
        nested = "[" * 10_000 + "]" * 10_000
        outer, ours = taken_apart()
        del ours["objects"]
        outer["__metadata__"]["distckpt"] = json.dumps(ours)[:-1] + "," + place % nested + "}"
        data = framed(json.dumps(outer).encode())
        refused(data, len(data), "deep")


def test_leading_space_and_trailing_garbage() -> None:
    text = honest()[0][8:].rstrip()
    size = honest()[1] - len(honest()[0])
    for changed, match in (
        (b" " + text, "something stands before"),
        (b"\xef\xbb\xbf" + text, "something stands before"),
        (text + b"x", "JSON"),
        (text + b" {}", "JSON"),
        (text + b"\0" * 8, "JSON"),
    ):
        refused(framed(changed), 8 + len(changed) + size, match)


def test_repeated_names() -> None:
    """The safetensors library takes the last of two; here any repetition at any depth is refused."""
    text = honest()[0][8:].rstrip().decode()
    size = honest()[1] - len(honest()[0])
    entry = text[text.index('"e":') : -1]
    inner = text.index('"rank\\"') - 1
    for changed in (
        text[:-1] + "," + entry + "}",
        text[:-1] + ',"__metadata__":{"distckpt":"{}"}}',
        text.replace('"format":"pt"', '"format":"pt","format":"pt"'),
        text.replace('"dtype":"F32"', '"dtype":"I8","dtype":"F32"', 1),
        text[:inner] + '\\"rank\\":7,' + text[inner:],
        text[:-1] + "," + entry.replace('"e"', '"\\u0065"') + "}",
    ):
        assert changed != text
        refused(framed(changed.encode()), 8 + len(changed) + size, "stands twice")


def _entry(key: str, field: str, value: Any) -> Callable[[Header, Header], None]:
    def change(outer: Header, ours: Header) -> None:
        outer[key][field] = value

    return change


def _tensor(key: str, field: str, value: Any) -> Callable[[Header, Header], None]:
    def change(outer: Header, ours: Header) -> None:
        ours["tensors"][key][field] = value

    return change


def _ours(field: str, value: Any) -> Callable[[Header, Header], None]:
    def change(outer: Header, ours: Header) -> None:
        ours[field] = value

    return change


def _renamed(new: str) -> Callable[[Header, Header], None]:
    def change(outer: Header, ours: Header) -> None:
        outer[new] = outer.pop("e")
        ours["tensors"][new] = ours["tensors"].pop("e") | {"fqn": new}

    return change


def _without(field: str) -> Callable[[Header, Header], None]:
    def change(outer: Header, ours: Header) -> None:
        del ours[field]

    return change


def _both_shapes(key: str, shape: list[Any], dtype: str = "int8") -> Callable[[Header, Header], None]:
    """Claim a shape everywhere, consistently: only its size is absurd."""

    def change(outer: Header, ours: Header) -> None:
        outer[key]["shape"] = shape
        ours["tensors"][key] |= {"shape": shape, "sizes": shape, "offsets": [0] * len(shape), "dtype": dtype}

    return change


# In the file: c [0, 16), m [16, 64), m#1 [64, 88), e [88, 88).
ATTACKS: dict[str, tuple[Callable[[Header, Header], None], str]] = {
    "offsets reversed": (_entry("m", "data_offsets", [64, 16]), "hole|run back"),
    "offsets reversed at the right place": (_entry("m", "data_offsets", [16, 15]), "run back"),
    "offset negative": (_entry("m", "data_offsets", [-16, 64]), r"Expected `int` >= 0"),
    "offset float": (_entry("m", "data_offsets", [16.0, 64]), "Expected `int`, got `float`"),
    "offset string": (_entry("m", "data_offsets", ["16", 64]), "Expected `int`, got `str`"),
    "offset bool": (_entry("c", "data_offsets", [False, 16]), "Expected `int`, got `bool`"),
    "offset null": (_entry("m", "data_offsets", None), "Expected `array`, got `null`"),
    "three offsets": (_entry("m", "data_offsets", [16, 64, 64]), "length 2"),
    "offset of 400 digits": (_entry("m", "data_offsets", [16, 10**400]), "digits"),
    "offset of 2^63": (_entry("m", "data_offsets", [16, 1 << 63]), "Expected `int` <="),
    "overlap": (_entry("m", "data_offsets", [15, 63]), "overlap"),
    "same bytes twice": (_entry("m#1", "data_offsets", [16, 40]), "overlap"),
    "hole": (_entry("m#1", "data_offsets", [65, 89]), "hole"),
    "hole at the start": (_entry("c", "data_offsets", [1, 17]), "hole"),
    "empty inside another": (_entry("e", "data_offsets", [20, 20]), "overlap"),
    "empty past the end": (_entry("e", "data_offsets", [99, 99]), "hole"),
    "bytes beyond the shape": (_entry("e", "data_offsets", [88, 89]), "1 bytes for 0 elements"),
    "shape product overflows": (_both_shapes("e", [1 << 32, 1 << 32]), "2.*bytes or more"),
    "wraps to zero bytes": (_both_shapes("e", [1 << 62, 4]), "2.*bytes or more"),
    "empty but huge": (_both_shapes("e", [0, 1 << 61, 2]), "2.*bytes or more"),
    "5,000 dimensions": (_both_shapes("e", [0] * 5000), "5000 dimensions"),
    "dimension negative": (_both_shapes("e", [-1, 0]), "Expected `int` >= 0"),
    "dimension of 400 digits": (_both_shapes("e", [0, 10**400]), "digits"),
    "dimension infinite": (_both_shapes("e", [0, float("inf")]), "JSON"),
    "dimension nan": (_both_shapes("e", [0, float("nan")]), "JSON"),
    "dimension 1e3": (_both_shapes("e", [0, 1e3]), "got `float`"),
    "stored shape differs": (_entry("m", "shape", [6, 2]), "stored as"),
    "stored dtype differs": (_entry("m", "dtype", "I32"), "stored as"),
    "stored dtype unknown": (_entry("m", "dtype", "F128"), "stored as"),
    "stored dtype sub-byte": (_entry("m", "dtype", "F4"), "stored as"),
    "stored dtype huge": (_entry("m", "dtype", "F" * 100_000), "stored as"),
    "stored dtype no string": (_entry("m", "dtype", 32), "Expected `str`"),
    "logical dtype differs": (_tensor("m", "dtype", "int32"), "disagree|stored as"),
    "logical dtype unknown": (_tensor("m", "dtype", "float128"), "unknown dtype"),
    "logical dtype hidden in U8": (_tensor("c", "dtype", "complex32"), "stored as"),
    "boxes of one tensor, two shapes": (_tensor("m#1", "shape", [5, 6]), "disagree"),
    "box outside": (_tensor("m", "offsets", [3, 0]), "outside shape"),
    "box far outside": (_tensor("m", "offsets", [1 << 62, 0]), "outside shape"),
    "box negative": (_tensor("m", "offsets", [-1, 0]), "Expected `int` >= 0"),
    "box of another rank": (_tensor("m", "offsets", [0]), "dimensions"),
    "box sizes differ from stored": (_tensor("m", "sizes", [1, 6]), "stored as"),
    "no digest": (_tensor("m", "digests", []), "0 digests for 48 bytes"),
    "a digest too many": (_tensor("e", "digests", ["0" * 32]), "1 digests for 0 bytes"),
    "digest too short": (_tensor("m", "digests", ["0" * 31]), "digest is not"),
    "digest of another kind": (_tensor("m", "digests", ["0" * 64]), "digest is not"),
    "digest in capitals": (_tensor("m", "digests", ["A" * 32]), "digest is not"),
    "digest no string": (_tensor("m", "digests", [0]), "Expected `str`"),
    "tensor only in the header": (lambda outer, ours: ours["tensors"].pop("e"), "two lists"),
    "tensor only in our metadata": (lambda outer, ours: outer.pop("e"), "two lists"),
    "key of another tensor": (_tensor("e", "fqn", "m"), "key of a box"),
    "key with a false suffix": (_tensor("m#1", "fqn", "m#"), "key of a box"),
    "name empty": (_renamed(""), "name is empty"),
    "name with NUL": (_renamed("a\0b"), "NUL"),
    "name with a line break": (_renamed("a\nb"), "line break"),
    "name of a megabyte": (_renamed("x" * (1 << 20)), "bytes"),
    "name with a lone surrogate": (_renamed("\ud800"), "JSON"),
    "rank beyond the world": (_ours("rank", 2), "rank 2 of 2"),
    "rank negative": (_ours("rank", -1), "Expected `int` >= 0"),
    "rank bool": (_ours("rank", True), "got `bool`"),
    "world of billions": (_ours("world_size", 1 << 40), "at most"),
    "world as text": (_ours("world_size", "2"), "got `str`"),
    "block 0": (_ours("block", 0), "block"),
    "block too small": (_ours("block", 2048), "block"),
    "block odd": (_ours("block", 4100), "block"),
    "block too large": (_ours("block", 1 << 30), "block"),
    "save id of a megabyte": (_ours("save_id", "x" * (1 << 20)), "save_id"),
    "objects a list": (_ours("objects", []), "Expected `object`"),
    "objects null": (_ours("objects", None), "Expected `object`"),
    "object overflows": (_ours("objects", {"lr": float("inf")}), "Infinity"),
    "no objects": (_without("objects"), "missing required field `objects`"),
    "no rank": (_without("rank"), "missing required field `rank`"),
    "tensors a list": (_ours("tensors", []), "Expected `object`"),
    "no version": (_without("version"), "version"),
    "version a number": (_ours("version", 1), "version"),
    "version bool": (_ours("version", [True, 0]), "version"),
    "version 0": (_ours("version", [0, 9]), "version"),
    "version of 400 digits": (_ours("version", [10**400, 0]), "digits"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str) -> None:
    change, match = ATTACKS[name]
    outer, ours = taken_apart()
    change(outer, ours)
    refused(*put_together(outer, ours), match)


def test_a_tensor_called_metadata() -> None:
    """It can't be told from the real one: as a second key it is a repetition, in our list it has no entry."""
    outer, ours = taken_apart()
    ours["tensors"]["__metadata__"] = copy.deepcopy(ours["tensors"]["e"]) | {"fqn": "__metadata__"}
    refused(*put_together(outer, ours), "two lists")
    outer, ours = taken_apart()
    ours["tensors"]["e"]["fqn"] = "__metadata__"
    refused(*put_together(outer, ours), "reserved")


@pytest.mark.parametrize("name", ["../x", "/x", "C:\\x", "..", "a/b", "\\\\host\\x", "x" * 65536])
def test_names_like_paths_are_names(name: str) -> None:
    """A name is never made into a path, so these are accepted, as they are."""
    outer, ours = taken_apart()
    _renamed(name)(outer, ours)
    data, size = put_together(outer, ours)
    assert parse_header(data, file_size=size, where="f").boxes[-1].fqn == name


def test_versions() -> None:
    outer, ours = taken_apart()
    ours["version"] = [1, 99]
    ours["tensors"]["m"]["codec"] = "none"
    outer["m"]["comment"] = outer["__metadata__"]["comment"] = ours["later"] = "x"  # type: ignore[assignment]
    data, size = put_together(outer, ours)
    assert len(parse_header(data, file_size=size, where="f").boxes) == 4
    ours["version"] = [3, 0]
    refused(*put_together(outer, ours), r"3\.0.*upgrade", UnsupportedVersion)


def test_many_small_entries_without_our_metadata() -> None:
    """Foreign headers are refused before an object is made for each entry in them."""
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(b'"t%d":%s' % (i, entry) for i in range(200_000)) + b"}"
    refused(framed(text), 8 + len(text), "did not write")
    text = b"{" + b",".join(b'"t%d":[[],[],[],[],[],[]]' % i for i in range(200_000)) + b"}"
    refused(framed(text), 8 + len(text), "did not write")


def test_a_megabyte_name_without_our_metadata() -> None:
    text = b'{"' + b"x" * (1 << 20) + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    refused(framed(text), 8 + len(text), "did not write")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_is_a_named_error_or_harmless(data: st.DataObject) -> None:
    """Without the digest in front: whatever bytes stand in the header, only our own errors come out."""
    header, size = honest()
    changed = bytearray(header.rstrip())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    changed += b" " * (len(header) - len(changed))
    try:
        found = parse_header(bytes(changed), file_size=size, where="f")
    except (ShardError, UnsupportedVersion):
        return
    assert sum(box.nbytes for box in found.boxes) + found.nbytes == size


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=8), st.sampled_from(["m", "distckpt", "tensors", "m.fqn", "m.digests"]))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_any_value_anywhere_is_a_named_error_or_harmless(value: Any, place: str) -> None:
    outer, ours = taken_apart()
    if place == "m":
        outer["m"] = value
    elif place == "tensors":
        ours["tensors"] = value
    elif place == "distckpt":
        ours = value
    else:
        ours["tensors"]["m"][place[2:]] = value
    outer["__metadata__"]["distckpt"] = json.dumps(ours)
    text = json.dumps(outer).encode()
    with pytest.raises(ShardError):
        parse_header(framed(text), file_size=8 + len(text) + 88, where="f")
