"""The two checkpoints of a difference: opened, their tensors paired by name, and what their digests already tell.

A pair is read region by region, so that no layout is ever gathered: stored boxes where both sides have the same ones, else
the whole tensor from its first element to its last.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distckpt.boxes import Box, is_flat_range, tiling_error
from distckpt.engines.base import MODEL
from distckpt.errors import IncompatibleState
from distckpt.export.stream import Stream
from distckpt.format.dtypes import itemsize
from distckpt.format.manifest import layout_text
from distckpt.format.shard import StoredBox
from distckpt.importers.convert import open_source
from distckpt.importers.source import Options, Source

Held = Sequence[tuple[int, StoredBox]]
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Look:
    """What of a checkpoint is looked at. ``prefix``: only tensors whose names start so, as ``model.…``; None for all."""

    path: str
    step: int | None = None
    prefix: str | None = None
    optimizer: bool = True
    allow: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """One side in a line: ``nbytes`` and ``tensors`` of what was compared, ``files`` that a distckpt checkpoint lies in."""

    kind: str
    path: str
    step: int | None
    epoch: int | float | None
    tensors: int
    nbytes: int
    world_size: int | None = None
    engine: str | None = None
    files: int | None = None


@dataclass(frozen=True)
class Side:
    """An opened checkpoint; ``names`` maps the names that are compared to the source's own, aliases included."""

    source: Source
    names: Mapping[str, str]

    def stored(self, name: str) -> str:
        """Return the source's name of the tensor behind a name."""
        own = self.names[name]
        return self.source.aliases.get(own, own)

    def stream(self, name: str) -> Stream:
        """Return the tensor under a name."""
        return self.source.tensors[self.stored(name)]

    def layout(self, name: str) -> str | None:
        """Return how its ranks held a tensor; None where the format does not say."""
        found = self.source.checkpoint
        return None if found is None else layout_text(found.manifest, found.manifest.tensors[self.stored(name)])

    def held(self, name: str) -> Held | None:
        """Return the stored boxes of a tensor with their digests; None where the format has none."""
        found = self.source.checkpoint
        return None if found is None else found.stored_boxes(self.stored(name))

    def facts(self) -> Facts:
        """Return it in a line."""
        streams = {self.stored(name): self.stream(name) for name in self.names}
        nbytes = sum(stream.nbytes for stream in streams.values())
        source = self.source
        facts = (source.kind, source.path, source.step, source.epoch, len(streams), nbytes)
        if source.checkpoint is None:
            return Facts(*facts)
        manifest = source.checkpoint.manifest
        return Facts(*facts, manifest.world_size, manifest.engine, len(manifest.shards))


def open_side(look: Look) -> Side:
    """Open one checkpoint of any kind. Raises what its importer raises, ``IncompatibleState`` for an unknown prefix."""
    options = Options(step=look.step, optimizer=look.optimizer and look.prefix is None, allow=look.allow)
    source = open_source(os.fspath(look.path), options=options)
    every = (*source.tensors, *source.aliases)
    if look.prefix is None:
        return Side(source, {name: name for name in every})
    names = {MODEL + name.removeprefix(look.prefix): name for name in every if name.startswith(look.prefix)}
    if not names:
        known = sorted({f"{name.split('.', 1)[0]}." for name in every})[:10]
        raise IncompatibleState(
            f"{source.path}: no tensor's name starts with {look.prefix!r}; names start with {known}"
        )
    return Side(source, names)


# ---------------------------------------------------------------- what is read, and what digests tell


@dataclass(frozen=True, slots=True)
class Region:
    """A box to be compared. ``equal``: runs of its row-major elements whose digests are the same on both sides."""

    box: Box
    equal: tuple[Range, ...] = ()

    @property
    def all_equal(self) -> bool:
        """Whether digests tell that nothing in it differs."""
        return self.equal == ((0, self.box.numel),)


def regions(a: Side, b: Side, name: str) -> list[Region]:
    """Cut a tensor of one dtype and shape on both sides into regions; reads headers at most."""
    stream = a.stream(name)
    one, other = a.held(name), b.held(name)
    if one is None or other is None or stream.dtype != b.stream(name).dtype:
        return [Region(Box.whole(stream.shape))]
    return equal_regions(stream.shape, itemsize(stream.dtype), one, other)


def equal_regions(shape: Sequence[int], size: int, a: Held, b: Held) -> list[Region]:
    """Return the regions to compare of a tensor with elements of ``size`` bytes, from both sides' stored boxes.

    The same boxes on both sides are compared one by one. Boxes of different layouts share digests only where both are
    runs of the tensor and their blocks begin and end at the same elements. Pure.
    """
    whole = Box.whole(shape)
    if any(tiling_error(shape, [stored.box for _, stored in held]) for held in (a, b)):
        return [Region(whole)]  # damaged: whoever reads it says so
    ours = {stored.box: (block, stored) for block, stored in a}
    theirs = {stored.box: (block, stored) for block, stored in b}
    if ours.keys() == theirs.keys():
        return [Region(box, _equal_blocks(ours[box], theirs[box], size)) for box in sorted(ours)]
    blocks = _flat_blocks(shape, size, b)
    same = [span for span, digest in _flat_blocks(shape, size, a).items() if blocks.get(span) == digest]
    return [Region(whole, _merged(same))]


def _equal_blocks(one: tuple[int, StoredBox], other: tuple[int, StoredBox], size: int) -> tuple[Range, ...]:
    (block, a), (block_b, b) = one, other
    if a.digests == b.digests and block == block_b:
        return ((0, a.box.numel),)
    if block != block_b or block % size:
        return ()
    step = block // size
    same = [i for i, pair in enumerate(zip(a.digests, b.digests, strict=True)) if pair[0] == pair[1]]
    return _merged([(i * step, min((i + 1) * step, a.box.numel)) for i in same])


def _flat_blocks(shape: Sequence[int], size: int, held: Held) -> dict[Range, str]:
    """Return (first, last) element of the tensor to digest, for blocks of stored boxes that are runs of it."""
    found: dict[Range, str] = {}
    for block, stored in held:
        flat = is_flat_range(stored.box, shape)
        if flat is None or block % size:
            continue
        step = block // size
        for number, digest in enumerate(stored.digests):
            first = flat[0] + number * step
            found[first, min(first + step, flat[1])] = digest
    return found


def _merged(ranges: Sequence[Range]) -> tuple[Range, ...]:
    out: list[Range] = []
    for first, last in sorted(ranges):
        if out and out[-1][1] == first:
            first = out.pop()[0]
        out.append((first, last))
    return tuple(out)


def segments(region: Region, step: int) -> list[tuple[int, int, bool]]:
    """Cut a region's elements into (first, last, whether digests say that they are equal), at most ``step`` long."""
    cuts: list[tuple[int, int, bool]] = []
    at = 0
    for first, last in (*region.equal, (region.box.numel, region.box.numel)):
        cuts += [(i, min(i + step, first), False) for i in range(at, first, step)]
        cuts += [(i, min(i + step, last), True) for i in range(first, last, step)]
        at = last
    return cuts
