"""The memory of averages: for every part of a weight that this rank holds, a shadow of the same shape and strides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distckpt.averaging.live import Live
from distckpt.averaging.updater import Pair, Updater
from distckpt.boxes import Box
from distckpt.dcp.leaves import TensorLeaf, dtype_name
from distckpt.errors import IncompatibleState
from distckpt.storage.direct import anonymous


@dataclass(frozen=True, slots=True)
class Part:
    """One box of a weight: the live tensor, and of every average its memory and that memory in the live tensor's shape."""

    box: Box
    live: torch.Tensor
    memory: tuple[torch.Tensor, ...]
    views: tuple[torch.Tensor, ...]


class Shadows:
    """Shadows of ``count`` averages in ``dtype`` (wider for wider weights), on ``device`` or where the weights are."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device | None) -> None:
        self.count = count
        self.dtype = dtype
        self.device = device
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.leaves: Mapping[str, TensorLeaf] = {}
        self._updater: Updater | None = None

    @torch.no_grad()
    def fit(self, live: Live) -> None:
        """Attach to where the weights lie now; the first time shadows begin as copies, later they keep their values.

        Where a weight has other strides or another dtype than before, its shadows get memory anew, as an update goes through
        both in the order of memory.

        Raises ``IncompatibleState`` where a weight is held in other boxes than before.
        """
        changed = [name for name in self.parts if _boxes(self.leaves[name]) != _boxes(live.averaged[name])]
        if changed:
            raise IncompatibleState(
                f"the shapes or the sharding of {changed[:5]} have changed since the average was made; make it anew once the "
                "model is in its final layout, and bring its values over through a checkpoint"
            )
        new = [
            part
            for name, leaf in live.averaged.items()
            for number, (_, part) in enumerate(leaf.parts)
            if not self._fits(self._known(name, number), part)
        ]
        memory = _Memory(sum(self.count * _room(self._shape(part)) for part in new if self._device(part).type == "cpu"))
        self.parts = {name: self._fit_one(name, leaf, memory) for name, leaf in live.averaged.items()}
        self.leaves = live.averaged
        self._updater = None

    def _fit_one(self, name: str, leaf: TensorLeaf, free: _Memory) -> tuple[Part, ...]:
        parts = []
        for number, (box, live) in enumerate(leaf.parts):
            device, old = self._device(live), self._known(name, number)
            if old is not None and self._fits(old, live):
                memory = tuple(m.to(device) for m in old.memory)
                parts.append(Part(box, live, memory, tuple(_like(m, live) for m in memory)))
                continue
            memory = tuple(self._allocate(live, device, free) for _ in range(self.count))
            part = Part(box, live, memory, tuple(_like(m, live) for m in memory))
            for average, view in enumerate(part.views):
                view.copy_(live if old is None else old.views[average])
            parts.append(part)
        return tuple(parts)

    def _known(self, name: str, number: int) -> Part | None:
        return self.parts[name][number] if name in self.parts else None

    def _fits(self, old: Part | None, live: torch.Tensor) -> bool:
        """Whether a part's memory serves a weight as it lies now: its elements in the same order, of the right dtype."""
        if old is None:
            return False
        if old.live.dtype == live.dtype and old.live.stride() == live.stride():
            return True  # nearly always; the rest costs as much as a small update
        if _order(old.live) != _order(live):
            return False
        return all(memory.dtype == self._shape(live).dtype for memory in old.memory)

    def _allocate(self, live: torch.Tensor, device: torch.device, free: _Memory) -> torch.Tensor:
        like = self._shape(live)
        return free.take(like) if device.type == "cpu" else torch.empty_like(like, device=device)

    def _shape(self, live: torch.Tensor) -> torch.Tensor:
        """Return what a weight's shadow looks like, without memory."""
        flat = _flat(live)
        return torch.empty(flat.shape, dtype=torch.promote_types(self.dtype, _wide(flat.dtype)), device="meta")

    def _device(self, live: torch.Tensor) -> torch.device:
        return self.device or live.device

    def move(self, weights: Sequence[float]) -> None:
        """Move every shadow towards its weight, in one pass; one number per average, 1 copies."""
        if all(weight == 1.0 for weight in weights):
            for name in self.parts:  # a sum with a shadow that is NaN or infinite would be NaN for ever
                for average in range(self.count):
                    self.copy(name, average)
            return
        if self._updater is None:
            pairs = [Pair(_flat(part.live), part.memory) for parts in self.parts.values() for part in parts]
            self._updater = Updater(pairs)
        self._updater.run(weights)

    @torch.no_grad()
    def copy(self, name: str, average: int) -> None:
        """Set one shadow of one average to its weight."""
        for part in self.parts[name]:
            part.views[average].copy_(part.live)

    def leaf(self, fqn: str, name: str, average: int) -> TensorLeaf:
        """Return one shadow as the leaf ``fqn``: its weight's global shape and layout, with views of it as parts."""
        like, parts = self.leaves[name], self.parts[name]
        dtype = dtype_name(torch.promote_types(self.dtype, _wide(getattr(torch, like.dtype))))
        return TensorLeaf(fqn, dtype, like.shape, like.layout, tuple((p.box, p.views[average]) for p in parts))


class _Memory:
    """Memory for all shadows on the CPU, in huge pages: an update then takes a tenth less, as it seldom waits for a TLB."""

    def __init__(self, nbytes: int) -> None:
        self._free = anonymous(nbytes) if nbytes else memoryview(b"")

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Return memory for one shadow, which has a storage of its own."""
        room = _room(like)
        mine, self._free = self._free[:room], self._free[room:]
        if not room:
            return torch.empty_like(like, device="cpu")
        return torch.frombuffer(mine, dtype=like.dtype, count=like.numel()).view(like.shape)


def _room(like: torch.Tensor) -> int:
    """Return the bytes that a shadow takes, so that the next one begins with a line of the cache."""
    return -(-like.numel() * like.element_size() // 64) * 64


def _boxes(leaf: TensorLeaf) -> tuple[object, ...]:
    return (leaf.shape, leaf.layout, tuple(box for box, _ in leaf.parts))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype that promotes with the shadow's: kinds of 8 bits promote with nothing."""
    return dtype if dtype.itemsize > 1 else torch.float16


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie in one run of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()  # strides are kept only if dense


def _order(live: torch.Tensor) -> tuple[int, ...] | None:
    """Return the order in which a weight's shadow has its elements; None is that of rows."""
    return live.stride() if _is_dense(live) else None


def _flat(live: torch.Tensor) -> torch.Tensor:
    """Return a real view of a weight: 1-D in memory order if it is dense, else of its own shape."""
    live = live.detach()
    if _is_dense(live):
        live = live.as_strided((live.numel(),), (1,))
        return torch.view_as_real(live).view(-1) if live.is_complex() else live
    return torch.view_as_real(live) if live.is_complex() else live


def _like(memory: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Return the inverse of ``_flat`` on a shadow's memory: the live tensor's shape, and its strides if it is dense."""
    if live.is_complex():
        memory = torch.view_as_complex(memory.view(*memory.shape[:-1], -1, 2) if _is_dense(live) else memory)
    return memory.as_strided(live.shape, live.stride()) if _is_dense(live) else memory
