"""Staging: copying what a rank will write into host memory that is reused from save to save.

A background save owns its snapshot: every piece is copied, also on CPU, where a state dict shares memory with the
live tensors (pytorch issue 144657). Device tensors are copied on a side stream into pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distckpt.dcp.writer import Staged
from distckpt.format.shard import Piece, place_pieces
from distckpt.storage.direct import ALIGNMENT


class StagingArena:
    """One reusable host buffer. ``stage`` overwrites what was staged before: one save at a time owns it."""

    def __init__(self) -> None:
        self._image = torch.empty(0, dtype=torch.uint8)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.allocations = 0
        """How often the buffer had to grow; a steady job has 1."""

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return self._image.numel()

    def stage(self, pieces: Sequence[Piece], views: Sequence[torch.Tensor]) -> Staged:
        """Copy the pieces' tensors (any device, any strides) into an image of the shard's data region.

        On return the copies are complete: the caller may change the originals. Work already queued on the current
        stream of a device is part of the snapshot.
        """
        _, starts, sizes = place_pieces(pieces)
        self._reserve(sum(sizes), pinned=any(view.is_cuda for view in views))
        streams = self._side_streams(views)
        for start, size, view in zip(starts, sizes, views, strict=True):
            room = self._image[start : start + size].view(view.dtype).view(view.shape)
            if view.is_cuda:
                with torch.cuda.stream(streams[view.device]):
                    room.copy_(view, non_blocking=True)
            else:
                room.copy_(view)
        for stream in streams.values():
            stream.synchronize()
        image = self._image[: sum(sizes)].numpy().data
        return Staged(tuple(image[s : s + n] for s, n in zip(starts, sizes, strict=True)), image)

    def release(self) -> None:
        """Give the memory back."""
        self._image = torch.empty(0, dtype=torch.uint8)

    def _reserve(self, nbytes: int, *, pinned: bool) -> None:
        if self._image.numel() < nbytes or (pinned and not self._image.is_pinned()):
            self._image = torch.empty(0, dtype=torch.uint8)  # free the old one before asking for more
            buffer = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
            self._image = buffer[-buffer.data_ptr() % ALIGNMENT :]  # aligned, so that direct I/O takes it as it is
            self.allocations += 1

    def _side_streams(self, views: Sequence[torch.Tensor]) -> dict[torch.device, torch.cuda.Stream]:
        used = {}
        for device in {view.device for view in views if view.is_cuda}:
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            used[device] = stream
        return used
