"""Full saves: tensors gathered one at a time to rank 0, which writes them whole. Bounded memory, one writer.

This is the one place that uses the training process group (point-to-point, on the training thread, with all ranks in
``save()``), because it is the one that moves tensors between ranks. Prefer sharded saves; a full one suits models
that a single reader without distckpt must open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from distckpt.boxes import Box
from distckpt.dcp.leaves import State, TensorLeaf, torch_dtype
from distckpt.dcp.planner import Plan
from distckpt.dcp.replicas import host_bytes
from distckpt.format.layout import held_boxes, replica_of


def gather_tensors(
    state: State, plan: Plan, rank: int, order: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield (FQN, whole tensor on the host) in the given order on rank 0, (FQN, None) on the others.

    ``plan`` is the sharded plan, whose layouts say who holds what. All ranks iterate in lockstep; one tensor is in
    memory at a time if the caller lets go of it.
    """
    for fqn in order:
        row = plan.tensors[fqn]
        leaf = state.tensors.get(fqn)
        if rank != 0:
            if leaf is not None and replica_of(row.layout, rank)[0] == 0 and not _leader_has(plan, fqn):  # type: ignore[arg-type]
                _send(leaf)
            yield fqn, None
            continue
        if _leader_has(plan, fqn):
            assert leaf is not None
            yield fqn, leaf.parts[0][1].detach().cpu()
            continue
        yield fqn, _collect(plan, fqn, leaf)


def _leader_has(plan: Plan, fqn: str) -> bool:
    row = plan.tensors[fqn]
    assert row.layout is not None
    return [h.box for h in held_boxes(row.shape, row.layout, 0)] == [Box.whole(row.shape)]


def _send(leaf: TensorLeaf) -> None:
    for _, tensor in leaf.parts:
        if tensor.numel():
            dist.send(_wire(tensor.contiguous()), dst=0)


def _collect(plan: Plan, fqn: str, leaf: TensorLeaf | None) -> torch.Tensor:
    row = plan.tensors[fqn]
    assert row.layout is not None
    whole = torch.empty(row.shape, dtype=torch_dtype(row.dtype))
    device = _wire_device()
    for rank in row.layout.mesh.ranks:
        if replica_of(row.layout, rank)[0] != 0:
            continue
        for held in held_boxes(row.shape, row.layout, rank):
            if not held.box.numel:
                continue
            if rank == 0:
                assert leaf is not None
                part = leaf.view(held.box).detach()
            else:
                part = torch.empty(held.box.sizes, dtype=whole.dtype, device=device)
                dist.recv(_wire(part), src=rank)
            whole[held.box.slices].copy_(part)
    return whole


def _wire(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's bytes: back ends lack some dtypes, none lacks uint8."""
    return tensor.to(_wire_device()).reshape(-1).view(torch.uint8)


def _wire_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


class GatheredSource:
    """A writer's source on rank 0 that pulls each tensor when its first byte is asked for, in the order of writing."""

    def __init__(self, tensors: Iterator[tuple[str, torch.Tensor | None]], names: Sequence[str]) -> None:
        """``names[i]`` is the FQN of the writer's piece ``i``; the writer must use one thread."""
        self._tensors, self._names = tensors, names
        self._current: tuple[str, memoryview] = ("", memoryview(b""))

    def __call__(self, piece: int) -> memoryview:
        """Return the whole tensor's bytes."""
        wanted = self._names[piece]
        if self._current[0] != wanted:
            self._current = ("", memoryview(b""))  # let go of one tensor before asking for the next
            fqn, tensor = next(self._tensors)
            assert fqn == wanted, f"{fqn} gathered where {wanted} is to be written"
            assert tensor is not None
            self._current = (fqn, host_bytes(tensor))
        return self._current[1]

    def drain(self) -> None:
        """Receive what is left, so that no rank waits to send after rank 0 failed to write."""
        for _ in self._tensors:
            pass
