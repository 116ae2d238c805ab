"""Boxes of many ranks as columns of numbers: what has no closed form costs 16 bytes a dimension, and no object a box."""

from __future__ import annotations

import itertools
import zlib
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

from distckpt.boxes import Box

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class BoxColumns(Sequence[tuple[Box, ...]]):
    """Item ``i`` are the boxes of the i-th rank of a mesh, made when asked for. Immutable; equal if the boxes are."""

    __slots__ = ("_ends", "_hash", "_numbers", "ndim")

    def __init__(self, ndim: int, ends: array[int], numbers: array[int]) -> None:
        """``ends[i]``: boxes of ranks up to i together. ``numbers``: each box's offsets, then its sizes."""
        rising = all(a <= b for a, b in itertools.pairwise(ends))
        if not rising or (ends[-1] if ends else 0) * 2 * ndim != len(numbers):
            raise ValueError(f"{len(numbers)} numbers are not the boxes in {ndim} dimensions that the counts say")
        self.ndim, self._ends, self._numbers = ndim, ends, numbers
        self._hash = hash((ndim, ends.tobytes(), numbers.tobytes()))

    @classmethod
    def of(cls, by_rank: Iterable[Sequence[Box]]) -> BoxColumns:
        """Return the columns of every rank's boxes, all with as many dimensions."""
        ends, numbers, ndim, count = array("q"), array("q"), 0, 0
        for held in by_rank:
            for box in held:
                ndim = box.ndim
                numbers.extend(box.offsets)
                numbers.extend(box.sizes)
            count += len(held)
            ends.append(count)
        return cls(ndim, ends, numbers)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> tuple[Box, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Box, ...]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        n, low = self.ndim, self._ends[index - 1] if index else 0
        rows = (self._numbers[i * 2 * n : (i + 1) * 2 * n] for i in range(low, self._ends[index]))
        return tuple(Box(tuple(row[:n]), tuple(row[n:])) for row in rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BoxColumns):
            return NotImplemented
        return self is other or (self._hash, self._ends, self._numbers) == (other._hash, other._ends, other._numbers)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"BoxColumns({self.boxes} boxes of {len(self)} ranks)"

    @property
    def boxes(self) -> int:
        """How many boxes there are."""
        return self._ends[-1] if self._ends else 0

    def table(self) -> NDArray[np.int64]:
        """Return the numbers as ``[boxes, 2, ndim]``: offsets and sizes. Shares memory, not writable."""
        import numpy as np

        return np.frombuffer(self._numbers.tobytes(), np.int64).reshape(self.boxes, 2, self.ndim)

    def meeting(self, box: Box) -> list[int]:
        """Return which items have a box that shares elements with ``box``, in order."""
        import numpy as np

        if not box.numel or not self.boxes:
            return []
        table = self.table()
        starts, ends = table[:, 0], table[:, 0] + table[:, 1]
        low, high = np.maximum(starts, box.offsets), np.minimum(ends, np.array(box.ends, np.int64))
        hit = np.flatnonzero((low < high).all(axis=1))
        counts = np.frombuffer(self._ends.tobytes(), np.int64)
        return [int(i) for i in np.unique(np.searchsorted(counts, hit, side="right"))]

    def pack(self) -> bytes:
        """Return the columns as bytes, deflated; one byte form."""
        import numpy as np

        table = np.frombuffer(self._numbers.tobytes(), np.int64).reshape(self.boxes, 2 * self.ndim)
        # Column by column as differences: a regular cut becomes runs of equal numbers.
        columns = np.diff(table, axis=0, prepend=table[:0].sum(axis=0, keepdims=True)).T if self.boxes else table
        head = array("q", [self.ndim, len(self._ends)])
        return zlib.compress(b"".join((head.tobytes(), self._ends.tobytes(), columns.tobytes())), 1)

    @classmethod
    def unpack(cls, data: bytes) -> BoxColumns:
        """Inverse of ``pack``; raises ``ValueError`` for other bytes."""
        import numpy as np

        try:
            plain = array("q", zlib.decompress(data))
            ndim, ranks = plain[:2]
        except (zlib.error, ValueError) as cause:
            raise ValueError(f"these bytes are no columns of boxes: {cause}") from cause
        ends = plain[2 : 2 + ranks]
        boxes = ends[-1] if ends else 0
        columns = np.array(plain[2 + ranks :], np.int64)
        if columns.size != boxes * 2 * ndim:
            raise ValueError(f"{columns.size} numbers for {boxes} boxes in {ndim} dimensions")
        numbers = array("q", np.cumsum(columns.reshape(2 * ndim, boxes), axis=1).T.tobytes())
        return cls(ndim, ends, numbers)
