"""Weighted sums of live tensors over ranks, bucket by bucket: the one place that reduces over a training group.

A bucket is copied together in fp32 (fp64 for fp64), scaled, reduced and written while the next one is copied: two buffers.
On an accelerator copies run on a side stream and the reduction on the group's own; the training stream waits for both
at the end. Elements go in logical order, so that partners may differ in strides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from distckpt import clock
from distckpt.averaging.updater import Pair, split_like
from distckpt.clock import Deadline
from distckpt.dcp.leaves import TensorLeaf
from distckpt.errors import AgreementTimeout

BUCKET: Final = 1 << 22
"""Elements of a bucket: 16 MiB of fp32."""
Write = Callable[[Sequence[Pair], Sequence[torch.Tensor]], None]
"""Called with the pairs of a bucket and, shaped as their sources, the reduced values in fp32 or fp64, which it may change."""


@dataclass(slots=True)
class Moved:
    """What was reduced: ``collectives`` and the bytes that went into them."""

    collectives: int = 0
    nbytes: int = 0

    def add(self, other: Moved) -> None:
        """Count another's too."""
        self.collectives += other.collectives
        self.nbytes += other.nbytes


def copy_back(pairs: Sequence[Pair], means: Sequence[torch.Tensor]) -> None:
    """Write reduced values to where they came from, rounded once to each one's dtype."""
    torch._foreach_copy_([pair.source for pair in pairs], list(means))


@torch.no_grad()
def reduce_pairs(
    pairs: Sequence[Pair],
    share: float,
    group: Any,
    write: Write = copy_back,
    *,
    wide: bool = False,
    bucket: int = BUCKET,
    deadline: Deadline,
) -> Moved:
    """Replace every source by ``write`` of the sum over the group of ``share`` times it. Partners pass pairs of equal shapes.

    ``share`` 0: this rank's values do not go in, whatever they are. ``wide``: sum in fp64. ``bucket``: elements.
    """
    moved = Moved()
    pairs = [pair for pair in pairs if pair.source.numel()]
    kinds: dict[tuple[torch.dtype, torch.device], list[Pair]] = {}
    for pair in pairs:
        dtype = torch.float64 if wide or pair.source.dtype == torch.float64 else torch.float32
        kinds.setdefault((dtype, device_for(group, pair.source.device)), []).append(pair)
    for (dtype, device), alike in kinds.items():
        batches = list(_batches(alike, bucket))
        with _side_stream(device, deadline):
            _reduce(batches, dtype, device, share, group, write, deadline, moved)
    return moved


def _reduce(
    batches: Sequence[Sequence[Pair]],
    dtype: torch.dtype,
    device: torch.device,
    share: float,
    group: Any,
    write: Write,
    deadline: Deadline,
    moved: Moved,
) -> None:
    room = max(sum(pair.source.numel() for pair in batch) for batch in batches)
    buffers = [torch.empty(room, dtype=dtype, device=device) for _ in range(min(2, len(batches)))]
    flying: tuple[Any, list[torch.Tensor]] | None = None
    for number in range(len(batches) + 1):
        coming: tuple[Any, list[torch.Tensor]] | None = None
        if number < len(batches):
            sources = [pair.source for pair in batches[number]]
            flat = buffers[number % 2][: sum(source.numel() for source in sources)]
            views = split_like(flat, sources)
            if share:
                torch._foreach_copy_(views, sources)
                flat.mul_(share)
            else:
                flat.zero_()
            coming = None if group is None else dist.all_reduce(flat, group=group, async_op=True), views
            moved.collectives += group is not None
            moved.nbytes += flat.numel() * flat.itemsize if group is not None else 0
        if flying is not None:
            _wait(flying[0], device, deadline)
            write(batches[number - 1], flying[1])
        flying = coming


@torch.no_grad()
def send_from(first: int, tensors: Sequence[torch.Tensor], group: Any, *, deadline: Deadline) -> Moved:
    """Give all ranks of the group the bytes that the global rank ``first`` has in these tensors; any dtypes."""
    moved = Moved()
    if group is None:
        return moved
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_device.setdefault(device_for(group, tensor.device), []).append(tensor)
    for device, alike in by_device.items():
        octets = [_bytes(tensor).to(device) for tensor in alike]
        flat = torch.cat(octets)
        _wait(dist.broadcast(flat, src=first, group=group, async_op=True), device, deadline)
        moved.collectives += 1
        moved.nbytes += flat.numel()
        for tensor, part in zip(alike, torch.split(flat, [len(o) for o in octets]), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # a part may lie off its dtype's alignment
    return moved


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def device_for(group: Any, device: torch.device) -> torch.device:
    """Return where a group's backend can take tensors of a device: there, else on its accelerator, else on the host."""
    kinds = [] if group is None else [kind.type for kind in group._device_types]
    if device.type in kinds or not kinds:
        return device
    away = next((kind for kind in kinds if kind != "cpu"), None)
    return torch.device("cpu") if away is None else torch.device(away, torch.get_device_module(away).current_device())


def _batches(pairs: Sequence[Pair], bucket: int) -> Iterator[list[Pair]]:
    """Yield pieces of pairs, in order, in batches of up to ``bucket`` elements: the same on all partners."""
    batch: list[Pair] = []
    room = bucket
    for piece in (piece for pair in pairs for piece in pair.cut(bucket)):
        if batch and piece.source.numel() > room:
            yield batch
            batch, room = [], bucket
        batch.append(piece)
        room -= piece.source.numel()
    if batch:
        yield batch


def _wait(work: Any, device: torch.device, deadline: Deadline) -> None:
    if work is None:
        return
    if device.type == "cpu":
        work.wait(timedelta(seconds=max(0.001, deadline.left_s)))
    else:
        work.wait()  # the current stream waits, not this thread


@contextlib.contextmanager
def _side_stream(device: torch.device, deadline: Deadline) -> Iterator[None]:
    """Run the body's work on a stream beside the training's, which waits for it at the end; on the host: do nothing."""
    if device.type == "cpu":
        yield
        return
    module: Any = torch.get_device_module(device)
    side = module.Stream(device)
    side.wait_stream(module.current_stream(device))
    with module.stream(side):
        yield
        done = module.Event()
        done.record(side)
    while not done.query():  # a peer that died leaves its collective open: nothing may wait for it without end
        if deadline.passed:
            raise AgreementTimeout("the collectives of an average did not end in time: a rank died or is far behind")
        clock.sleep(0.0005)
    module.current_stream(device).wait_stream(side)


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """Return a number that is the same where these tensors have the same bits: sums of their words, weighted by place."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums: dict[torch.device, list[torch.Tensor]] = {}
    places: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors, 1):
        value = real(tensor)
        if value.numel():
            sums.setdefault(value.device, []).append(
                value.view(words[value.itemsize]).sum(dtype=torch.int64).reshape(1)
            )
            places.setdefault(value.device, []).append(place)
    total = 0
    for device, parts in sums.items():
        total += sum(place * part for place, part in zip(places[device], torch.cat(parts).tolist(), strict=True))
    return total % (1 << 62)


def not_finite(leaves: Mapping[str, TensorLeaf]) -> list[str]:
    """Return the names of tensors with NaN or infinite elements; one pass, one wait for the device."""
    names: list[str] = []
    bounds: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, leaf in leaves.items():
        for _, tensor in leaf.parts:
            if tensor.numel():
                value = real(tensor)
                low, high = torch.aminmax(value.float() if value.itemsize == 1 else value)  # NaN, if there is one
                bounds.setdefault(value.device, []).append((name, torch.stack((low, high)).double()))
    for found in bounds.values():
        finite = torch.isfinite(torch.stack([pair for _, pair in found])).all(1).tolist()
        names += [name for (name, _), good in zip(found, finite, strict=True) if not good]
    return list(dict.fromkeys(names))


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements as real numbers, sharing memory."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
