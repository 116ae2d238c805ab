"""Moving shadows towards weights: one pass over memory, whatever the dtypes, the sizes and the number of averages.

What decides the speed is memory traffic: a weight is read, each shadow read and written. Weights of the shadows' dtype
are used where they lie. Others are cast in buckets through a scratch buffer that stays in a cache. With several averages
the weights are cut into chunks, so that each is read from memory once and from the cache for the other averages.

On a CPU threads take chunks in turn, each alone: where torch divides every tensor among its own, they wait for each other
after each, and small tensors have one thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from distckpt.averaging.arithmetic import one_thread

CHUNK = {"cpu": 1 << 19, "cuda": 1 << 23}
"""Elements that are updated together, and of one scratch buffer, by device type: 2 MiB of fp32 stay in a cache, and take
long enough that threads seldom meet at the interpreter's lock (a quarter of them took 1.4 times as long); 32 MiB fit in
an H100's L2."""
STAGED = 1 << 22
"""Elements of one of the two buffers through which weights on another device come."""
SPREAD = 1 << 20
"""Elements from which threads are worth starting."""
MOST_THREADS = 32
"""Enough for the memory of any socket."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight and its shadow in each average: the same shape, any dtypes; the shadows share one device."""

    source: torch.Tensor
    shadows: tuple[torch.Tensor, ...]

    def cut(self, limit: int) -> Iterator[Pair]:
        """Yield pieces of at most ``limit`` elements: runs of rows, and where one row has more, pieces of each row."""
        numel = self.source.numel()
        if numel <= limit or self.source.dim() == 0:
            yield self
            return
        tensors, rows = (self.source, *self.shadows), limit * self.source.shape[0] // numel
        pieces = [torch.split(tensor, rows) if rows else torch.unbind(tensor) for tensor in tensors]
        for source, *shadows in zip(*pieces, strict=True):
            piece = Pair(source, tuple(shadows))
            yield from (piece,) if rows else piece.cut(limit)


class _Lanes:
    """Threads on which torch does not start threads of its own, and scratch buffers for each: shared by an updater's parts."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._scratch: dict[Any, torch.Tensor] = {}

    def scratch(self, lane: int, like: torch.Tensor, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """Return the lane's buffer of this dtype on the device of ``like``, grown to ``numel`` elements if need be."""
        key = (lane, like.device, dtype)
        if key not in self._scratch or self._scratch[key].numel() < numel:
            self._scratch[key] = torch.empty(numel, dtype=dtype, device=like.device)
        return self._scratch[key]

    def run(self, work: Callable[[int], None]) -> None:
        """Call ``work`` with 0 to ``threads - 1``, each on a thread."""
        running = [self._executor().submit(work, lane) for lane in range(self.threads)]
        for one in wait(running).done:  # all have ended, also where one failed
            one.result()

    def _executor(self) -> ThreadPoolExecutor:
        """Return the threads of this process; those of a parent process do not survive a fork."""
        if self._pool is None or self._pool[0] != os.getpid():
            together = threading.Barrier(self.threads)

            def begin() -> None:
                torch.get_num_threads()  # where torch takes over, once a thread, how many it may start from there
                together.wait(60)

            with one_thread():
                pool = ThreadPoolExecutor(self.threads, "distckpt-average", begin)
                list(pool.map(lambda _: None, range(self.threads)))
            self._pool = (os.getpid(), pool)
        return self._pool[1]


class Updater:
    """A plan for updating fixed tensors, made once and run many times.

    ``threads``: on a CPU; None takes torch's own number. ``staged``: send every weight through the
    buffers that weights on another device take, which tests do where there is only one device.
    """

    def __init__(
        self, pairs: Sequence[Pair], *, threads: int | None = None, staged: bool = False, lanes: _Lanes | None = None
    ) -> None:
        pairs = [pair for pair in pairs if pair.source.numel()]
        self._lanes = lanes or _Lanes(min(MOST_THREADS, torch.get_num_threads()) if threads is None else threads)
        away = [p for p in pairs if staged or p.source.device != p.shadows[0].device]
        here = [p for p in pairs if not (staged or p.source.device != p.shadows[0].device)]
        self._batches = [
            batch
            for alike in _grouped(here, lambda p: (p.shadows[0].device, p.source.dtype, p.shadows[0].dtype))
            for batch in _batches(alike)
        ]
        self._stages = [_Stage(alike, self._lanes) for alike in _grouped(away, lambda p: p.source.device)]
        on_cpu = all(batch.shadows[0].device.type == "cpu" for batch in self._batches)
        enough = len(self._batches) > 1 and sum(batch.numel for batch in self._batches) >= SPREAD
        self._threaded = on_cpu and enough and self._lanes.threads > 1

    @torch.no_grad()
    def run(self, weights: Sequence[float]) -> None:
        """Set every shadow to ``shadow + weight * (source - shadow)``; one weight per average, 1 copies."""
        left = iter(self._batches)  # threads take from it one at a time: next() of a list's iterator is atomic

        def work(lane: int) -> None:
            with torch.no_grad():  # a setting of each thread
                for batch in left:
                    batch.run(weights, self._lanes, lane)

        if self._threaded:
            self._lanes.run(work)
        else:
            work(0)
        for stage in self._stages:
            stage.run(weights)


class _Batch:
    """Tensors of one dtype and device that are updated by one call; ``through`` is the dtype to cast to first."""

    def __init__(self, pairs: Sequence[Pair], through: torch.dtype | None) -> None:
        self.through = through
        self.sources = [p.source for p in pairs]
        self.shadows = [shadow for p in pairs for shadow in p.shadows]
        self.averages = len(pairs[0].shadows)
        self.numel = sum(s.numel() for s in self.sources)
        self._operands = self._repeated(self.sources)
        self._casts: dict[int, tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]] = {}

    def run(self, weights: Sequence[float], lanes: _Lanes, lane: int) -> None:
        operands = self._operands
        if self.through is not None:
            buffer = lanes.scratch(lane, self.sources[0], self.through, self.numel)
            if lane not in self._casts or self._casts[lane][0] is not buffer:
                views = split_like(buffer, self.sources)
                self._casts[lane] = (buffer, views, self._repeated(views))
            _, views, operands = self._casts[lane]
            torch._foreach_copy_(views, self.sources)
        if self.averages == 1:
            torch._foreach_lerp_(self.shadows, operands, weights[0])
        else:
            torch._foreach_lerp_(self.shadows, operands, list(weights) * len(self.sources))

    def _repeated(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [source for source in sources for _ in range(self.averages)]


def split_like(buffer: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of a flat buffer, one after another, of the shapes of these tensors."""
    sizes = [tensor.numel() for tensor in like]
    pieces = torch.split(buffer[: sum(sizes)], sizes)
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


class _Stage:
    """Weights that lie on another device than their shadows: they come through two buffers in turn.

    From an accelerator they come through pinned memory on a side stream: one buffer fills while the other is used.
    """

    def __init__(self, pairs: Sequence[Pair], lanes: _Lanes) -> None:
        self._device, target = pairs[0].source.device, pairs[0].shadows[0].device
        beside = self._device.type != "cpu" and target.type == "cpu"
        module: Any = torch.get_device_module(self._device)
        self._module: Any = module if beside else None
        self._stream: Any = module.Stream(self._device) if beside else None
        self._events = [module.Event() for _ in range(2)] if beside else []
        buffers: dict[Any, torch.Tensor] = {}
        self._steps: list[tuple[list[torch.Tensor], list[torch.Tensor], Updater]] = []
        for alike in _grouped(pairs, lambda p: p.source.dtype):
            total = sum(p.source.numel() for p in alike)
            for packed in _packed([piece for pair in alike for piece in pair.cut(STAGED)], STAGED):
                sources = [p.source for p in packed]
                room = max(sum(s.numel() for s in sources), min(total, STAGED))
                key = (len(self._steps) % 2, sources[0].dtype, room)
                if key not in buffers:
                    buffers[key] = torch.empty(room, dtype=key[1], device=target, pin_memory=beside)
                hosts = split_like(buffers[key], sources)
                inner = [Pair(host, p.shadows) for host, p in zip(hosts, packed, strict=True)]
                self._steps.append((hosts, sources, Updater(inner, lanes=lanes)))

    def run(self, weights: Sequence[float]) -> None:
        if self._module is None:
            for hosts, sources, updater in self._steps:
                torch._foreach_copy_(hosts, sources)
                updater.run(weights)
            return
        self._stream.wait_stream(self._module.current_stream(self._device))
        for number in range(len(self._steps) + 1):
            if number < len(self._steps):
                hosts, sources, _ = self._steps[number]
                with self._module.stream(self._stream):
                    torch._foreach_copy_(hosts, sources, non_blocking=True)
                    self._events[number % 2].record(self._stream)
            if number:
                self._events[(number - 1) % 2].synchronize()
                self._steps[number - 1][2].run(weights)
        # Every copy is done when this returns: what the caller queues next cannot overtake one.


def _grouped(pairs: Sequence[Pair], key: Callable[[Pair], Any]) -> list[list[Pair]]:
    groups: dict[Any, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(key(pair), []).append(pair)
    return list(groups.values())


def _batches(pairs: Sequence[Pair]) -> list[_Batch]:
    """Return the batches of pairs of one device and of the same dtypes."""
    source, shadow = pairs[0].source, pairs[0].shadows[0]
    chunk = CHUNK.get(source.device.type, CHUNK["cuda"])
    cast = None if source.dtype == shadow.dtype else shadow.dtype
    if source.device.type != "cpu" and cast is None and len(pairs[0].shadows) == 1:
        return [_Batch(pairs, None)]  # each number is read once: nothing to keep in a cache, one call for all
    return [_Batch(batch, cast) for batch in _packed([piece for pair in pairs for piece in pair.cut(chunk)], chunk)]


def _packed(pairs: Sequence[Pair], limit: int) -> list[list[Pair]]:
    """Put neighbours together up to ``limit`` elements."""
    packed: list[list[Pair]] = []
    room = 0
    for pair in pairs:
        if not packed or pair.source.numel() > room:
            packed.append([])
            room = limit
        packed[-1].append(pair)
        room -= pair.source.numel()
    return packed
