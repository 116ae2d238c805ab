"""Plain JSON, strictly: one spelling for what we write, and no second meaning for what we read."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final, NoReturn

from distckpt.errors import DistckptError, ManifestError, UnserializableState

MAX_DEPTH: Final = 200
"""Deepest nesting of arrays and objects that is read."""

MAX_DIGITS: Final = 40
"""Longest integer literal that is read: enough for 128 bits, and parsing stays linear in the file's size."""

_LOOSE = re.compile(rb'"[ \t\r\n]')
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """Valid JSON for the standard library, but not for us."""


def canonical(jsonable: Any) -> bytes:
    """Return the one byte form of plain JSON: keys sorted by code point, no spaces, UTF-8 without escapes.

    Raises ``UnserializableState`` for what has no such form: NaN, infinities, lone surrogates, cycles, and
    anything that isn't JSON. Keys must be str (the caller sees to it); tuples are written as arrays.
    """
    try:
        text = json.dumps(jsonable, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as cause:
        raise UnserializableState(f"not plain JSON: {cause}; use typed_json.encode first") from cause


def strict_loads(
    data: bytes | bytearray | memoryview,
    *,
    where: str,
    max_bytes: int,
    error: type[DistckptError] = ManifestError,
) -> Any:
    """Parse JSON that may be damaged or hostile; ``where`` names the file in errors.

    Raises ``error`` for: more than ``max_bytes`` bytes, bytes that aren't UTF-8, lone surrogates, duplicate
    keys at any depth, NaN and Infinity, floats that overflow, integers of more than 40 digits, nesting deeper
    than 200, anything after the value. Whitespace around the value is allowed.
    """
    size = data.nbytes if isinstance(data, memoryview) else len(data)
    if size > max_bytes:
        raise error(f"{where}: {size} bytes of JSON, more than the {max_bytes} allowed; damaged or hostile")
    try:
        value = json.loads(
            str(data, "utf-8"),
            object_pairs_hook=_object,
            parse_float=_float,
            parse_int=_int,
            parse_constant=_constant,
        )
        if _SURROGATE_ESCAPE.search(data) is not None:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as cause:
        raise error(f"{where}: not UTF-8 ({cause}); it is damaged") from cause
    except RecursionError as cause:
        raise error(f"{where}: JSON nested too deeply (at most {MAX_DEPTH} levels)") from cause
    except ValueError as cause:
        raise error(f"{where}: not the JSON that was written: {cause}; it is damaged") from cause
    if _deeper_than(value, MAX_DEPTH):
        raise error(f"{where}: JSON nested deeper than {MAX_DEPTH} levels; it is damaged or hostile")
    return value


def has_keys_once(text: bytes, keys: int) -> bool:
    """Say whether JSON that was parsed into ``keys`` keys, counting all levels, provably repeats none of them.

    In ASCII text without escapes and without white space after quotes, ``":`` ends every key, and counting them is a
    hundred times faster than looking at each. False means unknown: use ``strict_loads``.
    """
    return text.isascii() and b"\\" not in text and _LOOSE.search(text) is None and text.count(b'":') == keys


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"key {key[:100]!r} stands twice in one object")
            seen.add(key)
    return found


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"number {text[:40]} overflows")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Refused(f"integer of {len(text)} digits, {text[:20]}...")
    return int(text)


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is not a JSON number")


def _deeper_than(value: Any, limit: int) -> bool:
    """Say whether arrays and objects nest more than ``limit`` deep, without recursion, level by level."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return bool(level)
