"""Tensors that lie in files, as streams: strided views of a file's bytes, and several runs put end to end."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distckpt.boxes import Box, flat_range_to_boxes, is_flat_range
from distckpt.errors import CheckpointNotFound, CorruptCheckpoint
from distckpt.export.stream import Buffer, Stream
from distckpt.format.dtypes import itemsize
from distckpt.storage.posix_reader import PosixReader


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file: first byte, shape, and strides in elements."""

    path: str
    start: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie row-major and without gaps."""
        expected = 1
        for extent, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and step != expected and self.numel:
                return False
            expected *= extent
        return True

    def stream(self) -> Stream:
        """Return it as a stream; nothing is opened before the first read."""
        if self.contiguous:
            return Stream(self.dtype, self.shape, self.read, self._into)
        return Stream(self.dtype, self.shape, self._gather)

    def read(self, start: int, stop: int) -> Buffer:
        """Return bytes of a contiguous tensor. Raises ``CorruptCheckpoint`` if the file ends before."""
        return read_bytes(self.path, self.start + start, stop - start)

    def _into(self, box: Box, start: int, stop: int, view: memoryview) -> None:
        flat = is_flat_range(box, self.shape)
        if flat is None:
            Stream(self.dtype, self.shape, self.read).fill(box, start, stop, view)
        else:
            read_into(self.path, self.start + flat[0] * itemsize(self.dtype) + start, view)

    def _gather(self, start: int, stop: int) -> Buffer:
        """Return row-major bytes of a tensor with other strides, through a mapping of the file."""
        import numpy as np

        size = itemsize(self.dtype)
        first, last = start // size, -(-stop // size)
        reach = sum((extent - 1) * step for extent, step in zip(self.shape, self.stride, strict=True)) + 1
        mapped = np.memmap(self.path, np.dtype(f"V{size}"), "r", self.start, (reach,))
        steps = tuple(step * size for step in self.stride)
        view = np.lib.stride_tricks.as_strided(mapped, self.shape, steps, writeable=False)
        out = bytearray()
        for box in flat_range_to_boxes(self.shape, first, last):
            out += np.ascontiguousarray(view[box.slices]).tobytes()
        return memoryview(out)[start - first * size : stop - first * size]


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [start, stop) of a flat tensor in a file."""

    tensor: FileTensor
    start: int
    stop: int


def joined(dtype: str, shape: tuple[int, ...], runs: Sequence[Run], where: str) -> Stream:
    """Return the tensor whose row-major elements are these runs, one after another.

    Raises ``CorruptCheckpoint`` unless they are exactly as many as the shape needs.
    """
    ends = list(itertools.accumulate(run.stop - run.start for run in runs))
    if (ends[-1] if ends else 0) != math.prod(shape):
        raise CorruptCheckpoint(
            f"{where}: {ends[-1] if ends else 0} elements for shape {list(shape)}; a file is missing"
        )
    size = itemsize(dtype)

    def read(start: int, stop: int) -> Buffer:
        out = bytearray()
        at = start
        index = bisect.bisect_right(ends, start // size)
        while at < stop:
            run, begin = runs[index], (ends[index - 1] if index else 0) * size
            end = min(stop, ends[index] * size)
            if end > at:
                out += run.tensor.read(run.start * size + at - begin, run.start * size + end - begin)
                at = end
            index += 1
        return out

    return Stream(dtype, shape, read)


def read_bytes(path: str, start: int, count: int) -> bytearray:
    """Return exactly ``count`` bytes of a file; ``CorruptCheckpoint`` if it is shorter."""
    out = bytearray(count)
    read_into(path, start, memoryview(out))
    return out


def read_into(path: str, start: int, view: memoryview) -> None:
    """Fill a view with a file's bytes; ``CorruptCheckpoint`` if it is shorter. Large reads pass the page cache by."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if start + len(view) > size:
            raise CorruptCheckpoint(f"{path}: ends at byte {size}, {start + len(view)} are needed; truncated")
        with contextlib.closing(PosixReader(file.fileno(), size, path=path, count=lambda what, amount: None)) as reader:
            reader.read_into(start, view)


def regular_file(path: str | os.PathLike[str]) -> Path:
    """Return a path that is a regular file (links are followed); ``CheckpointNotFound`` if it is not one."""
    found = Path(path)
    if not found.is_file():
        raise CheckpointNotFound(f"{found}: no such file, or not a regular one")
    return found
