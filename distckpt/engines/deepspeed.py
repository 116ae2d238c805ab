"""DeepSpeed: ZeRO stages 0 to 3, saved as fp32 masters and optimizer state per parameter, in the names of any engine.

Masters and states are read and written where they lie, in DeepSpeed's flat partitions (``zero.py``). What a load puts
there reaches the low-precision weights through the optimizer's own update after a step. DeepSpeed itself is never
imported here: the engine object that the user made brings everything.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distckpt.dcp.leaves import GROUPS, State, TensorLeaf, torch_dtype
from distckpt.engines import deepspeed_guard as guard
from distckpt.engines import zero
from distckpt.engines.base import MODEL, OPTIM_GROUPS, OPTIM_STATE, clean_fqn
from distckpt.engines.deepspeed_counters import Counters
from distckpt.engines.torch import Saved, TorchEngine, add_tied_state, group_settings, split_state_names
from distckpt.errors import IncompatibleState

log = logging.getLogger("distckpt")

COUNTERS = "engine.deepspeed"
HOW_NOT_WHAT = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Settings of a param group that say how this process computes, not what: a load leaves them as they are."""
SHARED_SCALARS = frozenset({"step", "mu_product", "mu", "eta"})
"""Optimizer state that is one number per tensor even where the parameter itself has no dimension."""
Scalar = tuple[zero.Partition, str, dict[str, torch.Tensor]]


def deepspeed_engine(engine: Any) -> DeepSpeedEngine | PlainDeepSpeedEngine:
    """Return the adapter of a DeepSpeed engine; ``IncompatibleState`` names what it uses that cannot be saved."""
    guard.check(engine)
    if "DeepSpeedOptimizer" in guard.class_names(engine.optimizer) or _is_partitioned(engine.module):
        return DeepSpeedEngine(engine)
    return PlainDeepSpeedEngine(engine)


def _is_partitioned(module: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_tensor") for parameter in module.parameters())


def _parts(engine: Any) -> dict[str, Any]:
    scheduler = {} if engine.lr_scheduler is None else {"scheduler": engine.lr_scheduler}
    return {**scheduler, COUNTERS: Counters(engine)}


class PlainDeepSpeedEngine(TorchEngine):
    """Adapter for an engine whose optimizer DeepSpeed did not wrap: stage 0 in fp32, or no optimizer."""

    name = "deepspeed"

    def __init__(self, engine: Any) -> None:
        super().__init__(engine.module, () if engine.optimizer is None else (engine.optimizer,))
        self.parts = _parts(engine)


class DeepSpeedEngine:
    """Adapter for an engine with a wrapped optimizer: every ZeRO stage, and stage 0 in fp16 or bf16."""

    name = "deepspeed"

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.module: nn.Module = engine.module
        self.parts: Mapping[str, Any] = _parts(engine)
        self._copies: dict[str, tuple[str, torch.Tensor]] = {}
        self._scalars: list[Scalar] = []

    # ------------------------------------------------------------------ what is there

    def state(self, *, optimizer: bool) -> State:
        """See ``Engine.state``. ``model.<FQN>`` of a trained parameter is its fp32 master."""
        self._check_in_place()
        state = State()
        partitions = self._partitions()
        self._add_parameters(state, partitions)
        self._add_other_entries(state)
        if optimizer and partitions:
            live = self.engine.optimizer.optimizer.state
            for partition in partitions:
                for key, value in live.get(partition.flat, {}).items():
                    for slot in partition.slots:
                        self._add_value(state, partition, slot, key, value)
            add_tied_state(state)
            state.add_object(OPTIM_GROUPS, self._groups(partitions), GROUPS)
        return state

    def trained(self) -> frozenset[str]:
        """See ``Engine.trained``."""
        return frozenset(MODEL + fqn for fqn, parameter in self._named() if parameter.requires_grad)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            yield clean_fqn(name), parameter

    def _partitions(self) -> list[zero.Partition]:
        names: dict[int, str] = {}
        for fqn, parameter in self._named():
            names.setdefault(id(parameter), fqn)
        return zero.partitions_of(self.engine.optimizer, names)

    def _check_in_place(self) -> None:
        if getattr(self.engine.optimizer, "offloaded_states", None):
            raise IncompatibleState(
                "engine.offload_states() has moved this engine's state away; call engine.reload_states() before saving or loading"
            )

    def _add_parameters(self, state: State, partitions: list[zero.Partition]) -> None:
        masters = {id(slot.param): (slot, p.flat) for p in partitions for slot in p.slots}
        first: dict[int, str] = {}
        for fqn, parameter in self._named():
            name = MODEL + fqn
            if id(parameter) in first:
                state.aliases[name] = first[id(parameter)]
                continue
            first[id(parameter)] = name
            if id(parameter) in masters:
                state.add_leaf(zero.leaf_of(name, *masters[id(parameter)]))
            elif hasattr(parameter, "ds_tensor"):
                state.add_leaf(zero.partitioned_leaf(name, parameter))
            else:
                state.add_tensor(name, parameter)

    def _add_other_entries(self, state: State) -> None:
        """Add buffers and whatever else modules and their hooks put into a state dict (nothing is gathered)."""
        live = {clean_fqn(name): b for name, b in self.module.named_buffers(remove_duplicate=False)}
        parameters = {fqn for fqn, _ in self._named()}
        first: dict[int, str] = {}
        self._copies = {}
        for key, value in self.module.state_dict().items():
            fqn = clean_fqn(key)
            name = MODEL + fqn
            if fqn in parameters:
                continue
            if not isinstance(value, torch.Tensor):
                state.add_object(name, value)
                continue
            source = live.get(fqn)
            if source is not None and id(source) in first:
                state.aliases[name] = first[id(source)]
                continue
            if source is None or (source.data_ptr(), source.dtype) != (value.data_ptr(), value.dtype):
                self._copies[name] = (key, value)  # a hook made it: loading must go through load_state_dict
            else:
                first[id(source)] = name
            state.add_tensor(name, value)

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
            live = self.engine.optimizer.optimizer.param_groups[partition.group]
            settings = {key: value for key, value in live.items() if key not in ("params", "step")}
            group = groups.setdefault(partition.group, {**settings, "params": []})
            group["params"] += [slot.fqn for slot in partition.slots]
        return [groups[index] for index in sorted(groups)]

    # ------------------------------------------------------------------ loading

    def prepare(self, saved: Saved, *, optimizer: bool) -> State:
        """See ``Engine.prepare``. State that the checkpoint has and this rank not yet is allocated like its partition."""
        self._scalars = []
        partitions = self._partitions()
        if optimizer:
            self._allocate(saved, partitions)
        state = self.state(optimizer=optimizer)
        if optimizer:
            self._read_scalars_apart(state, partitions)
        return state

    def _allocate(self, saved: Saved, partitions: list[zero.Partition]) -> None:
        wanted = split_state_names(saved, (slot.fqn for p in partitions for slot in p.slots))
        state = self.engine.optimizer.optimizer.state if partitions else {}
        for partition in partitions:
            keys: dict[str, list[tuple[zero.Slot, str]]] = {}
            for slot in partition.slots:
                for key, name in wanted.get(slot.fqn, {}).items():
                    keys.setdefault(key, []).append((slot, name))
            if not keys:
                state.pop(partition.flat, None)  # saved before its first step: go back to that
                continue
            live = state[partition.flat]
            for key, found in keys.items():
                if "." not in key and key not in live:
                    live[key] = self._room_for(partition, key, [(slot, *saved[name]) for slot, name in found])

    def _room_for(
        self, partition: zero.Partition, key: str, saved: list[tuple[zero.Slot, str, tuple[int, ...]]]
    ) -> torch.Tensor | int:
        """Allocate one state of a partition: like the partition, or one number as its optimizer has it."""
        flat = partition.flat.detach()
        dtype = torch_dtype(saved[0][1])
        is_scalar = any(shape == () != slot.shape for slot, _, shape in saved) or (
            key in SHARED_SCALARS and all(shape == () for _, _, shape in saved)
        )
        if not is_scalar:
            return torch.zeros_like(flat, dtype=dtype, requires_grad=False)
        basic = self.engine.optimizer.optimizer
        if key == "step" and not type(basic).__module__.startswith("torch."):
            return 0  # DeepSpeed's own optimizers count in Python
        group = basic.param_groups[partition.group]
        on_device = key != "step" or group.get("capturable") or group.get("fused")
        return torch.zeros((), dtype=dtype, device=flat.device if on_device else "cpu")

    def _read_scalars_apart(self, state: State, partitions: list[zero.Partition]) -> None:
        """Give every parameter's number a place of its own: a partition has one for all, so they must turn out equal."""
        for partition in partitions:
            for key, value in self.engine.optimizer.optimizer.state.get(partition.flat, {}).items():
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

    def finish(self, loaded: Collection[str], objects: Mapping[str, Any], *, optimizer: bool) -> None:
        """See ``Engine.finish``. Collective: the low-precision weights are made again from the masters on all ranks."""
        partitions = self._partitions()
        if optimizer:
            self._finish_scalars(loaded)
            self._finish_values(objects, partitions)
            if OPTIM_GROUPS in objects:
                self._finish_groups(objects[OPTIM_GROUPS], partitions)
        self._finish_other_entries(loaded, objects)
        if any(name in loaded for name in self._parameter_names()):
            zero.refresh(self.engine.optimizer, partitions)
        if optimizer:
            zero.relink(self.engine.optimizer, partitions)

    def _parameter_names(self) -> Iterator[str]:
        return (MODEL + fqn for fqn, _ in self._named())

    def _finish_scalars(self, loaded: Collection[str]) -> None:
        scalars, self._scalars = self._scalars, []
        for partition, key, places in scalars:
            found = {fqn: t for fqn, t in places.items() if f"{OPTIM_STATE}{fqn}.{key}" in loaded}
            if not found:
                continue
            value = _common(partition, key, found)
            live = self.engine.optimizer.optimizer.state[partition.flat]
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
                self.engine.optimizer.optimizer.state[partition.flat][key] = values[0]

    def _finish_groups(self, saved: list[dict[str, Any]], partitions: list[zero.Partition]) -> None:
        by_group: dict[int, list[str]] = {}
        for partition in partitions:
            by_group.setdefault(partition.group, []).extend(slot.fqn for slot in partition.slots)
        basic = self.engine.basic_optimizer
        for owner in {id(o): o for o in (self.engine.optimizer.optimizer, basic)}.values():
            for index, fqns in by_group.items():
                group = owner.param_groups[index]
                for key, value in group_settings(saved, fqns).items():
                    if key in HOW_NOT_WHAT or key == "step":
                        continue
                    if isinstance(group.get(key), torch.Tensor) and isinstance(value, (torch.Tensor, int, float)):
                        group[key].copy_(torch.as_tensor(value))
                    else:
                        group[key] = value

    def _finish_other_entries(self, loaded: Collection[str], objects: Mapping[str, Any]) -> None:
        extra: dict[str, Any] = {key: t for name, (key, t) in self._copies.items() if name in loaded}
        for key in self.module.state_dict():
            if MODEL + clean_fqn(key) in objects:
                extra[key] = objects[MODEL + clean_fqn(key)]
        if extra:
            self.module.load_state_dict(extra, strict=False)


def _common(partition: zero.Partition, key: str, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the number that all parameters with elements on this rank have.

    Every rank judges every rank's partition, so that all raise together: a collective follows.
    """
    slots = [slot for slot in partition.slots if slot.fqn in found]
    here = [slot for slot in slots if slot.start < slot.stop] or slots
    if len({found[slot.fqn].item() for slot in slots}) > 1:
        ranks = slots[0].layout.mesh.ranks if slots[0].layout is not None else (dist.get_rank(),)
        for rank in ranks:
            values = {slot.fqn: found[slot.fqn].item() for slot in slots if zero.holds(slot, rank)}
            if len(set(values.values())) > 1:
                raise IncompatibleState(
                    f"{OPTIM_STATE}*.{key}: ZeRO keeps one number for all parameters of a partition, but those that rank {rank} "
                    f"holds were saved with several: {dict(list(values.items())[:6])}. Put them into param groups of their own, "
                    "or load with load_optimizer=False"
                )
    return found[here[0].fqn]


def _few(partition: zero.Partition) -> str:
    names = [slot.fqn for slot in partition.slots]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
