"""A fingerprint of trained weights, made from the digests that a save computes anyway: has anything been trained?"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from distckpt.format import digest as digests
from distckpt.format.placing import Piece


def fingerprint(pieces: Sequence[Piece], found: Sequence[Sequence[str]], named: Collection[str]) -> str:
    """Return 32 hex digits that stand for the values of the named tensors' pieces; empty where there are none.

    The sum modulo 2**128 of the xxh3-128 of each piece's [fqn, offsets, sizes, block digests] as JSON, so that the sum
    over ranks does not depend on who wrote which piece.
    """
    total, count = 0, 0
    for piece, blocks in zip(pieces, found, strict=True):
        if piece.fqn in named and piece.box.numel:
            text = msgspec.json.encode([piece.fqn, piece.box.offsets, piece.box.sizes, blocks])
            total, count = total + int(digests.digest(text), 16), count + 1
    return f"{total % 2**128:032x}" if count else ""


def combined(by_rank: Iterable[str]) -> str:
    """Return the fingerprint of all ranks' pieces together; empty where no rank has one."""
    parts = [int(text, 16) for text in by_rank if text]
    return f"{sum(parts) % 2**128:032x}" if parts else ""
