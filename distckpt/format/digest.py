"""Digests of stored bytes: xxh3 with 128 bits, as 32 lowercase hex digits (the canonical, big-endian form).

xxh3 runs at memory speed and finds every accidental change; it is no defence against someone who means harm
and can rewrite the manifest too (that is what the manifest's signature field is reserved for).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, TypeAlias, TypeGuard

import xxhash

Bytes: TypeAlias = bytes | bytearray | memoryview

BLOCK: Final = 256 << 10
"""Bytes covered by one digest of a shard's data, unless its header says otherwise.

What is read is verified, so whole blocks are: with 1 MiB two ranks that each wanted half of the tensors of one saved
alone read 1.4 times their bytes, with 256 KiB 1.1 times. A digest costs 40 bytes of header.
"""

_DIGEST = re.compile(r"[0-9a-f]{32}")


def digest(data: Bytes) -> str:
    """Return the xxh3-128 digest of the bytes of a contiguous buffer, as 32 lowercase hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def block_digests(view: memoryview, block: int = BLOCK) -> list[str]:
    """Return the digest of each ``block`` bytes of ``view``, the last block shorter; no bytes, no digests.

    ``view`` is contiguous, of any format; offsets count bytes, not items. ValueError unless ``block`` > 0.
    """
    if block <= 0:
        raise ValueError(f"a block must have at least one byte, not {block}")
    # memoryview.cast refuses a shape with a zero in it, and there is nothing to digest there anyway.
    if view.nbytes == 0:
        return []
    octets = view if view.format == "B" and view.ndim == 1 else view.cast("B")
    hexdigest = xxhash.xxh3_128_hexdigest
    return [hexdigest(octets[start : start + block]) for start in range(0, octets.nbytes, block)]


def block_count(nbytes: int, block: int = BLOCK) -> int:
    """Return how many digests ``block_digests`` gives for ``nbytes`` bytes."""
    return -(-nbytes // block)


def is_digest(text: object) -> TypeGuard[str]:
    """Say whether ``text`` is a digest as ``digest`` writes it: exactly 32 lowercase hex digits."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def are_digests(texts: Iterable[str]) -> bool:
    """Say whether all of these are digests."""
    return all(map(_DIGEST.fullmatch, texts))
