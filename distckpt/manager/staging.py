"""Staging: copying what a rank will write into host memory that is reused from save to save.

A background save owns its snapshot: every piece is copied, also on CPU, where a state dict shares memory with the
live tensors (pytorch issue 144657). Device tensors are copied on a side stream into pinned memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from distckpt.dcp.parallel import local_ranks, processors
from distckpt.dcp.writer import Staged
from distckpt.format.placing import Piece, Placed, place
from distckpt.manager.state_copy import CHUNK, StateCopy, Streams, Task, Watch
from distckpt.storage.direct import ALIGNMENT, anonymous

MOST_THREADS = 4
"""One thread does not fill a memory bus; four do on most machines."""


class StagingArena:
    """One reusable host buffer. ``stage`` and ``begin`` overwrite what was staged before: one save at a time owns it."""

    def __init__(self) -> None:
        self._image = torch.empty(0, dtype=torch.uint8)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.allocations = 0
        """How often the buffer had to grow; a steady job has 1."""
        self.copied_at_once = 0
        """Bytes of the last save that were copied before ``stage``, ``complete`` or ``begin`` returned."""

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return self._image.numel()

    def start(self, pieces: Sequence[Piece] | Placed, views: Sequence[torch.Tensor]) -> StateCopy:
        """Begin to copy the pieces' tensors (any device, any strides) into an image of the shard's data region.

        Other threads copy meanwhile, until ``complete``, or until the copy's ``stop``: one of them has to follow. Work
        already queued on the current stream of a device is part of the snapshot.
        """
        return self._copies(pieces, views, (), helpers=1)[0]

    def complete(self, copy: StateCopy) -> Staged:
        """Copy what is left of what ``start`` has begun; on return the caller may change the originals."""
        copy.run()
        copy.synchronize()
        return copy.staged

    def stage(self, pieces: Sequence[Piece] | Placed, views: Sequence[torch.Tensor]) -> Staged:
        """Copy as ``start`` and ``complete`` do, with nothing in between."""
        return self.complete(self._copies(pieces, views, ())[0])

    def begin(
        self, pieces: Sequence[Piece] | Placed, views: Sequence[torch.Tensor], settled: Collection[str] = ()
    ) -> StateCopy:
        """Copy as ``stage`` does, except for the tensors named in ``settled``: what is returned is left to copy them.

        Until its ``settle`` has returned those may not be changed. Tensors of which torch would not tell whether they
        were (inference tensors, devices other than CUDA) are copied at once all the same.
        """
        now, later = self._copies(pieces, views, settled)
        now.run()
        now.order_streams()
        return later

    def release(self) -> None:
        """Give the memory back."""
        self._image = torch.empty(0, dtype=torch.uint8)

    def _copies(
        self,
        pieces: Sequence[Piece] | Placed,
        views: Sequence[torch.Tensor],
        settled: Collection[str],
        *,
        helpers: int = 0,
    ) -> tuple[StateCopy, StateCopy]:
        """Return what threads beside the caller's, at least ``helpers``, copy from now on, and what may wait."""
        placed = place(pieces)
        starts, sizes = placed.offsets, placed.nbytes
        total = sum(sizes)
        self._reserve(total, pinned=any(view.is_cuda for view in views))
        streams = self._side_streams(views)
        image = self._image[:total].numpy().data
        staged = Staged(tuple(image[s : s + n] for s, n in zip(starts, sizes, strict=True)), image)
        now: list[Task] = []
        later: list[Task] = []
        for piece, view, start, size in zip(placed.pieces, views, starts, sizes, strict=True):
            if size:
                wait = piece.fqn in settled and view.device.type in ("cpu", "cuda") and not view.is_inference()
                (later if wait else now).append((piece.fqn, view, start, size))
        self.copied_at_once = sum(size for *_, size in now)
        at_once = StateCopy(now, self._image, streams, staged)
        rest = StateCopy(later, self._image, streams, staged, Watch(later))
        at_once.start(max(helpers, min(copy_threads(), -(-self.copied_at_once // CHUNK)) - 1))
        return at_once, rest

    def _reserve(self, nbytes: int, *, pinned: bool) -> None:
        if self._image.numel() < nbytes or (pinned and not self._image.is_pinned()):
            self._image = torch.empty(0, dtype=torch.uint8)  # free the old one before asking for more
            self._image = _pinned(nbytes) if pinned else torch.frombuffer(anonymous(nbytes), dtype=torch.uint8)
            self.allocations += 1

    def _side_streams(self, views: Sequence[torch.Tensor]) -> Streams:
        used = {}
        for device in {view.device for view in views if view.is_cuda}:
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            used[device] = stream
        return used


def copy_threads() -> int:
    """Return how many threads of this rank copy at once while training waits: its share of the CPUs, at most four."""
    share = processors() // local_ranks()
    return max(1, min(MOST_THREADS, share))


def _pinned(nbytes: int) -> torch.Tensor:
    buffer = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=True)
    start = -buffer.data_ptr() % ALIGNMENT
    return buffer[start : start + nbytes]
