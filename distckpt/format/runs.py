"""Where the blocks of a box lie, if not one after the other in its own shard: runs of blocks in this and other files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Final

import msgspec

from distckpt.format import names

MAX_FILES: Final = 64
"""Files of earlier checkpoints that one shard may refer to, as readers accept it; a save refers to far fewer."""

HINT: Final = (
    "copy that file too or, where it still is, make a copy that needs no other: distckpt convert --materialize SRC DST"
)


class FileRef(msgspec.Struct, frozen=True, order=True, gc=False):
    """A shard of an earlier checkpoint under the same root: its path from the root, its size, its header's digest."""

    path: str
    size: int
    header: str


class Run(msgspec.Struct, frozen=True, gc=False):
    """Blocks ``first`` to ``first + count`` of a box, which lie together from byte ``start`` of a file.

    ``path`` is the file's name on the store; None: the shard itself, which has written them.
    """

    first: int
    count: int
    path: str | None
    start: int


def place(runs: Sequence[Run], number: int, block: int) -> tuple[str | None, int]:
    """Return (file, byte) where block ``number`` lies; ``block`` is the number of bytes of each but the last."""
    run = runs[bisect_right(runs, number, key=attrgetter("first")) - 1]
    return run.path, run.start + (number - run.first) * block


def cut(runs: Sequence[Run], first: int, last: int, block: int) -> Iterator[Run]:
    """Yield the parts of the runs that are blocks ``first`` up to ``last``, in order."""
    for run in runs:
        low, high = max(first, run.first), min(last, run.first + run.count)
        if low < high:
            yield Run(low, high - low, run.path, run.start + (low - run.first) * block)


def run_bytes(run: Run, nbytes: int, block: int) -> int:
    """Return how many bytes a run of a box of ``nbytes`` spans."""
    return min((run.first + run.count) * block, nbytes) - run.first * block


def joined(places: Iterable[tuple[str | None, int]], block: int) -> tuple[Run, ...]:
    """Return the runs of blocks that lie at these places, block by block; the inverse of ``place``.

    Blocks of the shard itself (file None) join whatever their byte: they are packed when the shard is laid out.
    """
    runs: list[Run] = []
    for number, (path, start) in enumerate(places):
        last = runs[-1] if runs else None
        if last is not None and last.path == path and (path is None or last.start + last.count * block == start):
            runs[-1] = Run(last.first, last.count + 1, path, last.start)
        else:
            runs.append(Run(number, 1, path, start))
    return tuple(runs)


def overlap(runs: Iterable[tuple[Run, int]]) -> str | None:
    """Say where two runs, each with its number of bytes, share bytes of a file; None where none do."""
    end: tuple[str, int] = ("", 0)
    for path, start, stop in sorted((run.path or "", run.start, run.start + nbytes) for run, nbytes in runs):
        if path == end[0] and start < end[1]:
            return f"bytes from {start} of {path} are referred to twice"
        end = (path, stop)
    return None


def file_problem(path: str) -> str | None:
    """Say why a shard can't refer to this file, or return None: it must be a shard of an attempt, under the root."""
    folder, _, leaf = path.rpartition("/")
    if names.parse_shard_name(leaf) is None or _parse_attempt(folder) is None:
        return f"{path[:300]!r} is no shard of a step of this root"
    return None


def attempt_problem(folder: str, *, step: int, generation: int) -> str | None:
    """Say why a checkpoint of this step and generation can't refer to an attempt (its folder from the root), or None."""
    made = _parse_attempt(folder)
    if made is None:
        return f"{folder[:300]!r} is no attempt at a step of this root"
    if made[0] > step or made[1] > generation:
        return f"{folder} is of a later step or generation than what refers to it"
    return None


def _parse_attempt(folder: str) -> tuple[int, int] | None:
    """Return (step, generation) of an attempt's folder."""
    above, _, attempt = folder.partition("/")
    step, made = names.parse_step_folder(above), names.parse_attempt_name(attempt)
    return None if step is None or made is None else (step, made[0])
