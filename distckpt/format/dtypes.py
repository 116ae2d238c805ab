"""Dtypes by name, without torch: item sizes and how each is written in a safetensors header.

Names are torch's without the prefix. A dtype whose tag is None is stored as U8 with its last dimension
multiplied by its item size (a 0-d tensor as shape [itemsize]); our own header has the logical dtype and
shape.

A dtype gets a tag only if the safetensors library, its torch binding, and the Hugging Face reader of
torch.distributed.checkpoint (it asks ``safetensors.torch._getdtype``) all know it: one unknown tag makes the
whole file unreadable to them. The *fnuz* kinds are known from 0.8 on only, float8_e8m0fnu to the library but
not to its torch binding, and float4 is counted in half bytes there; so these are U8. C64 needs version 0.7.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from distckpt.errors import IncompatibleState

_TAGS: Final[dict[str, tuple[str, int]]] = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "float32": ("F32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float64": ("F64", 8),
    "complex64": ("C64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
}

_UNTAGGED: Final[dict[str, int]] = {
    "complex32": 4,
    "complex128": 16,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "bits8": 1,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
    # torch gives sub-byte integers a byte per element and can view them as uint8, but can't copy them:
    # their bytes must be taken through ``tensor.view(torch.uint8)`` before anything else.
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
}

ITEMSIZES: Final = MappingProxyType({name: size for name, (_, size) in _TAGS.items()} | _UNTAGGED)
"""Bytes per element of every dtype that can be stored by value; quantized ones need their scales too."""

_FROM_TAG: Final = {tag: name for name, (tag, _) in _TAGS.items()}


def is_known(name: object) -> bool:
    """Say whether ``name`` is a dtype that can be stored."""
    return isinstance(name, str) and name in ITEMSIZES


def itemsize(name: str) -> int:
    """Return the bytes per element; ``IncompatibleState`` if the dtype can't be stored by value."""
    size = ITEMSIZES.get(name)
    if size is None:
        raise IncompatibleState(
            f"dtype {name!r} cannot be stored by value; known are: {', '.join(sorted(ITEMSIZES))}. "
            "A quantized tensor must be saved as its integer values, scales and zero points"
        )
    return size


def safetensors_tag(name: str) -> str | None:
    """Return the safetensors tag, or None if it is stored as U8; ``IncompatibleState`` if unknown."""
    itemsize(name)
    found = _TAGS.get(name)
    return None if found is None else found[0]


def from_tag(tag: str) -> str:
    """Return the dtype that a safetensors tag stands for; ``IncompatibleState`` if unknown."""
    name = _FROM_TAG.get(tag)
    if name is None:
        known = ", ".join(sorted(_FROM_TAG))
        raise IncompatibleState(f"safetensors dtype {tag!r} is unknown; known are: {known}")
    return name


def stored_form(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the (tag, shape) in a safetensors header for a tensor of this dtype and logical shape."""
    tag = safetensors_tag(name)
    if tag is not None:
        return tag, shape
    size = itemsize(name)
    return "U8", (*shape[:-1], shape[-1] * size) if shape else (size,)
