"""Optimizer state of a DeepSpeed engine, per parameter: out of the flat partitions, and back into them.

A partition has one tensor per state, with one value per element, and one number for things such as ``step``. Saved, each
parameter has its own of both, as ``torch.optim`` has them, so that any engine can load them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist

from distckpt.dcp.buffers import zeros_like
from distckpt.dcp.leaves import GROUPS, State, TensorLeaf, torch_dtype
from distckpt.engines import zero
from distckpt.engines.base import OPTIM_GROUPS, OPTIM_STATE
from distckpt.engines.param_state import Saved, add_tied_state, group_settings, split_state_names
from distckpt.errors import IncompatibleState, first_names

HOW_NOT_WHAT = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Settings of a param group that say how this process computes, not what: a load leaves them as they are."""
SHARED_SCALARS = frozenset({"step", "mu_product", "mu", "eta"})
"""Optimizer state that is one number per tensor even where the parameter itself has no dimension."""
Examples = list[tuple[zero.Slot, str, tuple[int, ...]]]
"""Of one state key: parameters that have it in the checkpoint, with its dtype and shape there."""


class PartitionedState:
    """The state and param groups of the basic optimizer that a DeepSpeed wrapper drives."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._scalars: list[tuple[zero.Partition, str, dict[str, torch.Tensor]]] = []

    @property
    def basic(self) -> Any:
        """The optimizer that does the arithmetic; DeepSpeed may have replaced the user's (Adagrad)."""
        return self.engine.optimizer.optimizer

    def add_to(self, state: State, partitions: list[zero.Partition]) -> None:
        """Add every parameter's optimizer state and the param groups."""
        for partition in partitions:
            for key, value in self.basic.state.get(partition.flat, {}).items():
                for slot in partition.slots:
                    self._add_value(state, partition, slot, key, value)
        add_tied_state(state)
        state.add_object(OPTIM_GROUPS, self._groups(partitions), GROUPS)

    def finish(self, loaded: Collection[str], objects: Mapping[str, Any], partitions: list[zero.Partition]) -> None:
        """Take over what was not read in place: numbers, other values, settings of param groups.

        Raises ``IncompatibleState`` where parameters of one partition were saved with different numbers, on all ranks.
        """
        self._finish_scalars(loaded)
        self._finish_values(objects, partitions)
        if OPTIM_GROUPS in objects:
            self._finish_groups(objects[OPTIM_GROUPS], partitions)

    def _add_value(self, state: State, partition: zero.Partition, slot: zero.Slot, key: str, value: Any) -> None:
        name = f"{OPTIM_STATE}{slot.fqn}.{key}"
        if isinstance(value, torch.Tensor) and value.shape == partition.flat.shape:
            state.add_leaf(zero.leaf_of(name, slot, value))
        elif isinstance(value, torch.Tensor) and not value.shape:
            state.add_tensor(name, value)
        elif isinstance(value, torch.Tensor):
            raise IncompatibleState(
                f"{name}, rank {dist.get_rank()}: {tuple(value.shape)} for a partition of {tuple(partition.flat.shape)}; only "
                "optimizer state with one value per element (or one number) has a meaning on another number of ranks"
            )
        elif key == "step" and isinstance(value, (int, float)):
            state.add_tensor(name, torch.tensor(float(value)))  # as torch.optim has it
        else:
            state.add_object(name, value)

    def _groups(self, partitions: list[zero.Partition]) -> list[dict[str, Any]]:
        groups: dict[int, dict[str, Any]] = {}
        for partition in partitions:
            live = self.basic.param_groups[partition.group]
            settings = {key: value for key, value in live.items() if key not in ("params", "step")}
            group = groups.setdefault(partition.group, {**settings, "params": []})
            group["params"] += [slot.fqn for slot in partition.slots]
        return [groups[index] for index in sorted(groups)]

    def allocate(self, saved: Saved, partitions: list[zero.Partition]) -> None:
        """Make room for saved state that this rank does not have yet; take away what the checkpoint has none of."""
        wanted = split_state_names(saved, (slot.fqn for p in partitions for slot in p.slots))
        found = [_saved_states(partition, wanted, saved) for partition in partitions]
        known = {key: examples for keys in found for key, examples in keys.items()}
        for partition, own in zip(partitions, found, strict=True):
            stateless = self.basic.param_groups[partition.group].get("momentum") == 0
            # A partition without any state among others that have some: ask for theirs, so that it counts as missing.
            keys = own or ({} if stateless else known)
            if not keys:
                self.basic.state.pop(partition.flat, None)  # saved before its first step: go back to that
                continue
            live = self.basic.state[partition.flat]
            for key, examples in keys.items():
                if "." not in key and key not in live:
                    live[key] = self._room_for(partition, key, examples)

    def _room_for(self, partition: zero.Partition, key: str, saved: Examples) -> torch.Tensor | int:
        """Allocate one state of a partition: like the partition, or one number as its optimizer has it."""
        flat = partition.flat.detach()
        dtype = torch_dtype(saved[0][1])
        is_scalar = any(shape == () != slot.shape for slot, _, shape in saved) or (
            key in SHARED_SCALARS and all(shape == () for _, _, shape in saved)
        )
        if not is_scalar:
            return zeros_like(flat, dtype)
        if key == "step" and not type(self.basic).__module__.startswith("torch."):
            return 0  # DeepSpeed's own optimizers count in Python
        group = self.basic.param_groups[partition.group]
        on_device = key != "step" or group.get("capturable") or group.get("fused")
        return torch.zeros((), dtype=dtype, device=flat.device if on_device else "cpu")

    def read_scalars_apart(self, state: State, partitions: list[zero.Partition]) -> None:
        """Give every parameter's number a place of its own: a partition has one for all, so they must turn out equal."""
        self._scalars = []
        for partition in partitions:
            for key, value in self.basic.state.get(partition.flat, {}).items():
                shared = not value.shape if isinstance(value, torch.Tensor) else key == "step"
                if not shared or tuple(partition.flat.shape) == ():
                    continue
                places: dict[str, torch.Tensor] = {}
                for slot in partition.slots:
                    name = f"{OPTIM_STATE}{slot.fqn}.{key}"
                    leaf = state.tensors[name]
                    places[slot.fqn] = torch.zeros((), dtype=torch_dtype(leaf.dtype))
                    part = ((leaf.parts[0][0], places[slot.fqn]),)
                    state.tensors[name] = TensorLeaf(name, leaf.dtype, (), None, part)
                self._scalars.append((partition, key, places))

    def _finish_scalars(self, loaded: Collection[str]) -> None:
        scalars, self._scalars = self._scalars, []
        for partition, key, places in scalars:
            found = {fqn: t for fqn, t in places.items() if f"{OPTIM_STATE}{fqn}.{key}" in loaded}
            if not found:
                continue
            value = _common(key, found)
            live = self.basic.state[partition.flat]
            if isinstance(live[key], torch.Tensor):
                live[key].copy_(value)
            else:
                live[key] = type(live[key])(value.item())

    def _finish_values(self, objects: Mapping[str, Any], partitions: list[zero.Partition]) -> None:
        """Take back optimizer state that is no tensor; a partition has one value, which its parameters must share."""
        wanted = split_state_names(objects, (slot.fqn for p in partitions for slot in p.slots))
        for partition in partitions:
            found: dict[str, list[Any]] = {}
            for slot in partition.slots:
                for key, name in wanted.get(slot.fqn, {}).items():
                    found.setdefault(key, []).append(objects[name])
            for key, values in found.items():
                if any(value != values[0] for value in values):
                    raise IncompatibleState(
                        f"{OPTIM_STATE}*.{key} differs within one ZeRO partition ({_few(partition)}); build the same param groups"
                    )
                self.basic.state[partition.flat][key] = values[0]

    def _finish_groups(self, saved: list[dict[str, Any]], partitions: list[zero.Partition]) -> None:
        by_group: dict[int, list[str]] = {}
        for partition in partitions:
            by_group.setdefault(partition.group, []).extend(slot.fqn for slot in partition.slots)
        for owner in {id(o): o for o in (self.basic, self.engine.basic_optimizer)}.values():
            for index, fqns in by_group.items():
                group = owner.param_groups[index]
                for key, value in group_settings(saved, fqns).items():
                    if key in HOW_NOT_WHAT or key == "step":
                        continue
                    if isinstance(group.get(key), torch.Tensor) and isinstance(value, (torch.Tensor, int, float)):
                        group[key].copy_(torch.as_tensor(value))
                    else:
                        group[key] = value


def _saved_states(
    partition: zero.Partition, wanted: Mapping[str, Mapping[str, str]], saved: Saved
) -> dict[str, Examples]:
    """Return what is saved for a partition's parameters, by state key."""
    keys: dict[str, Examples] = {}
    for slot in partition.slots:
        for key, name in wanted.get(slot.fqn, {}).items():
            keys.setdefault(key, []).append((slot, *saved[name]))
    return keys


def _common(key: str, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the number that all parameters of a partition have.

    Judged over all of them, also those without elements on this rank, so that every rank raises: a collective follows.
    """
    by_value: dict[float, str] = {}
    for fqn, value in found.items():
        by_value.setdefault(value.item(), fqn)
    if len(by_value) > 1:
        examples = ", ".join(f"{fqn} has {value:g}" for value, fqn in list(by_value.items())[:6])
        raise IncompatibleState(
            f"{OPTIM_STATE}*.{key}: ZeRO keeps one number for all parameters of a partition, but these were saved with several: "
            f"{examples}. Put parameters that were trained for fewer steps into a param group of their own, or load with "
            "load_optimizer=False"
        )
    return next(iter(found.values()))


def _few(partition: zero.Partition) -> str:
    return first_names([slot.fqn for slot in partition.slots], 3)
