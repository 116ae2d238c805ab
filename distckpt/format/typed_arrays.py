"""Typed JSON for NumPy and torch values. Neither is imported until one of its values is met or read.

Arrays and tensors of up to 1 MiB are kept as the base64 of their bytes in C order; bigger ones belong
into the shards. What is not kept: memory order, device (a tensor comes back on the CPU),
``requires_grad``, and the class ``Parameter`` (it comes back as a plain tensor).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any, Final

from distckpt.format import dtypes
from distckpt.format.typed_leaves import (
    Refused,
    expect,
    expect_list,
    from_base64,
    primitive,
    text,
    to_base64,
)

MAX_ARRAY_BYTES: Final = 1 << 20
MAX_DIMENSIONS: Final = 64

# Kinds whose bytes mean the same everywhere: bool, integers, floats, complex, text, time. No objects, no
# records, and no long double, whose size and format are the machine's.
_NUMPY_KINDS: Final = "biufcSUmM"
_NUMPY_NAME = re.compile(r"[<>|=]?[biufcSU][0-9]{1,7}|[<>][mM]8(\[[0-9]{0,9}[A-Za-z]{1,7}\])?")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
_DEVICE = re.compile(r"[a-z]{1,40}(:[0-9]{1,6})?")


def write(value: Any) -> dict[str, Any] | None:
    """Return the tagged form of a NumPy or torch value, None if it is neither; ``Refused`` says why not."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if type(value) is numpy.ndarray:
            return {"$ndarray": _write_ndarray(numpy, value)}
        if isinstance(value, numpy.generic):
            return {"$numpy": _write_scalar(numpy, value)}
        if isinstance(value, numpy.dtype):
            return {"$numpy.dtype": _numpy_dtype_name(value)}
    torch = sys.modules.get("torch")
    # While torch is only half imported, none of its values exists.
    if torch is None or not hasattr(torch, "nn"):
        return None
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return {"$torch": _write_tensor(torch, value)}
    if type(value) is torch.Size:
        return {"$torch.Size": list(value)}
    if type(value) is torch.dtype:
        return {"$torch.dtype": str(value).removeprefix("torch.")}
    if type(value) is torch.device:
        return {"$torch.device": str(value)}
    return None


def _check_size(nbytes: int) -> None:
    if nbytes > MAX_ARRAY_BYTES:
        raise Refused(f"{nbytes} bytes (at most {MAX_ARRAY_BYTES} in JSON); register it as a tensor of the state")


def _numpy_dtype_name(dtype: Any) -> str:
    name = str(dtype.str)
    if dtype.kind not in _NUMPY_KINDS or dtype.hasobject or (dtype.kind in "fc" and _long(dtype)):
        raise Refused(f"NumPy dtype {dtype} has no form that is the same on every machine")
    return name


def _long(dtype: Any) -> bool:
    return bool(dtype.itemsize > (8 if dtype.kind == "f" else 16))


def _write_ndarray(numpy: Any, value: Any) -> dict[str, Any]:
    name = _numpy_dtype_name(value.dtype)
    _check_size(value.nbytes)
    return {"dtype": name, "shape": list(value.shape), "data": to_base64(value.tobytes(order="C"))}


def _write_scalar(numpy: Any, value: Any) -> list[Any]:
    # The bytes of a text scalar would lose trailing NULs, so these two are kept as Python values.
    if type(value) is numpy.str_:
        return ["str", text(str.__str__(value))]
    if type(value) is numpy.bytes_:
        return ["bytes", to_base64(b"".join([value]))]
    if type(value).__module__ != "numpy":
        raise Refused("it is a subclass of a NumPy scalar")
    return [_numpy_dtype_name(value.dtype), to_base64(value.tobytes())]


def _write_tensor(torch: Any, value: Any) -> dict[str, Any]:
    if value.layout is not torch.strided or value.device.type == "meta" or value.is_nested:
        raise Refused(f"a tensor of layout {value.layout} on {value.device} has no bytes to keep; make it dense")
    name = str(value.dtype).removeprefix("torch.")
    if not dtypes.is_known(name):
        raise Refused(f"dtype {value.dtype} can't be stored by value; save its integer values and scales")
    _check_size(value.numel() * value.element_size())
    with torch.no_grad():
        dense = value.detach().resolve_conj().resolve_neg().cpu()
        # Sub-byte integers can be viewed as bytes, but not copied; so the view comes before ``contiguous``.
        if value.element_size() == 1:
            dense = dense.view(torch.uint8)
        octets = dense.contiguous().reshape(-1).view(torch.uint8)
    return {"dtype": name, "shape": list(value.shape), "data": to_base64(octets.numpy().tobytes())}


def _read_shape(payload: Any, itemsize: int, nbytes: int) -> tuple[int, ...]:
    """Return a shape that fits ``nbytes`` exactly; nothing is allocated before this has passed."""
    shape = expect(payload, list, "shape")
    if len(shape) > MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"shape must be at most {MAX_DIMENSIONS} ints, none negative")
    # Strides are counted even where a dimension is 0.
    if math.prod(max(size, 1) for size in shape) * max(itemsize, 1) >= 2**62:
        raise ValueError("shape overflows")
    if math.prod(shape) * itemsize != nbytes:
        raise ValueError(f"{nbytes} bytes of data don't fit shape {shape[:8]} of {itemsize}-byte items")
    return tuple(shape)


def _read_parts(payload: Any) -> tuple[str, Any, bytes]:
    if type(payload) is not dict or payload.keys() != {"dtype", "shape", "data"}:
        raise ValueError("must have dtype, shape and data")
    data = from_base64(payload["data"])
    if len(data) > MAX_ARRAY_BYTES:
        raise ValueError(f"{len(data)} bytes, more than {MAX_ARRAY_BYTES}")
    return expect(payload["dtype"], str, "dtype"), payload["shape"], data


def _read_numpy_dtype(payload: Any) -> Any:
    import numpy

    name = expect(payload, str, "dtype")
    if _NUMPY_NAME.fullmatch(name) is None:
        raise ValueError(f"NumPy dtype {name[:60]!r} is not one that is stored")
    dtype = numpy.dtype(name)
    if dtype.kind in "fc" and _long(dtype):
        raise ValueError(f"NumPy dtype {name!r} is not the same on every machine")
    return dtype


def _read_ndarray(payload: Any) -> Any:
    import numpy

    name, shape, data = _read_parts(payload)
    dtype = _read_numpy_dtype(name)
    sizes = _read_shape(shape, dtype.itemsize, len(data))
    if not data:
        return numpy.zeros(sizes, dtype) if dtype.itemsize else _no_bytes(sizes, dtype)
    return numpy.frombuffer(bytearray(data), dtype).reshape(sizes)


def _no_bytes(sizes: tuple[int, ...], dtype: Any) -> Any:
    """Return an array of empty strings; without an item size, only the dimensions bound its length."""
    import numpy

    if math.prod(sizes) > MAX_ARRAY_BYTES:
        raise ValueError("too many empty items")
    return numpy.ndarray(sizes, dtype)


def _read_scalar(payload: Any) -> Any:
    import numpy

    name, data = expect_list(payload, 2)
    if name == "str":
        return numpy.str_(primitive(data, str))
    if name == "bytes":
        return numpy.bytes_(from_base64(data))
    dtype, raw = _read_numpy_dtype(name), from_base64(data)
    if dtype.kind in "SU" or len(raw) != dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes are not one {dtype}")
    return numpy.frombuffer(raw, dtype)[0]


def _torch_dtype(payload: Any) -> Any:
    import torch

    name = expect(payload, str, "dtype")
    # Not getattr: torch imports submodules when asked for unknown names.
    dtype = vars(torch).get(name) if _NAME.fullmatch(name) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch {torch.__version__} has no dtype {name[:60]!r}")
    return dtype


def _read_tensor(payload: Any) -> Any:
    import torch

    name, shape, data = _read_parts(payload)
    if not dtypes.is_known(name):
        raise ValueError(f"dtype {name[:60]!r} is not one that is stored")
    dtype = _torch_dtype(name)
    sizes = _read_shape(shape, dtypes.itemsize(name), len(data))
    if not data:
        return torch.empty(sizes, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(sizes)


def _read_size(payload: Any) -> Any:
    import torch

    sizes = expect(payload, list, "a size")
    if any(type(size) is not int or not 0 <= size < 2**62 for size in sizes):
        raise ValueError("sizes must be ints, none negative")
    return torch.Size(sizes)


def _read_device(payload: Any) -> Any:
    import torch

    name = expect(payload, str, "a device")
    if _DEVICE.fullmatch(name) is None:
        raise ValueError(f"{name[:60]!r} is not a device")
    try:
        return torch.device(name)
    except RuntimeError as cause:
        raise ValueError(f"{name[:60]!r} is not a device of this torch") from cause


READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "$ndarray": _read_ndarray,
    "$numpy": _read_scalar,
    "$numpy.dtype": _read_numpy_dtype,
    "$torch": _read_tensor,
    "$torch.dtype": _torch_dtype,
    "$torch.Size": _read_size,
    "$torch.device": _read_device,
}
