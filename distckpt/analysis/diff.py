"""``diff_checkpoints``: what two checkpoints differ in, of any two formats and layouts, streamed by block.

No tensor is ever whole in memory, and no layout is gathered. Where both sides are distckpt's own, equal digests of blocks
stand for equal bytes, which are then not read: of a tensor all of whose digests are equal nothing, else one side's copy.
"""

from __future__ import annotations

import fnmatch
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

import torch

from distckpt.analysis.flags import Context, Flag, find_flags
from distckpt.analysis.sides import Facts, Look, Region, Side, open_side, regions, segments
from distckpt.analysis.stats import Change, Totals, comparable
from distckpt.analysis.values import ValueDiff, compare_values, moved_streams
from distckpt.boxes import Box, flat_range_to_boxes
from distckpt.dcp.leaves import torch_dtype
from distckpt.dcp.parallel import run_all
from distckpt.engines.base import MODEL, OPTIM_STATE
from distckpt.errors import ConfigError
from distckpt.export.stream import Stream
from distckpt.format.dtypes import itemsize
from distckpt.storage.direct import BufferPool

BLOCK_BYTES: Final = 4 << 20
"""Bytes of the wider side that are read at once."""
THREADS: Final = 4
"""Tensors compared at once; each takes two buffers of 8 MiB."""

How = Literal["values", "digests", "shape", "dtype"]
Progress = Callable[[int, int], None]
"""Called with (bytes compared, bytes to compare), one call at a time."""


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor that both sides have; pairs are of A and B. ``layouts`` where a format tells them.

    ``how`` it was compared: by its ``values``, by equal ``digests`` alone (nothing was read), or not at all, as the
    ``shape`` or the kind of ``dtype`` differs. ``change`` is there for ``values``.
    """

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    layouts: tuple[str | None, str | None]
    how: How
    change: Change | None = None

    @property
    def differs(self) -> bool:
        """Whether its values do, beyond the tolerance, or cannot be compared."""
        return self.how in ("shape", "dtype") or (self.change is not None and self.change.beyond > 0)

    @property
    def relative_update(self) -> float | None:
        """‖B - A‖ / ‖A‖; None where they were not compared, NaN where one side has values that are not finite."""
        if self.change is None:
            return 0.0 if self.how == "digests" else None
        if self.change.changed and any((*self.change.nan, *self.change.inf)):
            return math.nan
        return self.change.relative_update


@dataclass(frozen=True, slots=True)
class Diff:
    """What two checkpoints differ in.

    ``only_a``, ``only_b``: names of tensors on one side; ``ties``: names that are one tensor on one side and two on the
    other. Ties, layouts, world sizes and flags are told, but are no differences: the same state loads from either.
    ``read_bytes``: of tensors, on both sides; ``skipped_bytes``: not read, because digests were equal.
    """

    a: Facts
    b: Facts
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    ties: tuple[str, ...]
    tensors: tuple[TensorDiff, ...]
    values: tuple[ValueDiff, ...]
    flags: tuple[Flag, ...]
    notes: tuple[str, ...]
    read_bytes: int
    skipped_bytes: int

    @property
    def equal(self) -> bool:
        """Whether there is no difference: the same names, dtypes, shapes, and values within the tolerance."""
        return not (self.only_a or self.only_b or self.values or self.differing)

    @property
    def differing(self) -> tuple[TensorDiff, ...]:
        """Tensors that differ in dtype, shape or values: the model's first, of these the largest relative update."""
        found = [t for t in self.tensors if t.differs or t.dtypes[0] != t.dtypes[1]]
        return tuple(sorted(found, key=lambda t: (not t.name.startswith(MODEL), -_size(t))))

    @property
    def skipped(self) -> int:
        """How many tensors were not read at all."""
        return sum(t.how == "digests" for t in self.tensors)

    @property
    def relaid(self) -> dict[tuple[str, str], int]:
        """How many tensors changed from which layout to which, where both sides tell."""
        found: dict[tuple[str, str], int] = {}
        for t in self.tensors:
            if None not in t.layouts and t.layouts[0] != t.layouts[1]:
                pair = (str(t.layouts[0]), str(t.layouts[1]))
                found[pair] = found.get(pair, 0) + 1
        return found

    @property
    def summary(self) -> str:
        """The outcome in a sentence."""
        count = len(self.tensors)
        parts = [
            f"{sum(t.differs for t in self.tensors)} of {count} tensors differ",
            f"{sum(t.dtypes[0] != t.dtypes[1] for t in self.tensors)} in dtype",
            f"{len(self.only_a)} only in A",
            f"{len(self.only_b)} only in B",
            f"{len(self.values)} other values differ",
        ]
        said = [part for part in parts if not part.startswith("0 ")]
        if self.equal:
            return f"equal: {count} tensors, {self.skipped} of them by their digests alone"
        return f"different: {'; '.join(said)}"

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "equal": self.equal,
            "differing": [t.name for t in self.differing],
            **asdict(self),
            "tensors": [
                {**asdict(t), "differs": t.differs, "relative_update": t.relative_update} for t in self.tensors
            ],
        }


def diff_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    step_a: int | None = None,
    step_b: int | None = None,
    weights: bool = False,
    prefix_a: str = MODEL,
    prefix_b: str = MODEL,
    only: Sequence[str] = (),
    frozen: Sequence[str] = (),
    atol: float = 0.0,
    rtol: float = 0.0,
    allow: Sequence[str] = (),
    threads: int = THREADS,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints: distckpt (a root's newest, a step), Hugging Face, DCP, ``torch.save``, DeepSpeed.

    ``step_a``, ``step_b``: which step, where a path has several. ``weights``: the model's tensors alone. ``prefix_a``,
    ``prefix_b``: which tensors are the model's, others than ``model.`` imply ``weights``: ``prefix_b="ema."`` compares an
    EMA with weights. ``only``: patterns of names (``model.layers.0.*``); then values are left out too. ``frozen``:
    patterns of names that must not change. ``atol``, ``rtol``: elements differ if |b - a| > atol + rtol·|a|.
    ``allow``: classes whose attributes may be read from pickles.

    Parts that a format has no place for (optimizer, metrics, ... in a Hugging Face folder) are left out and noted. Memory:
    two buffers of 8 MiB a thread, whatever the size of the model. Damage behind equal digests is not seen (``verify``).
    Raises ``ConfigError`` (no such pattern), ``CheckpointNotFound``, ``CorruptCheckpoint``, ``ShardError``.
    """
    if not (atol >= 0 and rtol >= 0):
        raise ConfigError(f"atol={atol}, rtol={rtol}: want numbers that are not negative")
    selected = weights or (prefix_a, prefix_b) != (MODEL, MODEL)
    looks = [
        Look(os.fspath(path), step, prefix if selected else None, not selected, tuple(allow))
        for path, step, prefix in ((a, step_a, prefix_a), (b, step_b, prefix_b))
    ]
    one, other = (_chosen(open_side(look), only) for look in looks)
    if only and not (one.names or other.names):
        raise ConfigError(f"only={list(only)}: neither checkpoint has a tensor of such a name")
    one, other, notes = _comparable_parts(one, other)
    work = _Work(one, other, atol, rtol, progress)
    tensors = work.run(threads)
    values, more = ([], []) if selected or only else compare_values(one.source, other.source)
    flags = find_flags(tensors, _context(one, other, frozen))
    if not (selected or only):
        flags += _rng_flags(one, other)
    return Diff(
        a=one.facts(),
        b=other.facts(),
        only_a=tuple(name for name in one.names if name not in other.names),
        only_b=tuple(name for name in other.names if name not in one.names),
        ties=_ties(one, other),
        tensors=tuple(tensors),
        values=tuple(values),
        flags=tuple(flags),
        notes=(*notes, *more, *one.source.notes, *other.source.notes),
        read_bytes=work.read_bytes,
        skipped_bytes=work.skipped_bytes,
    )


# ---------------------------------------------------------------- which tensors


def _chosen(side: Side, only: Sequence[str]) -> Side:
    if not only:
        return side
    kept = {
        name: own
        for name, own in side.names.items()
        if any(fnmatch.fnmatchcase(n, pattern) for pattern in only for n in (name, name.removeprefix(MODEL)))
    }
    return Side(side.source, kept)


def _comparable_parts(a: Side, b: Side) -> tuple[Side, Side, list[str]]:
    """Leave out parts of the state (``optim.``, ``ema.``) that a side of another format does not have at all."""
    if a.source.kind == b.source.kind:
        return a, b, []
    notes, kept = [], [dict(a.names), dict(b.names)]
    for here, there, mine in ((a, b, kept[0]), (b, a, kept[1])):
        parts = {name.split(".", 1)[0] for name in there.names} | {MODEL.rstrip(".")}
        gone = [name for name in mine if name.split(".", 1)[0] not in parts]
        for name in gone:
            del mine[name]
        for part in sorted({name.split(".", 1)[0] for name in gone}):
            count = sum(name.split(".", 1)[0] == part for name in gone)
            notes.append(
                f"{part}.*: {count} tensors of {here.source.name} not compared, {there.source.name} "
                f"({there.source.kind}) has none"
            )
    return Side(a.source, kept[0]), Side(b.source, kept[1]), notes


def _ties(a: Side, b: Side) -> tuple[str, ...]:
    """Return names that share a tensor with another name on one side and do not on the other."""
    common = [name for name in a.names if name in b.names]
    groups: list[dict[str, str]] = []
    for side in (a, b):
        first: dict[str, str] = {}
        groups.append({name: first.setdefault(side.stored(name), name) for name in common})
    return tuple(name for name in common if groups[0][name] != groups[1][name])


def _context(a: Side, b: Side, frozen: Sequence[str]) -> Context:
    sources = (a.source, b.source)
    state = {name for s in sources for name in (*s.tensors, *s.aliases) if name.startswith(OPTIM_STATE)}
    aliases: dict[str, str] = {}
    for side in (b, a):
        first: dict[str, str] = {}
        for name in side.names:
            aliases[name] = first.setdefault(side.stored(name), name)
    return Context((a.source.step, b.source.step), frozenset(state), aliases, tuple(frozen))


def _rng_flags(a: Side, b: Side) -> list[Flag]:
    moved = moved_streams(a.source.per_rank, b.source.per_rank)
    if not moved:
        return []
    pairs = ", ".join(f"rank {rank} what rank {before} had" for rank, before in moved[:5])
    return [Flag("rng-moved", "problem", f"ranks of B have other ranks' random number states of A: {pairs}")]


def _size(tensor: TensorDiff) -> float:
    found = tensor.relative_update
    return math.inf if found is None or math.isnan(found) else found


# ---------------------------------------------------------------- reading


@dataclass(slots=True)
class _Work:
    """The comparison of all pairs; counts what is read."""

    a: Side
    b: Side
    atol: float
    rtol: float
    progress: Progress | None
    read_bytes: int = 0
    skipped_bytes: int = 0
    _done: int = 0
    _total: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pool: BufferPool = field(default_factory=lambda: BufferPool(limit=2 * THREADS))

    def run(self, threads: int) -> list[TensorDiff]:
        """Compare every pair of tensors that both sides have once, whatever its names."""
        pairs: dict[tuple[str, str], str] = {}
        for name in self.a.names:
            if name in self.b.names:
                pairs.setdefault((self.a.stored(name), self.b.stored(name)), name)
        names = list(pairs.values())
        self._total = sum(self.a.stream(n).nbytes + self.b.stream(n).nbytes for n in names)
        found: dict[str, TensorDiff] = {}
        run_all(lambda name: found.__setitem__(name, self._compare(name)), names, threads, "diff")
        return [found[name] for name in names]

    def _compare(self, name: str) -> TensorDiff:
        one, other = self.a.stream(name), self.b.stream(name)
        facts: Mapping[str, Any] = {
            "name": name,
            "dtypes": (one.dtype, other.dtype),
            "shapes": (one.shape, other.shape),
            "layouts": (self.a.layout(name), self.b.layout(name)),
        }
        nbytes = one.nbytes + other.nbytes
        if one.shape != other.shape:
            self._count(skipped=0, done=nbytes)
            return TensorDiff(**facts, how="shape")
        if not comparable(one.dtype, other.dtype):
            self._count(skipped=0, done=nbytes)
            return TensorDiff(**facts, how="dtype")
        cut = regions(self.a, self.b, name)
        if nbytes and all(region.all_equal for region in cut):
            self._count(skipped=nbytes, done=nbytes)
            return TensorDiff(**facts, how="digests")
        totals = Totals((one.dtype, other.dtype), self.atol, self.rtol)
        at: tuple[int, ...] | None = None
        for region in cut:
            before, largest = totals.elements, totals.max_abs
            self._read(one, other, region, totals)
            if totals.max_abs > largest and totals.at is not None:
                at = _index(region.box, totals.at - before // totals.parts)
        return TensorDiff(**facts, how="values", change=replace(totals.change(), at=at))

    def _read(self, one: Stream, other: Stream, region: Region, totals: Totals) -> None:
        """Add one region to the totals."""
        sizes = itemsize(one.dtype), itemsize(other.dtype)
        step = BLOCK_BYTES // max(sizes)
        with self._pool.lend() as first, self._pool.lend() as second:
            for start, stop, equal in segments(region, step):
                x = _values(one, region.box, start, stop, first)
                if equal:
                    totals.add_same(x)
                else:
                    totals.add(x, _values(other, region.box, start, stop, second))
                mine, theirs = ((stop - start) * size for size in sizes)
                skipped = theirs if equal else 0
                self._count(skipped=skipped, done=mine + theirs, read=mine + theirs - skipped)

    def _count(self, *, skipped: int, done: int, read: int = 0) -> None:
        with self._lock:
            self.read_bytes += read
            self.skipped_bytes += skipped
            self._done += done
            if self.progress is not None:
                self.progress(self._done, self._total)


def _values(stream: Stream, box: Box, first: int, last: int, buffer: memoryview) -> torch.Tensor:
    """Read row-major elements [first, last) of a box into ``buffer`` and return them, 1-D, sharing its memory."""
    size = itemsize(stream.dtype)
    part = buffer[: (last - first) * size]
    stream.fill(box, first * size, last * size, part)
    return torch.frombuffer(part, dtype=torch.uint8).view(torch_dtype(stream.dtype))


def _index(box: Box, element: int) -> tuple[int, ...]:
    """Return the index in the whole tensor of a box's row-major element."""
    return flat_range_to_boxes(box.sizes, element, element + 1)[0].moved_by(box.offsets).offsets
