"""Where DeepSpeed keeps each parameter: places in the flat fp32 buffers that its optimizers update.

Every wrapper optimizer of DeepSpeed is described by the same two values. A ``Partition`` is one tensor that the basic
(torch) optimizer updates on this rank, and the key of its state there. A ``Slot`` is one parameter's place in it. Nothing
is copied: a leaf's parts are views of the flat buffers, so saving reads and loading writes them in place. Padding lies
in no slot.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from distckpt.boxes import Box, flat_range_to_boxes
from distckpt.dcp.leaves import TensorLeaf, dtype_name
from distckpt.errors import IncompatibleState
from distckpt.format.layout import Layout, Mesh, flat_range, interned

Names = Mapping[int, str]
"""``id`` of a parameter to its FQN, the first one where weights are tied."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Elements ``[start, stop)`` of a parameter, flattened row-major, lie at ``at`` of the flat buffer on this rank.

    ``shape`` is the parameter's own; ``layout`` is None where every rank has it whole.
    """

    fqn: str
    param: torch.Tensor
    shape: tuple[int, ...]
    layout: Layout | None
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Partition:
    """One tensor that the basic optimizer updates on this rank, of the param group with index ``group``.

    ``flat`` is 1-D with ``slots`` in it, or (ZeRO stage 0, not fused) one whole parameter of its own shape.
    """

    flat: torch.Tensor
    group: int
    slots: tuple[Slot, ...]


def leaf_of(name: str, slot: Slot, flat: torch.Tensor) -> TensorLeaf:
    """Return the leaf of one parameter (or of a state of its shape) with views into ``flat`` as parts."""
    flat = flat.detach()
    parts: list[tuple[Box, torch.Tensor]] = []
    if slot.layout is None and tuple(flat.shape) == slot.shape:
        parts.append((Box.whole(slot.shape), flat))
    else:
        at = slot.at
        for box in flat_range_to_boxes(slot.shape, slot.start, slot.stop):
            parts.append((box, flat.narrow(0, at, box.numel).view(box.sizes)))
            at += box.numel
    return TensorLeaf(name, dtype_name(flat.dtype), slot.shape, slot.layout, tuple(parts))


def partitions_of(optimizer: Any, names: Names) -> list[Partition]:
    """Return what a wrapper optimizer holds on this rank, in the order of its groups (stage 3: of its sub-groups).

    Raises ``IncompatibleState`` where DeepSpeed's own records contradict each other; nothing is guessed.
    """
    kinds = {cls.__name__ for cls in type(optimizer).__mro__}
    if "DeepSpeedZeroOptimizer" in kinds:
        return list(_stage_1_and_2(optimizer, names))
    if "BF16_Optimizer" in kinds:
        return list(_bf16(optimizer, names))
    if "DeepSpeedZeroOptimizer_Stage3" in kinds:
        return list(_stage_3(optimizer, names))
    if "FP16_UnfusedOptimizer" in kinds:
        return list(_unfused(optimizer, names))
    return list(_fused(optimizer, names)) if "FP16_Optimizer" in kinds else []


def _stage_1_and_2(optimizer: Any, names: Names) -> Iterator[Partition]:
    for group, params in enumerate(optimizer.round_robin_bit16_groups):
        offsets = optimizer.round_robin_bit16_offsets[group]
        flat = optimizer.bit16_groups_flat[group]
        for param, offset in zip(params, offsets, strict=True):
            if param.data_ptr() != flat.data_ptr() + offset * flat.element_size():
                raise IncompatibleState(
                    f"{names[id(param)]}: DeepSpeed records it at element {offset} of its group's flat buffer, but its "
                    "memory lies elsewhere; parameters must not be replaced or moved after deepspeed.initialize"
                )
        # DeepSpeed 0.19.8 links _hp_mapping in the groups' own order even where round_robin_gradients placed the
        # parameters in another (safe_get_full_fp32_param is wrong there); memory, checked above, is the truth.
        moved = list(optimizer.round_robin_bit16_indices[group]) != list(range(len(params)))
        linked = not moved or any(optimizer.round_robin_bit16_padding[group])
        hp = optimizer.single_partition_of_fp32_groups[group]
        ranks = optimizer.real_dp_process_group[group]
        yield _flat_partition(hp, group, ranks, list(zip(params, offsets, strict=True)), names, linked=linked)


def _bf16(optimizer: Any, names: Names) -> Iterator[Partition]:
    for group, params in enumerate(optimizer.bf16_groups):
        hp = optimizer.fp32_groups_flat_partition[group]
        yield _flat_partition(
            hp, group, optimizer.real_dp_process_group[group], _end_to_end(params), names, linked=True
        )


def _end_to_end(params: list[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    placed, offset = [], 0
    for param in params:
        placed.append((param, offset))
        offset += param.numel()
    return placed


def _flat_partition(
    hp: torch.Tensor, group: int, ranks: Any, placed: list[tuple[torch.Tensor, int]], names: Names, *, linked: bool
) -> Partition:
    mesh = mesh_of(ranks)
    size = hp.numel()
    mine = dist.get_rank()
    low = (mesh.position(mine) or 0) * size
    slots = []
    for param, offset in placed:
        layout = Layout(mesh, (f"F({offset},{size})",))
        start, stop = flat_range(tuple(param.shape), layout, mine) or (0, 0)
        slot = Slot(names[id(param)], param, tuple(param.shape), layout, start, stop, max(0, offset - low))
        if linked:
            _check_link(slot)
        slots.append(slot)
    return Partition(hp, group, tuple(slots))


def _check_link(slot: Slot) -> None:
    """Compare a slot with DeepSpeed's own mapping of the same parameter."""
    mapping: Any = getattr(slot.param, "_hp_mapping", None)
    if mapping is None:
        found = None
    else:
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        found = (lp.start, lp.start + lp.numel, hp.start)
    ours = None if slot.start == slot.stop else (slot.start, slot.stop, slot.at)
    if found != ours:
        raise IncompatibleState(
            f"{slot.fqn}, rank {dist.get_rank()}: DeepSpeed maps its fragment to (first element, last + 1, place in the "
            f"partition) = {found}, its group's order gives {ours}; this DeepSpeed lays partitions out in a way that "
            "distckpt does not know"
        )


def _stage_3(optimizer: Any, names: Names) -> Iterator[Partition]:
    for sub, params in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[sub]
        slots, at = [], 0
        for param in params:
            held = param.ds_tensor.ds_numel
            where = tuple(optimizer.grad_position[optimizer.get_param_id(param)])
            if where != (sub, at, held):
                raise IncompatibleState(
                    f"{names[id(param)]}, rank {dist.get_rank()}: DeepSpeed's gradient position (sub-group, offset, elements) "
                    f"= {where} and the order of its sub-group, {(sub, at, held)}, contradict each other"
                )
            slots.append(_partitioned(param, names[id(param)], at))
            at += held
        if at != flat.numel():
            raise IncompatibleState(f"ZeRO-3 sub-group {sub} has {flat.numel()} elements, its parameters {at}")
        yield Partition(flat, optimizer.sub_group_to_group_id[sub], tuple(slots))


def _partitioned(param: Any, fqn: str, at: int) -> Slot:
    shape, layout = tuple(param.ds_shape), partitioned_layout(param)
    if layout is None:
        return Slot(fqn, param, shape, None, 0, 0, at)
    start, stop = flat_range(shape, layout, dist.get_rank()) or (0, 0)
    return Slot(fqn, param, shape, layout, start, stop, at)


def partitioned_layout(param: Any) -> Layout | None:
    """Return how ZeRO-3 lays a parameter out; None for one without elements, which every rank has whole."""
    if not math.prod(param.ds_shape):
        return None
    return Layout(mesh_of(param.ds_process_group), (f"F(0,{param.ds_tensor.ds_numel})",))


def partitioned_leaf(name: str, param: Any) -> TensorLeaf:
    """Return the leaf of a ZeRO-3 parameter that has no fp32 master (frozen), with views of its ``ds_tensor``."""
    slot = _partitioned(param, name, 0)
    if slot.layout is None:
        return leaf_of(name, slot, torch.empty(slot.shape, dtype=param.dtype))
    return leaf_of(name, slot, param.ds_tensor)


def _unfused(optimizer: Any, names: Names) -> Iterator[Partition]:
    for group, (params, masters) in enumerate(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)):
        for param, master in zip(params, masters, strict=True):
            shape = tuple(param.shape)
            yield Partition(master, group, (Slot(names[id(param)], param, shape, None, 0, param.numel(), 0),))


def _fused(optimizer: Any, names: Names) -> Iterator[Partition]:
    for group, params in enumerate(optimizer.fp16_groups):
        slots = [Slot(names[id(p)], p, tuple(p.shape), None, 0, p.numel(), at) for p, at in _end_to_end(params)]
        yield Partition(optimizer.fp32_groups_flat[group], group, tuple(slots))


def mesh_of(group: Any) -> Mesh:
    """Return the flat mesh of a process group's ranks, in the group's own order."""
    group = group or dist.group.WORLD
    known = _MESHES.get(group)
    if known is None:
        known = _MESHES[group] = interned(Mesh.flat(dist.get_process_group_ranks(group)))
    return known


_MESHES: weakref.WeakKeyDictionary[Any, Mesh] = weakref.WeakKeyDictionary()


@torch.no_grad()
def refresh(optimizer: Any, partitions: list[Partition]) -> None:
    """Make the low-precision weights again from the fp32 masters, as the optimizer does after a step.

    All ranks of the data-parallel group must call it together: ZeRO gathers what the others hold.
    """
    kinds = {cls.__name__ for cls in type(optimizer).__mro__}
    if kinds & {"DeepSpeedZeroOptimizer", "BF16_Optimizer"}:
        if partitions:
            optimizer.update_lp_params()
    elif "DeepSpeedZeroOptimizer_Stage3" in kinds:
        optimizer.parameter_offload.partition_all_parameters()
        for sub in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub)
        _gather_persistent(optimizer)
    elif "DeepSpeedZeRoOffload" in kinds:
        optimizer.partition_all_parameters()
        _gather_persistent(optimizer)
    else:
        for partition in partitions:
            for slot in partition.slots:
                master = partition.flat
                if tuple(master.shape) != slot.shape:
                    master = master.narrow(0, slot.at, slot.stop).view(slot.shape)
                slot.param.data.copy_(master)


def _gather_persistent(owner: Any) -> None:
    """Gather the small parameters that ZeRO-3 keeps whole on every rank, all in one collective."""
    if owner.persistent_parameters:
        owner.persistent_parameters[0].all_gather_coalesced(owner.persistent_parameters).wait()


@torch.no_grad()
def relink(optimizer: Any, partitions: list[Partition]) -> None:
    """Let DeepSpeed's per-parameter links to optimizer state (stages 1 and 2) point at the state as it is now."""
    if not hasattr(optimizer, "_hp_optimizer_states_linked"):
        return
    optimizer._hp_optimizer_states_linked = False
    state = optimizer.optimizer.state
    if all(partition.flat in state for partition in partitions):
        optimizer._lazy_init_hp_params_optimizer_state()
