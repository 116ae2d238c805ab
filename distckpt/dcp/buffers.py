"""Copying bytes between buffers while other threads run."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from distckpt.storage.direct import address, anonymous, prefault

_LARGE = 4 << 20
_SMALL = 32 << 10
_free, _held = ctypes.CDLL(None), ctypes.PyDLL(None)
for _library in (_free, _held):
    _library.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_view_of = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.argtypes, _view_of.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy equal numbers of bytes; numpy lets go of the interpreter lock meanwhile, a memoryview does not."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def move(target: int, source: int, nbytes: int, *, held: int = _SMALL) -> None:
    """Copy bytes between addresses; of fewer than ``held`` the interpreter lock is kept: taking it back may have to wait."""
    (_held if nbytes < held else _free).memmove(target, source, nbytes)


def is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes lie in host memory in order, as they are."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def memory_at(where: int, nbytes: int) -> memoryview:
    """Return a writable view of memory, which the caller keeps alive."""
    view: memoryview = _view_of(where, nbytes, _WRITABLE)
    return view


class HostBytes:
    """Tensors as bytes in row-major order, by number; kept alive with it, looked at when they are asked for.

    Those that lie in host memory in order are used where they are, others are copied at once.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [
            t if is_plain_memory(t) else t.detach().cpu().resolve_conj().resolve_neg().contiguous() for t in tensors
        ]

    def __call__(self, number: int) -> memoryview:
        """Return the bytes of one tensor; any thread may ask."""
        tensor = self._tensors[number]
        nbytes = tensor.nbytes
        return memory_at(tensor.data_ptr(), nbytes) if nbytes else memoryview(b"")


def zeros_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros of a contiguous tensor's shape on its device.

    Large ones on the CPU are zero pages that nothing has touched yet, so there is no pass for the zeros. Their page faults
    are taken on a thread of their own from now on, while ranks agree and storage is waited for.
    """
    nbytes = tensor.numel() * dtype.itemsize
    if tensor.device.type != "cpu" or nbytes < _LARGE:
        return torch.zeros_like(tensor, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)
    memory = anonymous(nbytes)
    _FAULTS.add(memory)
    return torch.frombuffer(memory, dtype=dtype).reshape(tensor.shape)


class _Faults:
    """Takes the page faults of memory that will be filled soon, on one thread that ends when nothing is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: deque[memoryview] = deque()
        self._thread: threading.Thread | None = None

    def add(self, memory: memoryview) -> None:
        with self._lock:
            self._left.append(memory)
            if self._thread is None or not self._thread.is_alive():  # also in a forked child
                self._thread = threading.Thread(target=self._run, name="distckpt-faults", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    self._thread = None
                    return
                memory = self._left.popleft()
            prefault(address(memory), len(memory))


_FAULTS = _Faults()
