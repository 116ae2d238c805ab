"""Typed JSON: Python values as plain JSON and back, with their types, without pickle.

A value that JSON has is written as itself. Any other is an object with one key that starts with ``$``:
``{"$tuple": [...]}``, ``{"$bytes": "AAE="}``, ``{"$dict": [[key, value], ...]}``. A dict is a JSON
object only if its keys are valid str in sorted order, none of them starting with ``$``; else it is a
list of pairs. So user keys never look like tags, and **the order of every dict survives** though the
file's objects are sorted.

Types match exactly; a subclass is refused, not stored as its base. What comes back changed, on purpose:

- two references to one object come back as two equal objects (cycles are refused);
- a NaN loses its payload, a ``datetime.timezone`` its name, an array its memory order;
- a tensor comes back on the CPU, detached, a ``Parameter`` as a plain tensor (``typed_arrays``);
- a path of the other operating system comes back as its ``Pure`` form.

``OrderedDict``, ``Counter``, ``deque`` and ``defaultdict`` keep their class; the factory of a
``defaultdict`` must be None or a builtin of ``typed_leaves.FACTORIES``. Named tuples and dataclasses are
refused. Enum members are found by the name of a class that is already imported: reading never imports
what a file names.
"""

from __future__ import annotations

from typing import Any

from distckpt.errors import DistckptError, ManifestError, UnserializableState
from distckpt.format.plain_json import canonical, strict_loads
from distckpt.format.typed_decode import Decoder
from distckpt.format.typed_encode import MAX_DEPTH, MAX_VALUES, Encoder, Ref

__all__ = [
    "MAX_DEPTH",
    "MAX_VALUES",
    "Ref",
    "canonical",
    "decode",
    "dumps",
    "encode",
    "loads",
    "strict_loads",
]


def encode(value: Any, *, where: str = "$") -> Any:
    """Return ``value`` as plain JSON values; ``decode`` gives it back.

    Raises ``UnserializableState`` naming the key path (``where`` is its root: ``$.optim.foo[3]``) and
    the type for whatever can't be kept, for cycles, and for nesting deeper than 180 levels of JSON.
    """
    try:
        return Encoder().value(value, where, 0)
    except RecursionError as cause:
        raise UnserializableState(f"{where}: nested too deeply to be stored; flatten it") from cause


def decode(jsonable: Any, *, where: str = "$", error: type[DistckptError] = ManifestError) -> Any:
    """Return the value that ``encode`` got. ``jsonable`` may be hostile: it comes from ``strict_loads``.

    Raises ``error`` naming the key path for unknown tags, payloads that don't fit their tag, duplicate
    keys, and enums whose module isn't imported yet. Imports nothing but NumPy and torch, and those only
    for their values.
    """
    try:
        return Decoder(error).value(jsonable, where)
    except RecursionError as cause:
        raise error(f"{where}: nested too deeply; it is damaged or hostile") from cause


def dumps(value: Any) -> bytes:
    """Return the canonical bytes of ``value``, the same on every rank. Raises ``UnserializableState``."""
    return canonical(encode(value))


def loads(
    data: bytes | bytearray | memoryview,
    *,
    where: str = "$",
    max_bytes: int = 1 << 28,
    error: type[DistckptError] = ManifestError,
) -> Any:
    """Undo ``dumps``; raises ``error`` as ``strict_loads`` and ``decode`` do. ``where`` names the file."""
    return decode(strict_loads(data, where=where, max_bytes=max_bytes, error=error), where=where, error=error)
