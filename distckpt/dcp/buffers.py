"""Copying bytes between buffers while other threads run."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from distckpt.storage.direct import anonymous

_LARGE = 4 << 20
_SMALL = 32 << 10
_free, _held = ctypes.CDLL(None), ctypes.PyDLL(None)
for _library in (_free, _held):
    _library.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy equal numbers of bytes; numpy lets go of the interpreter lock meanwhile, a memoryview does not."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def move(target: int, source: int, nbytes: int) -> None:
    """Copy bytes between addresses; the interpreter lock is let go where that pays (taking it back may have to wait)."""
    (_held if nbytes < _SMALL else _free).memmove(target, source, nbytes)


def zeros_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros of a contiguous tensor's shape on its device.

    Large ones on the CPU are zero pages that nothing has touched yet: what fills them, on several threads, pays the page
    faults, and there is no pass for the zeros.
    """
    nbytes = tensor.numel() * dtype.itemsize
    if tensor.device.type != "cpu" or nbytes < _LARGE:
        return torch.zeros_like(tensor, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)
    return torch.frombuffer(anonymous(nbytes), dtype=dtype).reshape(tensor.shape)
