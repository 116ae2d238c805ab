"""Plain JSON: one spelling out, and nothing ambiguous in."""

from __future__ import annotations

from typing import Any

import pytest

from distckpt.errors import ManifestError, ShardError, UnserializableState
from distckpt.format.typed_json import canonical, strict_loads


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "not the JSON"),
        (b"{", "not the JSON"),
        (b"[1] x", "Extra data"),
        (b"[1][2]", "Extra data"),
        (b"[1]\0", "Extra data"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "overflows"),
        (b"[-1e999]", "overflows"),
        (b"9" * 5000, "digits"),
        (b'{"a":1,"a":1}', "twice"),
        (b'[{"x":{"a":1,"b":2,"\\u0061":1}}]', "twice"),
        (b'"\xff"', "UTF-8"),
        (b'"\xed\xa0\x80"', "UTF-8"),
        (b'"\\ud800"', "UTF-8"),
        (b'{"\\uDFFF":1}', "UTF-8"),
        ("[1]".encode("utf-16"), "UTF-8"),
        (b"\xef\xbb\xbf[1]", "BOM"),
        (b'"a\nb"', "control character"),
        (b"[" * 201 + b"]" * 201, "nested"),
        (b'{"a":' * 201 + b"1" + b"}" * 201, "nested"),
        (b"[" * 100_000, "nested"),
        (b" " * 1001, None),
        (b"[01]", "not the JSON"),
        (b"['a']", "not the JSON"),
    ],
)
def test_strict_loads_refuses(data: bytes, what: str | None) -> None:
    limit = 1000 if what is None else 1 << 20
    for kind in (ManifestError, ShardError):
        with pytest.raises(kind, match=what or "1001 bytes") as caught:
            strict_loads(data, where="root/manifest-g000001.json", max_bytes=limit, error=kind)
        assert str(caught.value).startswith("root/manifest-g000001.json: ")


def test_strict_loads_reads_what_is_fine() -> None:
    deep = b"[" * 200 + b"]" * 200
    assert canonical(strict_loads(deep, where="x", max_bytes=400)) == deep
    assert strict_loads(memoryview(b' {"a":[1,-0.0,"\\ud83d\\ude00"]}\n'), where="x", max_bytes=99) == {
        "a": [1, 0.0, "😀"]
    }
    assert strict_loads(b"1e-999", where="x", max_bytes=9) == 0.0


def test_canonical_refuses_what_has_no_form() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    for value in (float("nan"), [float("inf")], "\ud800", {"\udfff": 1}, b"a", {1, 2}, cycle, {1: 1, "1": 2}):
        with pytest.raises(UnserializableState):
            canonical(value)
