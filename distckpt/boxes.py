"""Box: a rectangular region of a global tensor. Pure geometry, no torch; everything that is saved or loaded is boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec


class Box(msgspec.Struct, frozen=True, order=True, gc=False):
    """Region ``offsets[i] <= index[i] < offsets[i] + sizes[i]`` of an n-dimensional tensor, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise ValueError(f"box with {len(self.offsets)} offsets and {len(self.sizes)} sizes")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.sizes)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d box."""
        return math.prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        """First index past the box in each dimension."""
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that takes this box out of a tensor whose zero is the origin."""
        return tuple(slice(o, e) for o, e in zip(self.offsets, self.ends, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Return the common region, or None where there is none (also where it would have no elements)."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(map(min, self.ends, other.ends))
        if any(e <= o for o, e in zip(offsets, ends, strict=True)):
            return None
        return Box(offsets, tuple(e - o for o, e in zip(offsets, ends, strict=True)))

    def contains(self, other: Box) -> bool:
        """Whether ``other`` lies within this box."""
        return all(
            so <= oo and oe <= se
            for so, oo, oe, se in zip(self.offsets, other.offsets, other.ends, self.ends, strict=True)
        )

    def relative_to(self, origin: Sequence[int]) -> Box:
        """Return this box in coordinates whose zero is ``origin``."""
        return Box(tuple(o - z for o, z in zip(self.offsets, origin, strict=True)), self.sizes)

    def moved_by(self, origin: Sequence[int]) -> Box:
        """Return this box, given relative to ``origin``, in absolute coordinates."""
        return Box(tuple(o + z for o, z in zip(self.offsets, origin, strict=True)), self.sizes)

    def rows(self, start: int, stop: int) -> Box:
        """Return the part of this box with ``start <= row < stop``, rows counted from its own start."""
        return Box((self.offsets[0] + start, *self.offsets[1:]), (stop - start, *self.sizes[1:]))


def flat_range_to_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut the row-major flat element range ``[start, stop)`` of a tensor into boxes, in row-major order.

    At most ``2 * ndim - 1`` boxes result: a ragged head, whole rows, a ragged tail, in each dimension.
    """
    numel = math.prod(shape)
    if not 0 <= start <= stop <= numel:
        raise ValueError(f"flat range [{start}, {stop}) outside a tensor of {numel} elements")
    if start == stop:
        return []
    return list(_cut(tuple(shape), start, stop))


def _cut(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if head and first == last:
        yield from _at_row(first, _cut(shape[1:], head, tail))
        return
    if head:
        yield from _at_row(first, _cut(shape[1:], head, row))
        first += 1
    if last > first:
        yield Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    if tail:
        yield from _at_row(last, _cut(shape[1:], 0, tail))


def _at_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    for box in boxes:
        yield Box((row, *box.offsets), (1, *box.sizes))


def is_flat_range(box: Box, shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the flat element range ``(start, stop)`` that the box fills in a row-major tensor of ``shape``.

    None where the box is not contiguous there. ``box`` is relative to that tensor's own start.
    """
    if box.numel == 0:
        return (0, 0)
    start, stride, open_above = 0, 1, True
    for offset, size, extent in zip(reversed(box.offsets), reversed(box.sizes), reversed(tuple(shape)), strict=True):
        if not open_above and size != 1:
            return None
        if size != extent:
            open_above = False
        start += offset * stride
        stride *= extent
    return (start, start + box.numel)


def tiling_error(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Return why the boxes do not cover every element of ``shape`` exactly once; None where they do.

    Boxes without elements are ignored. The set is cut along planes that no box crosses until single boxes are
    left: grids and flat ranges, whichever dimension they cut, cost a few sorts. Only where no such plane exists
    (boxes that overlap, or wind around each other) are pairs compared.
    """
    whole = Box.whole(shape)
    solid = [box for box in boxes if box.numel]
    for box in solid:
        if box.ndim != whole.ndim or not whole.contains(box) or min(box.offsets, default=0) < 0:
            return f"box {box.offsets}+{box.sizes} lies outside shape {tuple(shape)}"
    pending = [solid] if len(solid) > 1 else []
    while pending:
        group = pending.pop()
        parts = next((parts for dim in range(whole.ndim) if len(parts := _parts(group, dim)) > 1), None)
        if parts is None:
            for i, box in enumerate(group):
                for other in group[:i]:
                    if other.intersect(box):
                        return f"boxes {other.offsets}+{other.sizes} and {box.offsets}+{box.sizes} overlap"
        else:
            pending.extend(part for part in parts if len(part) > 1)
    covered = sum(box.numel for box in solid)
    if covered != whole.numel:
        return f"boxes cover {covered} of {whole.numel} elements"
    return None


def _parts(boxes: list[Box], dim: int) -> list[list[Box]]:
    """Cut boxes into groups along every plane across ``dim`` that none of them crosses."""
    parts: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda b: b.offsets[dim]):
        start = box.offsets[dim]
        if start >= end or not parts:
            parts.append([])
        parts[-1].append(box)
        end = max(end, start + box.sizes[dim])
    return parts
