"""Where pieces go in a shard: their keys, their order, their bytes. A job that saves again asks once.

What is said here depends on the pieces alone, so a plan that is kept from save to save keeps it, and with it the
parts of the header that no save changes (``shard_json.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from distckpt.boxes import Box
from distckpt.errors import UnserializableState
from distckpt.format.dtypes import itemsize
from distckpt.format.limits import name_problem, shape_problem, shown
from distckpt.heap import no_collections


class Piece(msgspec.Struct, frozen=True, gc=False):
    """One box to be written: elements ``box`` of the tensor ``fqn`` of shape ``global_shape``, row-major."""

    fqn: str
    dtype: str
    global_shape: tuple[int, ...]
    box: Box


@dataclass(frozen=True, slots=True)
class Placed:
    """Pieces, each with its key in the file, its number of bytes and its offset in the data region.

    Tuples run parallel to ``pieces``; ``order`` lists indices as they follow each other in the file: back to back.
    """

    pieces: tuple[Piece, ...]
    keys: tuple[str, ...]
    nbytes: tuple[int, ...]
    offsets: tuple[int, ...]
    order: tuple[int, ...]
    constant: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What others have made of it, to be made once."""


@no_collections()
def place(pieces: Sequence[Piece] | Placed) -> Placed:
    """Return where the pieces of a shard go if all of them are written; a pure function.

    Larger items come first (stable otherwise): every box is aligned to its item size without holes, which
    safetensors forbids. Raises ``IncompatibleState`` (unknown dtype), ``UnserializableState`` (name that can't be
    stored), ``ValueError`` (box outside its tensor).
    """
    if isinstance(pieces, Placed):
        return pieces
    keys = _keys(pieces)
    nbytes = tuple([_piece_nbytes(piece) for piece in pieces])
    order = sorted(range(len(pieces)), key=lambda i: -itemsize(pieces[i].dtype))
    return Placed(tuple(pieces), keys, nbytes, offsets_of(order, nbytes), tuple(order))


def offsets_of(order: Sequence[int], nbytes: Sequence[int]) -> tuple[int, ...]:
    """Return each piece's offset in the data region, -1 for one that is not in the order."""
    offsets, end = [-1] * len(nbytes), 0
    for i in order:
        offsets[i] = end
        end += nbytes[i]
    return tuple(offsets)


def _keys(pieces: Sequence[Piece]) -> tuple[str, ...]:
    """Return the safetensors key of each piece: its FQN; for further boxes ``#1``, ``#2``, ... where free."""
    taken = {piece.fqn for piece in pieces}
    counts: dict[str, int] = {}
    whole: dict[str, tuple[str, tuple[int, ...]]] = {}
    keys = []
    for piece in pieces:
        fqn, key = piece.fqn, piece.fqn
        if whole.setdefault(fqn, (piece.dtype, piece.global_shape)) != (piece.dtype, piece.global_shape):
            raise ValueError(f"{shown(fqn)}: its boxes disagree on its dtype or global shape")
        if fqn in counts:
            # `w#1` may be a tensor's own name: skip it, the FQN in our metadata tells them apart.
            while key in taken:
                counts[fqn] += 1
                key = f"{fqn}#{counts[fqn]}"
            taken.add(key)
        else:
            counts[fqn] = 0
        problem = name_problem(key)
        if problem is not None:
            raise UnserializableState(f"tensor name {shown(fqn)} {problem}; rename it in the state")
        keys.append(key)
    return tuple(keys)


def _piece_nbytes(piece: Piece) -> int:
    size = itemsize(piece.dtype)
    problem = shape_problem(piece.global_shape, size)
    if problem is not None:
        raise ValueError(f"{shown(piece.fqn)}: shape {problem}")
    box, shape = piece.box, piece.global_shape
    if box.ndim != len(shape) or any(
        o < 0 or s < 0 or o + s > g for o, s, g in zip(box.offsets, box.sizes, shape, strict=True)
    ):
        raise ValueError(f"{shown(piece.fqn)}: {box} lies outside shape {shape}")
    return math.prod(box.sizes) * size
