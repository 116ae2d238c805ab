"""Norms of the weights of every checkpoint, and of what changed since the one before: streamed, verified, remembered.

Of each tensor two pieces are in memory at a time. What was computed is kept beside the evaluations of the step, by the digests
of both manifests, so a report costs reading only what is new.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from distckpt.analysis.record import Run, Save
from distckpt.boxes import Box
from distckpt.errors import AlreadyExists, CorruptCheckpoint, IncompatibleState, StoreError
from distckpt.format import names
from distckpt.format.checkpoint import Checkpoint, open_checkpoint
from distckpt.format.dtypes import itemsize
from distckpt.format.plain_json import canonical, strict_loads

log = logging.getLogger("distckpt")
PIECE: Final = 4 << 20
"""Bytes of a tensor that are read at a time."""
PREFIX: Final = "model."
_MAX_BYTES: Final = 64 << 20
_LAYER: Final = re.compile(r"^(.*?\.\d+)\.")
Squares = dict[str, tuple[float, float]]
"""Tensor to the sum of squares of its elements, and of their change; NaN for a tensor that the other lacks."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Norms:
    """L2 norms of one checkpoint's floating-point weights. ``update``: of the change since ``since``, NaN without one.

    ``layers``: the same (weight, update) by layer, the names up to the first number.
    """

    step: int
    since: int | None
    weight: float
    update: float
    layers: dict[str, tuple[float, float]]


def cost(run: Run) -> int:
    """Return the bytes of weights that would have to be read."""
    return sum(save.groups[0] for save in run.kept if save.groups)


def weight_norms(run: Run, *, compute: bool = True, progress: Progress | None = None) -> tuple[list[Norms], list[str]]:
    """Return the norms of every whole checkpoint of the lineage, and what could not be read.

    Without ``compute`` only what was kept by an earlier call. Weights are the tensors below ``model.``; each is read once
    in all. Sums are in float64.
    """
    line, problems = run.kept, []
    found: dict[int, Squares] = {}
    for index, save in enumerate(line):
        known = _remembered(run, save, line[index - 1] if index else None)
        if known is not None:
            found[index] = known
    missing = [index for index in range(len(line)) if index not in found]
    if missing and compute:
        wanted = sorted({*missing, *(index - 1 for index in missing if index)})
        opened: dict[int, Checkpoint] = {}
        for index in wanted:
            try:
                opened[index] = open_checkpoint(f"{run.root}/{line[index].committed.manifest_path}")
            except (CorruptCheckpoint, StoreError) as error:
                problems.append(str(error))
        computed, bad = _compute(opened, progress)
        problems += bad
        for index in missing:
            if index in computed:
                found[index] = computed[index]
                if not index or index - 1 in computed:
                    _remember(run, line[index], line[index - 1] if index else None, computed[index])
    return [_norms(line, index, found[index]) for index in sorted(found)], problems


def _norms(line: Sequence[Save], index: int, squares: Squares) -> Norms:
    layers: dict[str, tuple[float, float]] = {}
    for fqn, (weight, change) in squares.items():
        layer = _layer(fqn)
        before = layers.get(layer, (0.0, 0.0))
        layers[layer] = (before[0] + weight, before[1] + change)
    total = [math.sqrt(sum(pair[which] for pair in squares.values())) for which in (0, 1)]
    return Norms(
        line[index].step, line[index - 1].step if index else None, total[0], total[1],
        {name: (math.sqrt(w), math.sqrt(u)) for name, (w, u) in layers.items()},
    )  # fmt: skip


def _layer(fqn: str) -> str:
    name = fqn.removeprefix(PREFIX)
    found = _LAYER.match(f"{name}.")
    return found[1] if found else name.rpartition(".")[0] or name


# ---------------------------------------------------------------- reading


def _compute(opened: dict[int, Checkpoint], progress: Progress | None) -> tuple[dict[int, Squares], list[str]]:
    """Read tensor by tensor through all checkpoints; one that turns out to be damaged has no result."""
    found: dict[int, Squares] = {index: {} for index in opened}
    problems: list[str] = []
    total, done = sum(nbytes for one in opened.values() for _, nbytes in _weights(one)), 0
    every = dict.fromkeys(fqn for one in opened.values() for fqn, _ in _weights(one))
    for fqn in every:
        for index, squares in _through(fqn, opened):
            if isinstance(squares, str):
                problems.append(squares)
                found.pop(index, None)
                opened.pop(index)
                continue
            found[index][fqn] = squares
            if progress is not None:
                done += _nbytes(opened[index], fqn)
                progress(done, total)
    return found, problems


def _through(fqn: str, opened: dict[int, Checkpoint]) -> list[tuple[int, tuple[float, float] | str]]:
    """Return for each checkpoint that has the tensor its sums, or why it cannot be read."""
    import torch

    there = [index for index, one in opened.items() if fqn in one.manifest.tensors]
    sums = {index: [0.0, 0.0 if index - 1 in there or index == 0 else math.nan] for index in there}
    told: dict[int, str] = {}
    pieces = {index: _pieces(opened[index], fqn) for index in there}
    if len({(one.dtype, *one.shape) for one in (opened[index].manifest.tensors[fqn] for index in there)}) > 1:
        sums = {index: [0.0, math.nan] for index in there}
    active = list(there)
    while active:
        before: dict[int, torch.Tensor] = {}
        for index in list(active):
            try:
                piece = next(pieces[index], None)
            except (CorruptCheckpoint, IncompatibleState, StoreError) as error:
                told[index] = str(error)
                piece = None
            if piece is None:
                active.remove(index)
                continue
            sums[index][0] += float(piece.square().sum())
            last = before.get(index - 1)
            if last is not None and last.shape == piece.shape:
                sums[index][1] += float((piece - last).square().sum())
            before = {index: piece}
    return [(index, told.get(index) or (sums[index][0], _change(index, sums[index][1]))) for index in there]


def _change(index: int, value: float) -> float:
    return math.nan if index == 0 else value


def _pieces(one: Checkpoint, fqn: str) -> Iterator[Any]:
    """Yield a tensor's elements in order, as float64."""
    import torch

    entry = one.manifest.tensors[fqn]
    box, size = Box.whole(tuple(entry.shape)), itemsize(entry.dtype)
    dtype = getattr(torch, entry.dtype)
    nbytes = box.numel * size
    for start in range(0, nbytes, PIECE):
        stop = min(nbytes, start + PIECE)
        octets = torch.empty(stop - start, dtype=torch.uint8)
        one.read_into(fqn, box, start, stop, octets.numpy().data)
        yield octets.view(dtype).to(torch.float64)


def _weights(one: Checkpoint) -> Iterator[tuple[str, int]]:
    for fqn, entry in one.manifest.tensors.items():
        if fqn.startswith(PREFIX) and "float" in entry.dtype:
            yield fqn, _nbytes(one, fqn)


def _nbytes(one: Checkpoint, fqn: str) -> int:
    entry = one.manifest.tensors[fqn]
    return Box.whole(tuple(entry.shape)).numel * itemsize(entry.dtype)


# ---------------------------------------------------------------- remembering


def _file(save: Save, before: Save | None) -> str:
    since = before.digest[:12] if before is not None else "first"
    return f"{save.committed.folder}/{names.EVALUATIONS}/weights.{save.digest[:12]}.{since}.norms"


def _remembered(run: Run, save: Save, before: Save | None) -> Squares | None:
    name = _file(save, before)
    try:
        content = strict_loads(run.store.read(name), where=name, max_bytes=_MAX_BYTES, error=CorruptCheckpoint)
        return {fqn: (_number(pair[0]), _number(pair[1])) for fqn, pair in content["squares"].items()}
    except StoreError:
        return None
    except (CorruptCheckpoint, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        log.warning("%s is not used: %r", name, error)
        return None


def _number(value: Any) -> float:
    return float(value)  # also of "nan" and "inf", which JSON lacks


def _remember(run: Run, save: Save, before: Save | None, squares: Squares) -> None:
    plain = {
        fqn: [value if math.isfinite(value) else str(value) for value in pair] for fqn, pair in sorted(squares.items())
    }
    try:
        run.store.create(_file(save, before), canonical({"squares": plain}))
    except (AlreadyExists, StoreError) as error:  # a folder that may not be written to, or another report came first
        log.debug("norms are not kept: %s", error)
