"""What an incremental save need not write: blocks whose digests equal those of the checkpoint before. Pure.

The unit is the block that has a digest anyway (256 KiB unless set otherwise): an embedding of which some rows changed is
written in part, nothing is hashed twice, and a run of reused blocks costs a header three numbers. References are one
level deep, because a base knows of each of its blocks which file holds the bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from distckpt.boxes import Box
from distckpt.format.dtypes import itemsize
from distckpt.format.placing import Piece
from distckpt.format.runs import FileRef, Run, joined, place, run_bytes
from distckpt.format.shard import Reuse, StoredBox

MOST_FILES: Final = 32
"""Files that a shard refers to at most: bounds headers, the manifest, and what a removal has to look at."""
FEWER_FILES: Final = 24
"""How many are left where they would be more: letting go of several at once costs less over many saves."""
LEAST_SHARE: Final = 1 / 8
"""A file of which less is still of use is let go: its last blocks are written again, so that it can be removed."""

_Key = tuple[str, str, tuple[int, ...], Box]


@dataclass(frozen=True, slots=True)
class _Held:
    """Digests of a box's blocks, and where they are; every run names its file."""

    digests: tuple[str, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Base:
    """One rank's shard of a committed checkpoint, as the next save may refer to it."""

    step: int
    generation: int
    manifest_path: str
    block: int
    boxes: Mapping[_Key, _Held]
    files: tuple[FileRef, ...]

    def limited_to(self, files: Iterable[FileRef]) -> Base:
        """Return the base with only these files: what lies in others is written again."""
        return replace(self, files=tuple(files))


def base_of(
    boxes: Iterable[StoredBox],
    file: FileRef,
    others: Iterable[FileRef],
    *,
    block: int,
    step: int,
    generation: int,
    manifest_path: str,
) -> Base:
    """Return a base from the boxes of one shard, the file itself, and the files that the shard refers to."""
    held = {}
    for stored in boxes:
        if stored.digests:
            runs = stored.runs or (Run(0, len(stored.digests), None, stored.start),)
            named = tuple(Run(r.first, r.count, file.path if r.path is None else r.path, r.start) for r in runs)
            held[stored.fqn, stored.dtype, stored.global_shape, stored.box] = _Held(stored.digests, named)
    return Base(step, generation, manifest_path, block, held, (file, *others))


def reuse(base: Base, pieces: Sequence[Piece], digests: Sequence[Sequence[str]]) -> Reuse | None:
    """Return which blocks of the pieces the base's files hold already; None where none are worth referring to.

    A block is the same if its tensor's name, dtype and shape, its box, its number in the box and its digest are.
    """
    files = {file.path: file for file in base.files}
    places = [_places(base, piece, found) for piece, found in zip(pieces, digests, strict=True)]
    used: Counter[str] = Counter()
    for piece, found in zip(pieces, places, strict=True):
        nbytes = piece.box.numel * itemsize(piece.dtype)
        for number, (path, _) in enumerate(found):
            if path is not None and path in files:
                used[path] += min(base.block, nbytes - number * base.block)
    kept = worth_keeping(used, {path: file.size for path, file in files.items()})
    if not kept:
        return None
    runs = []
    for found in places:
        wanted = [at if at[0] in kept else (None, 0) for at in found]
        some = any(path is not None for path, _ in wanted)
        runs.append(joined(wanted, base.block) if some else ())
    return Reuse(tuple(runs), tuple(sorted(files[path] for path in kept)))


def _places(base: Base, piece: Piece, digests: Sequence[str]) -> list[tuple[str | None, int]]:
    """Return (file, byte) of each block that is as before; file None for one that changed."""
    held = base.boxes.get((piece.fqn, piece.dtype, piece.global_shape, piece.box))
    if held is None or len(held.digests) != len(digests):
        return [(None, 0)] * len(digests)
    return [
        place(held.runs, number, base.block) if digest == before else (None, 0)
        for number, (digest, before) in enumerate(zip(digests, held.digests, strict=True))
    ]


def worth_keeping(used: Mapping[str, int], sizes: Mapping[str, int]) -> frozenset[str]:
    """Return the files to refer to, given how many bytes of each would be used and how large they are.

    A file stays on storage as long as one block of it is referred to. So those that are hardly used any more are let
    go, and where more than ``MOST_FILES`` are left, the least used of them; what they held is written again. With 5 %
    of the blocks changing at random this writes 6 % and keeps three times the state, with 1 % it writes 2 %.
    """
    worthy = [path for path, nbytes in used.items() if nbytes >= LEAST_SHARE * sizes[path]]
    most = len(worthy) if len(worthy) <= MOST_FILES else FEWER_FILES
    return frozenset(sorted(worthy, key=lambda path: (-used[path], path))[:most])


def used_files(reused: Reuse, pieces_bytes: Sequence[int], block: int) -> list[tuple[FileRef, int]]:
    """Return the files that a shard refers to, and how many bytes of each; ``pieces_bytes`` are the pieces' sizes."""
    used: Counter[str] = Counter()
    for runs, nbytes in zip(reused.runs, pieces_bytes, strict=True):
        for run in runs:
            if run.path is not None:
                used[run.path] += run_bytes(run, nbytes, block)
    return [(file, used[file.path]) for file in reused.files]
