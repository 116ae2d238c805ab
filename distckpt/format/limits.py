"""Bounds that headers and manifests share, and the checks of names, shapes and versions against them.

What is refused when read is refused when written too: a save never commits what a load would not accept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

from distckpt.errors import DistckptError, UnsupportedVersion

VERSION: Final = (1, 0)
"""Major and minor version of the format of all that refers to nothing else."""
REUSING: Final = (2, 0)
"""The version of manifests and shards that refer to files of earlier steps: a reader of version 1 would find holes, and
its removal would delete what they need, so it has to refuse them."""

MAX_NAME_BYTES: Final = 1 << 16
MAX_DIMS: Final = 64
MAX_NUMBER: Final = 1 << 62
"""Sizes, offsets and byte counts stay below this, so that sums of two of them fit 63 bits in any language."""
MAX_WORLD: Final = 1 << 20
MAX_TENSORS: Final = 5_000_000

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
"""A size, an offset or an index as msgspec checks it; a bool, a float and a string are none."""


def shown(name: str) -> str:
    """Return a name for an error message: quoted, escaped, at most about a hundred characters."""
    return repr(name) if len(name) <= 100 else f"{name[:100]!r}... ({len(name)} characters)"


def name_problem(name: str) -> str | None:
    """Say why ``name`` can't name a tensor (empty, too long, NUL, line break, reserved), or return None.

    A name is never made into a path, so slashes, dots and colons are fine.
    """
    if not name:
        return "is empty"
    if "\0" in name or "\n" in name or "\r" in name:
        return "holds a NUL or a line break"
    if name == "__metadata__":
        return "is reserved by safetensors"
    if not name.isascii():
        try:
            length = len(name.encode())
        except UnicodeEncodeError:
            return "holds a lone surrogate, which has no UTF-8 form"
    else:
        length = len(name)
    return f"has {length} bytes (at most {MAX_NAME_BYTES})" if length > MAX_NAME_BYTES else None


def shape_problem(shape: Sequence[int], itemsize: int) -> str | None:
    """Say why a tensor can't have this shape (dimensions, size in bytes), or return None.

    Zeros count as ones: a tensor without elements must have strides that fit too.
    """
    if len(shape) > MAX_DIMS:
        return f"has {len(shape)} dimensions (at most {MAX_DIMS})"
    if min(shape, default=0) < 0:
        return f"{list(shape)} has a negative size"
    if math.prod(size or 1 for size in shape) * itemsize >= MAX_NUMBER:
        return f"{list(shape)[:8]} makes 2**62 bytes or more"
    return None


def check_version(value: object, *, where: str, error: type[DistckptError]) -> None:
    """Raise ``UnsupportedVersion`` for a newer major version, ``error`` for what is no ``[major, minor]``."""
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(part) is not int or not 0 <= part < MAX_NUMBER for part in value)
        or value[0] < 1
    ):
        raise error(f"{where}: version must be [major, minor], not {str(value)[:100]}; the file is damaged")
    if value[0] > REUSING[0]:
        raise UnsupportedVersion(
            f"{where}: written in format {value[0]}.{value[1]}, this distckpt reads up to {REUSING[0]}.x; "
            "upgrade distckpt to read it"
        )
