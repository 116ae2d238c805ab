"""Typed JSON that somebody else wrote: it does nothing but raise, at the path of the damage."""

from __future__ import annotations

import enum
import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import CorruptCheckpoint, ManifestError, ShardError
from distckpt.format.typed_json import decode


class Colour(enum.Enum):
    RED = 1
    ROUGE = 1  # noqa: PIE796 - an alias, on purpose
    BLUE = "b"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


HOSTILE = [
    {"$unknown": 1},
    {"$": 1},
    {"$tuple": [], "$list": []},
    {"$tuple": [], "a": 1},
    {"a": 1, "$b": 2},
    {"$tuple": {}},
    {"$tuple": 3},
    {"$set": [1, 1]},
    {"$set": [[]]},
    {"$frozenset": [{"a": 1}]},
    {"$dict": {}},
    {"$dict": [[1]]},
    {"$dict": [[1, 2], [1, 3]]},
    {"$dict": [[1, 2], [True, 3]]},
    {"$dict": [[[], 2]]},
    {"$OrderedDict": [["a", 1], ["a", 1]]},
    {"$Counter": 7},
    {"$defaultdict": ["eval", []]},
    {"$defaultdict": [["list"], []]},
    {"$deque": [1, [1, 2]]},
    {"$deque": [True, []]},
    {"$slice": [1]},
    {"$int": 5},
    {"$int": "5"},
    {"$int": "0x1_0"},
    {"$int": "0x" + "f" * 2_000_000},
    {"$float": "1.5"},
    {"$float": []},
    {"$str": "***"},
    {"$str": "/w=="},
    {"$bytes": [1]},
    {"$bytes": "YQ"},
    {"$complex": [1.0]},
    {"$complex": [1, 2]},
    {"$range": [0, 1, 0]},
    {"$range": [0, 1.5, 1]},
    {"$uuid": "x"},
    {"$decimal": "one"},
    {"$decimal": 1.5},
    {"$fraction": [1, 0]},
    {"$fraction": [{"$int": "0x" + "f" * 100_000}, {"$int": "0x" + "e" * 99_999}]},
    {"$datetime": ["yesterday", 0]},
    {"$datetime": ["2020-01-01T00:00:00", 2]},
    {"$date": "2020-13-01"},
    {"$time": ["25:00", 0]},
    {"$timedelta": [10**12, 0, 0]},
    {"$timedelta": [1.5, 0, 0]},
    {"$path": ["Path", "/x"]},
    {"$path": [["PosixPath"], "/x"]},
    {"$tensor": 1},
    {"$tensor": ""},
    {"$enum": "x"},
    {"$enum": ["enum:Enum", "A"]},
    {"$enum": ["os:system", "ls"]},
    {"$enum": ["os:path", "ls"]},
    {"$enum": ["builtins:dict", "keys"]},
    {"$enum": ["no_colon", "A"]},
    {"$enum": [1, "A"]},
    {"$enum": [f"{__name__}:Colour", "GREEN"]},
    {"$enum": [f"{__name__}:Colour", "__class__"]},
    {"$enum": [f"{__name__}:Colour", ["RED"]]},
    {"$enum": [f"{__name__}:Colour.RED", "RED"]},
    {"$enum": [f"{__name__}:Colour", None, 1]},
    {"$enum": [f"{__name__}:Access", None, 64]},
    {"$ndarray": {"dtype": "<f4", "shape": [2**61], "data": ""}},
    {"$ndarray": {"dtype": "<f4", "shape": [0, 2**62], "data": ""}},
    {"$ndarray": {"dtype": "<f4", "shape": [-1], "data": "AAAAAA=="}},
    {"$ndarray": {"dtype": "<f4", "shape": [True], "data": "AAAAAA=="}},
    {"$ndarray": {"dtype": "<f4", "shape": [2], "data": "AAAAAA=="}},
    {"$ndarray": {"dtype": "<f4", "shape": [1] * 65, "data": "AAAAAA=="}},
    {"$ndarray": {"dtype": "O", "shape": [1], "data": "AAAAAAAAAAA="}},
    {"$ndarray": {"dtype": "|O8", "shape": [1], "data": "AAAAAAAAAAA="}},
    {"$ndarray": {"dtype": "f4,f4", "shape": [1], "data": "AAAAAAAAAAA="}},
    {"$ndarray": {"dtype": "<f16", "shape": [1], "data": "A" * 20 + "AA=="}},
    {"$ndarray": {"dtype": "<f3", "shape": [1], "data": "AAAA"}},
    {"$ndarray": {"dtype": "<U0", "shape": [2**40], "data": ""}},
    {"$ndarray": {"dtype": "<f4", "shape": [1]}},
    {"$ndarray": []},
    {"$numpy": ["<f4", "AAA="]},
    {"$numpy": ["object", "AAA="]},
    {"$numpy": [None, "AAA="]},
    {"$numpy.dtype": "O"},
    {"$torch": {"dtype": "float32", "shape": [2**60], "data": ""}},
    {"$torch": {"dtype": "float32", "shape": [0, 2**62], "data": ""}},
    {"$torch": {"dtype": "float32", "shape": [1], "data": "AAAA"}},
    {"$torch": {"dtype": "load", "shape": [1], "data": "AAAA"}},
    {"$torch": {"dtype": ["float32"], "shape": [0], "data": ""}},
    {"$torch.dtype": "load"},
    {"$torch.dtype": "__doc__"},
    {"$torch.Size": [-1]},
    {"$torch.Size": [2**70]},
    {"$torch.device": "moon:1"},
    {"$torch.device": 3},
]


@pytest.mark.parametrize("payload", HOSTILE, ids=lambda payload: json.dumps(payload)[:60])
def test_hostile_payloads_only_raise(payload: Any) -> None:
    with pytest.raises(ManifestError, match=r"^\$\.a\[0\]"):
        decode({"a": [payload]})
    with pytest.raises(ShardError, match=r"^shard 3: objects"):
        decode(payload, where="shard 3: objects", error=ShardError)


TAGS = [
    "$tuple",
    "$set",
    "$dict",
    "$deque",
    "$int",
    "$str",
    "$bytes",
    "$complex",
    "$datetime",
    "$path",
    "$slice",
]
TAGS += [
    "$enum",
    "$ndarray",
    "$numpy",
    "$torch",
    "$torch.dtype",
    "$torch.Size",
    "$decimal",
    "$defaultdict",
    "$x",
]
jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["<f4", "int8"]),
    lambda child: (
        st.lists(child, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data", "a"]), child, max_size=4)
        | st.dictionaries(st.sampled_from(TAGS), child, min_size=1, max_size=1)
    ),
    max_leaves=10,
)


@settings(max_examples=500)
@given(jsons)
def test_any_json_decodes_or_is_refused(jsonable: Any) -> None:
    try:
        decode(jsonable)
    except CorruptCheckpoint as refused:
        message = str(refused)
    else:
        return
    assert message.startswith("$")


def test_enum_paths_import_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = ["antigravity", "this", "distckpt_no_such_module", "xml.dom.minidom"]
    for module in fresh:
        monkeypatch.delitem(sys.modules, module, raising=False)

    def refuse(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"imported {arguments[0]}")

    monkeypatch.setattr("builtins.__import__", refuse)
    for module in fresh:
        with pytest.raises(ManifestError, match="not imported"):
            decode({"$enum": [f"{module}:X", "A"]})
        assert module not in sys.modules
    # A module's own ``__getattr__`` (torch and many others import there) isn't asked either.
    lazy = type(sys)("distckpt_lazy_module")
    lazy.__getattr__ = refuse  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "distckpt_lazy_module", lazy)
    with pytest.raises(ManifestError, match="not an Enum"):
        decode({"$enum": ["distckpt_lazy_module:Mode", "A"]})
