"""Staging: copying what a rank will write into host memory that is reused from save to save.

A background save owns its snapshot: every piece is copied, also on CPU, where a state dict shares memory with the
live tensors (pytorch issue 144657). Device tensors are copied on a side stream into pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALIGN = 64
"""Pieces start at multiples of this many bytes, so that any dtype can be viewed in place."""


class StagingArena:
    """One reusable host buffer. ``stage`` overwrites what was staged before: one save at a time owns it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.allocations = 0
        """How often the buffer had to grow; a steady job has 1."""

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return self._buffer.numel()

    def stage(self, views: Sequence[torch.Tensor]) -> list[memoryview]:
        """Copy the views (any device, any strides) and return the bytes of each, row-major.

        On return the copies are complete: the caller may change the originals. Work already queued on the current
        stream of a device is part of the snapshot.
        """
        starts, total = [], 0
        for view in views:
            starts.append(total)
            total += -(-view.numel() * view.element_size() // ALIGN) * ALIGN
        self._reserve(total, pinned=any(view.is_cuda for view in views))
        streams = self._side_streams(views)
        for start, view in zip(starts, views, strict=True):
            nbytes = view.numel() * view.element_size()
            room = self._buffer[start : start + nbytes].view(view.dtype).view(view.shape)
            if view.is_cuda:
                with torch.cuda.stream(streams[view.device]):
                    room.copy_(view, non_blocking=True)
            else:
                room.copy_(view)
        for stream in streams.values():
            stream.synchronize()
        whole = self._buffer.numpy().data
        return [whole[s : s + v.numel() * v.element_size()] for s, v in zip(starts, views, strict=True)]

    def release(self) -> None:
        """Give the memory back."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _reserve(self, nbytes: int, *, pinned: bool) -> None:
        if self._buffer.numel() < nbytes or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old one before asking for more
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
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
