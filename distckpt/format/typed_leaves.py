"""Typed JSON for values without children: one row of a table per type, how it is written and how it is read.

Writers get a value of exactly their type and return the payload of its tag, or raise ``Refused``.
Readers get a payload that anybody may have written and raise ``ValueError`` (or TypeError, OverflowError,
ArithmeticError) unless it is one. No reader imports a module that the payload names.
"""

from __future__ import annotations

import base64
import binascii
import collections
import datetime
import enum
import fractions
import math
import pathlib
import re
import sys
import types
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

SAFE_INTEGER: Final = 2**53
"""From here on a double, all the number that many JSON readers have, no longer tells neighbours apart."""

MAX_INTEGER_BITS: Final = 1 << 22
MAX_FRACTION_BITS: Final = 1 << 12

_HEX = re.compile(r"-?0x[0-9a-f]+")


class Refused(Exception):
    """The value can't be written; the text says why and what to do."""


def expect(payload: Any, kind: type, what: str) -> Any:
    """Return ``payload`` if its type is exactly ``kind``, else raise ValueError."""
    if type(payload) is not kind:
        raise ValueError(f"{what} must be {kind.__name__}, not {type(payload).__name__}")
    return payload


def expect_list(payload: Any, length: int) -> list[Any]:
    """Return ``payload`` if it is a list of ``length`` items, else raise ValueError."""
    if type(payload) is not list or len(payload) != length:
        raise ValueError(f"must be a list of {length}")
    return payload


def is_plain_text(text: str) -> bool:
    """Say whether a str is valid Unicode, so that JSON in UTF-8 can hold it as it is."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def to_base64(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


def from_base64(payload: Any) -> bytes:
    """Undo ``to_base64``; ValueError if it has characters that base64 hasn't."""
    text = expect(payload, str, "data")
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as cause:
        raise ValueError(f"not base64: {cause}") from cause
    return data


def integer(value: int) -> Any:
    """Write an int of up to 2**22 bits: as itself, or tagged in hexadecimal (linear both ways)."""
    if -SAFE_INTEGER < value < SAFE_INTEGER:
        return value
    if value.bit_length() > MAX_INTEGER_BITS:
        raise Refused(f"an int of {value.bit_length()} bits (at most {MAX_INTEGER_BITS}); save it as bytes")
    return {"$int": hex(value)}


def _read_int(payload: Any) -> int:
    text = expect(payload, str, "an integer")
    if len(text) > MAX_INTEGER_BITS // 4 + 4 or _HEX.fullmatch(text) is None:
        raise ValueError("not a hexadecimal integer like '-0x1f', or too long")
    return int(text, 16)


def real(value: float) -> Any:
    """Write a float: as itself, or tagged if JSON has no literal for it. A NaN loses its payload and sign."""
    return value if math.isfinite(value) else {"$float": "nan" if math.isnan(value) else repr(value)}


def _read_float(payload: Any) -> float:
    if payload not in ("nan", "inf", "-inf"):
        raise ValueError("must be 'nan', 'inf' or '-inf'")
    return float(payload)


def text(value: str) -> Any:
    """Write a str: as itself, or tagged if it has lone surrogates (as file names that aren't UTF-8 have)."""
    return value if is_plain_text(value) else {"$str": to_base64(value.encode("utf-8", "surrogatepass"))}


def _read_str(payload: Any) -> str:
    return from_base64(payload).decode("utf-8", "surrogatepass")


def primitive(payload: Any, kind: type) -> Any:
    """Undo ``integer``, ``real`` or ``text`` in another payload; ValueError if it isn't a ``kind``."""
    if type(payload) is dict and len(payload) == 1:
        ((tag, inner),) = payload.items()
        reader = {"$int": _read_int, "$float": _read_float, "$str": _read_str}.get(tag)
        if reader is not None:
            payload = reader(inner)
    return expect(payload, kind, "a part")


def _write_fraction(value: fractions.Fraction) -> Any:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_FRACTION_BITS:
        raise Refused(f"a Fraction of more than {MAX_FRACTION_BITS} bits; save its parts as ints")
    return [integer(value.numerator), integer(value.denominator)]


def _read_fraction(payload: Any) -> fractions.Fraction:
    top, bottom = (primitive(part, int) for part in expect_list(payload, 2))
    # The greatest common divisor takes quadratic time, so size is checked before.
    if max(top.bit_length(), bottom.bit_length()) > MAX_FRACTION_BITS:
        raise ValueError("too many bits")
    return fractions.Fraction(top, bottom)


def _write_moment(value: datetime.datetime | datetime.time) -> Any:
    if value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        kind = type(value.tzinfo).__qualname__
        raise Refused(f"its time zone is a {kind}, and only UTC and fixed offsets are kept; convert it to UTC")
    return [value.isoformat(), value.fold]


def _read_moment(kind: type) -> Callable[[Any], Any]:
    def read(payload: Any) -> Any:
        written, fold = expect_list(payload, 2)
        if type(fold) is not int:
            raise ValueError("fold must be 0 or 1")
        moment: Any = kind
        return moment.fromisoformat(expect(written, str, "a time")).replace(fold=fold)

    return read


def _read_timedelta(payload: Any) -> datetime.timedelta:
    days, seconds, micros = (expect(part, int, "a part") for part in expect_list(payload, 3))
    return datetime.timedelta(days=days, seconds=seconds, microseconds=micros)


_PATHS: Final = {
    kind.__name__: kind
    for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath)
}


def _write_path(value: pathlib.PurePath) -> Any:
    return [type(value).__name__, text(str(value))]


def _read_path(payload: Any) -> pathlib.PurePath:
    name, written = expect_list(payload, 2)
    if type(name) is not str or name not in _PATHS:
        raise ValueError(f"unknown kind of path {name!r}")
    # A path of the other system can't be touched here, only looked at.
    kind = _PATHS[name] if name == type(pathlib.Path()).__name__ or name.startswith("Pure") else None
    return (kind or _PATHS[f"Pure{name}"])(primitive(written, str))


def _read_range(payload: Any) -> range:
    return range(*(primitive(part, int) for part in expect_list(payload, 3)))


def _read_complex(payload: Any) -> complex:
    return complex(*(primitive(part, float) for part in expect_list(payload, 2)))


def find_enum(path: Any) -> type[enum.Enum]:
    """Return the Enum class at ``module:Qual.Name`` among the modules that are already imported.

    Looks into ``__dict__`` only: a module's ``__getattr__`` could import. ValueError if it isn't there.
    """
    module_name, colon, qualified = expect(path, str, "an enum's path").partition(":")
    found: Any = sys.modules.get(module_name)
    if not colon or not isinstance(found, types.ModuleType):
        raise ValueError(f"module {module_name[:100]!r} of enum {qualified[:100]!r} is not imported; import it first")
    for part in qualified.split("."):
        if isinstance(found, types.ModuleType):
            found = object.__getattribute__(found, "__dict__").get(part)
        else:
            found = type.__getattribute__(found, "__dict__").get(part) if isinstance(found, type) else None
    if not isinstance(found, enum.EnumMeta) or not issubclass(found, enum.Enum):
        raise ValueError(f"{path[:200]!r} is not an Enum class")
    return found


def write_enum(value: enum.Enum) -> Any:
    """Write a member as [path, name], or a combination of flags as [path, None, int value]."""
    kind = type(value)
    path = f"{kind.__module__}:{kind.__qualname__}"
    try:
        known = find_enum(path) is kind
    except ValueError:
        known = False
    if not known:
        raise Refused(f"enum class {path} can't be found by that name (is it local?); save its value instead")
    if kind.__members__.get(value.name or "") is value:
        return [path, value.name]
    if isinstance(value, enum.Flag) and type(value.value) is int and kind(value.value) == value:
        return [path, None, integer(value.value)]
    raise Refused(f"{value!r} is not a member of {path}; save its value instead")


def _read_enum(payload: Any) -> enum.Enum:
    if type(payload) is not list or len(payload) not in (2, 3):
        raise ValueError("must be a list of 2 or 3")
    kind = find_enum(payload[0])
    if len(payload) == 2:
        member = kind.__members__.get(expect(payload[1], str, "a member's name"))
        if member is None:
            raise ValueError(f"enum {payload[0][:200]!r} has no member {payload[1][:100]!r}")
        return member
    if payload[1] is not None or not issubclass(kind, enum.Flag):
        raise ValueError(f"{payload[0][:200]!r} is not a Flag class")
    return kind(primitive(payload[2], int))


WRITERS: Final[dict[type, tuple[str, Callable[[Any], Any]]]] = {
    bytes: ("$bytes", to_base64),
    bytearray: ("$bytearray", to_base64),
    complex: ("$complex", lambda value: [real(value.real), real(value.imag)]),
    range: ("$range", lambda value: [integer(value.start), integer(value.stop), integer(value.step)]),
    uuid.UUID: ("$uuid", str),
    Decimal: ("$decimal", str),
    fractions.Fraction: ("$fraction", _write_fraction),
    datetime.datetime: ("$datetime", _write_moment),
    datetime.time: ("$time", _write_moment),
    datetime.date: ("$date", datetime.date.isoformat),
    datetime.timedelta: ("$timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    **dict.fromkeys(_PATHS.values(), ("$path", _write_path)),
}

READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "$int": _read_int,
    "$float": _read_float,
    "$str": _read_str,
    "$bytes": from_base64,
    "$bytearray": lambda payload: bytearray(from_base64(payload)),
    "$complex": _read_complex,
    "$range": _read_range,
    "$uuid": lambda payload: uuid.UUID(expect(payload, str, "a UUID")),
    "$decimal": lambda payload: Decimal(expect(payload, str, "a decimal")),
    "$fraction": _read_fraction,
    "$datetime": _read_moment(datetime.datetime),
    "$time": _read_moment(datetime.time),
    "$date": lambda payload: datetime.date.fromisoformat(expect(payload, str, "a date")),
    "$timedelta": _read_timedelta,
    "$path": _read_path,
    "$enum": _read_enum,
}

FACTORIES: Final[dict[str, Any]] = {
    kind.__name__: kind for kind in (list, dict, set, tuple, int, float, bool, str, bytes, collections.OrderedDict)
}
"""What a ``defaultdict`` may make; others are code, which a checkpoint doesn't hold."""
