"""Who of several ranks that hold the same boxes writes what: one rule, for writers and for readers.

Replicas are the ranks of a mesh that differ only in the dimensions that replicate. All tensors of a mesh that replicate
in the same dimensions are shared out together. Small boxes (optimizer steps, norms) stay with replica 0, so that a
reader of any layout opens one shard for all of them; the other boxes' bytes are laid end to end and cut evenly. A cut
within a large box falls between two rows, within another one at its nearer end.

Writers hold to this rule; to readers it is only a hint where to look first, for a shard's header is the truth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distckpt.boxes import Box
from distckpt.format.dtypes import itemsize
from distckpt.format.layout import Layout, Mesh, held_boxes, replicas_at

CUT_BYTES = 1 << 20
"""Boxes up to this size go to one replica whole: cutting them would cost more than it balances."""
SMALL_BYTES = 64 << 10
"""Boxes up to this size stay with replica 0, as long as all of these together have at most ``SMALL_TOTAL`` bytes."""
SMALL_TOTAL = 1 << 20

Group = tuple[Mesh, tuple[bool, ...]]
"""What tensors have in common that are shared out together: the mesh, and which of its dimensions replicate."""


def group_of(layout: Layout) -> Group:
    """Return the group of tensors that a tensor of this layout is shared out with."""
    return layout.mesh, tuple([text == "R" for text in layout.placements])


@dataclass(frozen=True, slots=True)
class Line:
    """The boxes that ``count`` replicas all hold, end to end. ``starts[i]`` is -1 for a small one.

    ``nbytes[i]`` and ``rows[i]`` (extent of the first dimension, 1 of a 0-d box) belong to box ``i``.
    """

    nbytes: tuple[int, ...]
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    small: int
    total: int
    count: int

    def share(self, index: int) -> Iterator[tuple[int, int, int]]:
        """Yield (box, first row, last row + 1) of what the index-th replica writes."""
        for i, start in enumerate(self.starts):
            if start < 0:
                if index == 0:
                    yield i, 0, self.rows[i]
                continue
            first, last = self._first_row(i, index), self._first_row(i, index + 1)
            if first < last:
                yield i, first, last

    def writers(self, i: int, first: int, last: int) -> list[int]:
        """Return the replicas that write a row of box ``i`` in ``[first, last)``."""
        start, nbytes = self.starts[i], self.nbytes[i]
        if start < 0 or not nbytes or self.count == 1:
            return [0]
        begin, end = start, start + nbytes
        if nbytes > CUT_BYTES:
            begin, end = start + nbytes * first // self.rows[i], start + nbytes * last // self.rows[i]
        whole = self.small + self.total
        low = max(0, (self.small + begin) * self.count // whole - 1)
        high = min(self.count - 1, (self.small + end) * self.count // whole + 1)
        bounds = [self._first_row(i, index) for index in range(low, high + 2)]
        return [low + c for c, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b and a < last and first < b]

    def _first_row(self, i: int, index: int) -> int:
        """Return the first row of box ``i`` that is not some earlier replica's than the index-th."""
        if index == 0:
            return 0
        return self.rows[i] if index == self.count else self._rows_before(i, self._cut(index))

    def _cut(self, index: int) -> int:
        """Return where on the line the index-th replica's share starts (index > 0)."""
        return max(0, (self.small + self.total) * index // self.count - self.small)

    def _rows_before(self, i: int, cut: int) -> int:
        """Return how many rows of box ``i`` lie before a place on the line."""
        position, nbytes, rows = cut - self.starts[i], self.nbytes[i], self.rows[i]
        if position <= 0 or nbytes == 0:
            return 0
        if position >= nbytes:
            return rows
        if nbytes <= CUT_BYTES:
            return rows if position * 2 > nbytes else 0
        return position * rows // nbytes


def line_of(boxes: Sequence[Box], sizes: Sequence[int], count: int) -> Line:
    """Lay boxes, whose elements have ``sizes`` bytes, end to end for ``count`` replicas."""
    nbytes = [box.numel * size for box, size in zip(boxes, sizes, strict=True)]
    starts, small, total = [], 0, 0
    for octets in nbytes:
        if octets <= SMALL_BYTES and small + octets <= SMALL_TOTAL:
            starts.append(-1)
            small += octets
        else:
            starts.append(total)
            total += octets
    rows = tuple([box.sizes[0] if box.sizes else 1 for box in boxes])
    return Line(tuple(nbytes), rows, tuple(starts), small, total, count)


class Writers:
    """Which ranks wrote a box, for readers: ``tensors`` are all (dtype, shape, layout) of a checkpoint by FQN."""

    def __init__(self, tensors: Mapping[str, tuple[str, Sequence[int], Layout]]) -> None:
        self._tensors = tensors
        self._groups: dict[Group, list[str]] = {}
        for fqn in sorted(tensors):
            layout = tensors[fqn][2]
            if layout.explicit is None and "R" in layout.placements:
                self._groups.setdefault(group_of(layout), []).append(fqn)
        self._lines: dict[tuple[Group, tuple[int, ...]], tuple[Line, dict[str, list[tuple[int, Box]]]]] = {}

    def of(self, fqn: str, cell: tuple[int, ...], box: Box) -> list[int]:
        """Return the ranks at a cell of the tensor's mesh (see ``meeting_cells``) that wrote parts of the box."""
        layout = self._tensors[fqn][2]
        if "R" not in layout.placements:
            return replicas_at(layout, cell)
        line, places = self._line(group_of(layout), cell)
        found: set[int] = set()
        for i, held in places.get(fqn, ()):
            common = held.intersect(box)
            if common is not None:
                first = common.offsets[0] - held.offsets[0] if held.sizes else 0
                found.update(line.writers(i, first, first + (common.sizes[0] if held.sizes else 1)))
        return replicas_at(layout, cell, sorted(found))

    def _line(self, group: Group, cell: tuple[int, ...]) -> tuple[Line, dict[str, list[tuple[int, Box]]]]:
        known = self._lines.get((group, cell))
        if known is None:
            mesh, mask = group
            rank = mesh.rank_at(cell)
            boxes: list[Box] = []
            sizes: list[int] = []
            places: dict[str, list[tuple[int, Box]]] = {}
            for fqn in self._groups[group]:
                dtype, shape, layout = self._tensors[fqn]
                for held in held_boxes(shape, layout, rank):
                    places.setdefault(fqn, []).append((len(boxes), held.box))
                    boxes.append(held.box)
                    sizes.append(itemsize(dtype))
            count = math.prod(itertools.compress(mesh.shape, mask))
            known = self._lines[group, cell] = (line_of(boxes, sizes, count), places)
        return known
