"""Averaged weights in the model for a while, and the model's own back, bit for bit."""

from __future__ import annotations

import torch

from distckpt.averaging.live import Live
from distckpt.averaging.shadows import Shadows
from distckpt.engines.step_hook import pass_fences


class Swap:
    """A copy of what the model holds now, made before anything is changed; it lies where the shadows do.

    Persistent buffers are kept too: what a forward pass or a recomputation of BatchNorm statistics does to them while
    averaged weights are in the model is undone with the rest.
    """

    @torch.no_grad()
    def __init__(self, shadows: Shadows, live: Live) -> None:
        self._shadows = shadows
        self._kept = {
            name: [part.live.detach().clone().to(shadows.device or part.live.device) for part in parts]
            for name, parts in shadows.parts.items()
        }
        self._buffers = {name: buffer.detach().clone() for name, buffer in live.buffers.items()}

    @torch.no_grad()
    def put(self, average: int | None) -> None:
        """Write one average into the model, rounded to its dtypes; None leaves the weights, which are their average."""
        if average is None:
            return
        pass_fences()
        for parts in self._shadows.parts.values():
            for part in parts:
                part.live.copy_(part.views[average])

    @torch.no_grad()
    def undo(self, live: Live) -> None:
        """Write back what was kept, to where the model's tensors lie now: ``live`` and the shadows' parts."""
        pass_fences()
        for name, tensors in self._kept.items():  # a weight that was unfrozen since was not changed
            for part, kept in zip(self._shadows.parts[name], tensors, strict=True):
                part.live.copy_(kept)
        for name, saved in self._buffers.items():
            buffer = live.buffers.get(name)  # looked up anew: model.to() makes other objects of buffers
            if buffer is not None and buffer.shape == saved.shape:
                buffer.copy_(saved)
            elif buffer is not None:  # it was resized
                buffer.data = saved.to(buffer)
