"""What ranks tell each other in a load, so that it stays small at any scale: bits of names, and little tensors once.

Which saved names no rank has: each rank sends one digest; lists of names never travel. Small tensors that are the same
everywhere (optimizer steps): the leader reads them and sends their bytes with the manifest, else every rank would open
a second shard, all of them the same one, for a few bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec
import torch

from distckpt.boxes import Box
from distckpt.dcp.agreement import Agreement
from distckpt.dcp.leaves import byte_view, torch_dtype
from distckpt.dcp.reader import CheckpointReader, Want
from distckpt.errors import DistckptError
from distckpt.format import digest as digests
from distckpt.format.dtypes import itemsize
from distckpt.format.manifest import Manifest
from distckpt.format.shares import SMALL_BYTES, SMALL_TOTAL

MOST_SHARDS: Final = 64
"""Headers that the leader opens at most to read small tensors for all; pipeline stages have theirs apart."""
_NONE, _OWN = "", "own"


def offer_names(agreement: Agreement, every: Sequence[str], own: Collection[str]) -> str:
    """Return a digest that stands for which of all saved names are in ``own``; empty for none of them."""
    if not own:
        return _NONE
    bits = _bits(every, own)
    digest = digests.digest(bits)
    agreement.post_blob(digest, bits)
    return digest


def common_names(agreement: Agreement, by_rank: Iterable[str]) -> str:
    """Return, from all ranks' offers, what stands for the names in all of them (leader only)."""
    distinct = sorted(set(by_rank))
    if _NONE in distinct:
        return _NONE
    if len(distinct) == 1:
        return _OWN
    found = int.from_bytes(agreement.get_blob(distinct[0]), "little")
    for digest in distinct[1:]:
        found &= int.from_bytes(agreement.get_blob(digest), "little")
    return found.to_bytes(-(-found.bit_length() // 8), "little").hex()


def names_of(answer: str, every: Sequence[str], own: Collection[str]) -> set[str]:
    """Return the names that ``common_names`` answered with; ``every`` as in ``offer_names``."""
    if answer == _OWN:
        return set(own)
    bits = bytes.fromhex(answer)
    return {name for i, name in enumerate(every[: len(bits) * 8]) if bits[i // 8] >> i % 8 & 1}


def _bits(every: Sequence[str], own: Collection[str]) -> bytes:
    chosen = set(own)
    bits = bytearray(-(-len(every) // 8))
    for i, name in enumerate(every):
        if name in chosen:
            bits[i // 8] |= 1 << i % 8
    return bytes(bits)


def read_small(reader: CheckpointReader) -> dict[str, bytes]:
    """Read what is worth sending to all ranks: tensors that several ranks hold whole, small one by one and together.

    Empty where any of it is damaged: then each rank finds out for itself, and all say so together.
    """
    wants = [Want(name, Box.whole(target.shape), target) for name, target in small_tensors(reader).items()]
    try:
        reader.read(wants)
    except (DistckptError, OSError):
        return {}
    return {want.fqn: bytes(byte_view(want.target)) for want in wants}


def small_tensors(reader: CheckpointReader) -> dict[str, torch.Tensor]:
    """Return room for what the leader reads for all ranks, by name; opens nothing."""
    manifest, index = reader.manifest, reader.index
    shards: set[int] = set()
    chosen: dict[str, torch.Tensor] = {}
    total = 0
    for name, entry in manifest.tensors.items():
        nbytes = math.prod(entry.shape) * itemsize(entry.dtype)
        alike = set(entry.placements) == {"R"} and math.prod(manifest.meshes[entry.mesh].shape) > 1
        if not alike or not 0 < nbytes <= SMALL_BYTES or total + nbytes > SMALL_TOTAL:
            continue
        if not hasattr(torch, entry.dtype):
            continue
        needed = shards.union(index.writers(name, Box.whole(entry.shape)))
        if len(needed) <= MOST_SHARDS:
            shards, total = needed, total + nbytes
            chosen[name] = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    return chosen


def fill_small(wants: Iterable[Want], small: Mapping[str, bytes], manifest: Manifest) -> list[Want]:
    """Fill those wants that small tensors' bytes can fill, and return the others."""
    left = []
    for want in wants:
        name = manifest.aliases.get(want.fqn, want.fqn)
        if name not in small:
            left.append(want)
            continue
        entry = manifest.tensors[name]
        values = torch.frombuffer(bytearray(small[name]), dtype=torch.uint8).view(torch_dtype(entry.dtype))
        want.target.copy_(values.reshape(entry.shape)[want.box.slices])
    return left


class Opening(msgspec.Struct, frozen=True, array_like=True):
    """What the leader sends before a load: the manifest's bytes, and small tensors by their numbers in it."""

    manifest: bytes
    numbers: list[int]
    values: list[bytes]

    @classmethod
    def of(cls, data: bytes, manifest: Manifest, small: Mapping[str, bytes]) -> Opening:
        """Return what to send: a manifest's bytes, and small tensors' by name."""
        numbers = {name: i for i, name in enumerate(manifest.tensors)} if small else {}
        return cls(data, [numbers[name] for name in small], list(small.values()))

    def small(self, manifest: Manifest) -> dict[str, bytes]:
        """Return the small tensors' bytes by name; ``manifest`` is what was parsed."""
        names = list(manifest.tensors) if self.numbers else []
        return {names[number]: data for number, data in zip(self.numbers, self.values, strict=True)}
