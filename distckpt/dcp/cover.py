"""One number for a set of boxes, whose sum over ranks tells whether they cover every tensor exactly once.

Every element of every tensor has a weight: ``c * product of r_d ** index_d`` modulo the prime 2**61 - 1, with ``c`` drawn
for the tensor and ``r_d`` for the dimension. The weights of a box add up in closed form (a geometric series in each
dimension), so a rank adds up its own boxes alone, and sums of all ranks are compared with the whole tensors' in
O(ranks + tensors). Two sums are equal for boxes that do not cover every element exactly once only if the draw hits a
root of their difference, a polynomial with one coefficient an element: with a chance of at most (extents of the
tensor) / 2**61 (Schwartz 1980, Zippel 1979). A box without elements, of a tensor without any, counts as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from distckpt.boxes import Box
from distckpt.format import digest as digests

PRIME = (1 << 61) - 1
_LOW31, _LOW30 = np.uint64((1 << 31) - 1), np.uint64((1 << 30) - 1)


def cover_of(boxes: Iterable[tuple[str, Box]], seed: str) -> int:
    """Return the sum of the weights of (tensor name, box) pairs, in [0, 2**61 - 1); equal seeds draw equal weights."""
    names: list[str] = []
    rows: list[Box] = []
    for fqn, box in boxes:
        names.append(fqn)
        rows.append(box)
    if not rows:
        return 0
    ndim = max(box.ndim for box in rows)
    table = np.zeros((len(rows), 2, ndim), np.int64)
    table[:, 1] = 1  # a missing dimension is one of extent 1
    by_ndim: dict[int, list[int]] = {}
    for i, box in enumerate(rows):
        by_ndim.setdefault(box.ndim, []).append(i)
    for n, at in by_ndim.items():
        table[at, :, :n] = [(rows[i].offsets, rows[i].sizes) for i in at]
    drawn: dict[str, int] = {}
    coefficients = [drawn.get(fqn) or drawn.setdefault(fqn, _drawn(seed, fqn)) for fqn in names]
    return _sum(_weights(table, seed), np.array(coefficients, np.uint64))


def cover_of_table(fqn: str, table: NDArray[np.int64], seed: str) -> int:
    """Return the same for one tensor's boxes as ``[boxes, 2, ndim]`` numbers, offsets and sizes."""
    coefficients = np.full(len(table), _drawn(seed, fqn), np.uint64)
    return _sum(_weights(table, seed), coefficients) if len(table) else 0


def whole_cover(tensors: Iterable[tuple[str, Sequence[int]]], seed: str) -> int:
    """Return what the boxes of all ranks must add up to for tensors (name, global shape)."""
    return cover_of(((fqn, Box.whole(shape)) for fqn, shape in tensors), seed)


def added(covers: Iterable[int]) -> int:
    """Return the sum over ranks."""
    return sum(covers) % PRIME


def _drawn(seed: str, what: str) -> int:
    return int(digests.digest(f"{seed}/{what}".encode()), 16) % (PRIME - 2) + 2  # neither 0 nor 1


def _weights(table: NDArray[np.int64], seed: str) -> NDArray[np.uint64]:
    """Return each box's product over dimensions of the series from its offset to its end; 1 for an empty box."""
    out = np.ones(len(table), np.uint64)
    for dim in range(table.shape[2]):
        base = _drawn(seed, f"dimension {dim}")
        inverse = pow(base - 1, -1, PRIME)
        bounds, where = np.unique(
            np.concatenate([table[:, 0, dim], table[:, 0, dim] + table[:, 1, dim]]), return_inverse=True
        )
        series = np.array([(pow(base, int(b), PRIME) - 1) * inverse % PRIME for b in bounds], np.uint64)[where]
        starts, ends = series[: len(table)], series[len(table) :]
        out = _times(out, np.where(ends >= starts, ends - starts, ends + np.uint64(PRIME) - starts))
    out[(table[:, 1] == 0).any(axis=1)] = 1
    return out


def _sum(weights: NDArray[np.uint64], coefficients: NDArray[np.uint64]) -> int:
    found = _times(weights, coefficients)
    high, low = (found >> np.uint64(32)).sum(), (found & np.uint64(0xFFFFFFFF)).sum()
    return ((int(high) << 32) + int(low)) % PRIME


def _times(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Multiply modulo 2**61 - 1 without 128-bit numbers: halves of 31 and 30 bits, 2**61 is 1."""
    au, al, bu, bl = a >> np.uint64(31), a & _LOW31, b >> np.uint64(31), b & _LOW31
    middle = al * bu + au * bl
    high, low = middle >> np.uint64(30), middle & _LOW30
    total: NDArray[np.uint64] = au * bu * np.uint64(2) + high + (low << np.uint64(31)) + al * bl
    total = (total >> np.uint64(61)) + (total & np.uint64(PRIME))
    total -= np.where(total >= np.uint64(PRIME), np.uint64(PRIME), np.uint64(0))
    return total
