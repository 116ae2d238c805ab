"""Torch-native models: one process, DDP, FSDP2, HSDP, tensor parallel, any mix, pipeline stages.

Parameters and optimizer state are read and written in place, as they lie on each rank. Nothing is gathered, no
collective is called, and the optimizer is never stepped to make room for its state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distckpt.dcp.leaves import (
    GROUPS,
    State,
    dtype_name,
    flatten_tree,
    tensor_leaf,
    tree_refs,
    unflatten_tree,
)
from distckpt.engines.base import MODEL, OPTIM_GROUPS, OPTIM_STATE, clean_fqn
from distckpt.engines.module_walk import (
    is_plain,
    named_modules,
    named_parameters,
    named_tensors,
    rescaled,
    synced_buffers,
)
from distckpt.engines.param_state import Saved, add_tied_state, add_value, group_settings, room_for, split_state_names
from distckpt.engines.step_hook import before_steps
from distckpt.errors import IncompatibleState
from distckpt.format.layout import Layout, Mesh


class TorchEngine:
    """Adapter for ``nn.Module`` and ``torch.optim.Optimizer``; several optimizers share one namespace by FQN."""

    name = "torch"
    parts: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self._copies: dict[str, tuple[str, torch.Tensor]] = {}
        self._others: dict[str, str] = {}
        """Names of the state dict's entries that are no tensors, and their keys in it."""
        self._trained: frozenset[str] = frozenset()

    def state(self, *, optimizer: bool) -> State:
        """See ``Engine.state``. Tensors are named ``model.<FQN>`` and ``optim.state.<FQN>.<key>``."""
        state = State()
        self._add_model(state)
        if optimizer and self.optimizers:
            self._add_optimizers(state)
        return state

    def prepare(self, saved: Saved, *, optimizer: bool) -> State:
        """See ``Engine.prepare``. State that the checkpoint has and the optimizer not yet is allocated like its parameter."""
        if optimizer:
            self._allocate(saved)
        return self.state(optimizer=optimizer)

    def finish(self, loaded: Collection[str], objects: Mapping[str, Any], *, optimizer: bool) -> None:
        """See ``Engine.finish``."""
        extra: dict[str, Any] = {key: t for name, (key, t) in self._copies.items() if name in loaded}
        extra |= {key: objects[name] for name, key in self._others.items() if name in objects}
        if extra:
            self.model.load_state_dict(extra, strict=False)
        if optimizer:
            self._finish_state(objects)
            if OPTIM_GROUPS in objects:
                self._finish_groups(objects[OPTIM_GROUPS])

    def trained(self) -> frozenset[str]:
        """See ``Engine.trained``: as ``state`` has last found them."""
        return self._trained

    def settled(self, state: State) -> frozenset[str]:
        """See ``StepBound.settled``. Embeddings with ``max_norm`` are left out: their forward pass scales them."""
        trained = self.trained() - self._copies.keys() - rescaled(self.model)
        return frozenset(name for name in state.tensors if name in trained or name.startswith(OPTIM_STATE))

    def before_step(self, call: Callable[[], None]) -> Callable[[], None]:
        """See ``StepBound.before_step``."""
        return before_steps(call, self.optimizers)

    def _add_model(self, state: State) -> None:
        modules = list(named_modules(self.model))
        entries: list[tuple[str, Any, torch.Tensor | None]]
        if all(is_plain(module) for _, module in modules):  # a walk of torch's own costs as much as all else here
            entries = [(key, tensor, tensor) for key, tensor in named_tensors(modules, persistent=True)]
        else:
            # First: under FSDP2 it reshards what forward left unsharded. Variables themselves: a detached DTensor costs 30 µs.
            values = self.model.state_dict(keep_vars=True)
            live = {clean_fqn(n): t for n, t in named_tensors(modules)}
            entries = [(key, value, live.get(clean_fqn(key))) for key, value in values.items()]
        first: dict[int, str] = {}
        synced = synced_buffers(modules)
        trained = []
        self._copies, self._others = {}, {}
        with torch.no_grad():  # in which a DTensor's to_local() is a look, and no operation of autograd
            for key, value, source in entries:
                name = MODEL + clean_fqn(key)
                if source is not None and source.requires_grad and isinstance(source, nn.Parameter):
                    trained.append(name)
                self._add_entry(state, name, key, value, source, first, synced)
        self._trained = frozenset(trained)

    def _add_entry(
        self,
        state: State,
        name: str,
        key: str,
        value: Any,
        source: torch.Tensor | None,
        first: dict[int, str],
        synced: Mapping[int, int],
    ) -> None:
        """Add one entry of the state dict; ``source`` is the parameter or buffer that it shows, ``first`` names those seen."""
        if not isinstance(value, torch.Tensor):
            state.add_object(name, value)
            self._others[name] = key
            return
        if source is not None and id(source) in first:
            state.aliases[name] = first[id(source)]
            return
        if source is None or (source is not value and _address(source) != _address(value)):
            self._copies[name] = (key, value)  # a state_dict hook made it: loading must go through load_state_dict
        else:
            first[id(source)] = name
        leaf = tensor_leaf(name, value)
        if id(source) in synced:
            leaf = msgspec.structs.replace(leaf, layout=Layout(Mesh.flat((synced[id(source)],)), ("R",)))
        state.add_leaf(leaf)

    def _params(self) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], list[str]]]:
        """Yield (optimizer, param group, FQNs of its params)."""
        names: dict[int, str] = {}
        for name, parameter in named_parameters(self.model):
            names.setdefault(id(parameter), clean_fqn(name))
        for optimizer in self.optimizers:
            for position, group in enumerate(optimizer.param_groups):
                fqns = []
                for index, parameter in enumerate(group["params"]):
                    if id(parameter) not in names:
                        raise IncompatibleState(
                            f"parameter {index} (shape {tuple(parameter.shape)}) of group {position} of "
                            f"{type(optimizer).__name__} is not a parameter of the model; give the manager the module that "
                            "owns it, after wrapping (FSDP2 replaces parameters: build the optimizer after fully_shard)"
                        )
                    fqns.append(names[id(parameter)])
                yield optimizer, group, fqns

    def _add_optimizers(self, state: State) -> None:
        groups = []
        for optimizer, group, fqns in self._params():
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": fqns})
            for fqn, parameter in zip(fqns, group["params"], strict=True):
                for key, value in optimizer.state.get(parameter, {}).items():
                    add_value(state, f"{OPTIM_STATE}{fqn}.{key}", value)
        add_tied_state(state)
        state.add_object(OPTIM_GROUPS, groups, GROUPS)

    def _allocate(self, saved: Saved) -> None:
        wanted = split_state_names(saved, (f for _, _, fqns in self._params() for f in fqns))
        for optimizer, group, fqns in self._params():
            for fqn, parameter in zip(fqns, group["params"], strict=True):
                keys = wanted.get(fqn, {})
                if not keys:
                    optimizer.state.pop(parameter, None)  # saved before its first step: go back to that
                    continue
                live = optimizer.state[parameter]
                for key, name in keys.items():
                    if "." not in key and not isinstance(live.get(key), torch.Tensor):
                        live[key] = room_for(name, key, parameter, group, *saved[name])

    def _finish_state(self, objects: Mapping[str, Any]) -> None:
        for optimizer, group, fqns in self._params():
            for fqn, parameter in zip(fqns, group["params"], strict=True):
                prefix = f"{OPTIM_STATE}{fqn}."
                for name, value in objects.items():
                    if name.startswith(prefix) and "." not in name[len(prefix) :]:
                        live = optimizer.state[parameter]
                        key = name[len(prefix) :]
                        tensors = dict(flatten_tree(name, live.get(key))[0]) if any(tree_refs(value)) else {}
                        live[key] = unflatten_tree(value, tensors)

    def _finish_groups(self, saved: list[dict[str, Any]]) -> None:
        for _, group, fqns in self._params():
            # Frozen parameters may be in a group, but other engines (ZeRO) do not list them.
            trained = [f for f, p in zip(fqns, group["params"], strict=True) if p.requires_grad]
            for key, value in group_settings(saved, trained).items():
                if isinstance(group.get(key), torch.Tensor) and isinstance(value, (torch.Tensor, int, float)):
                    group[key].copy_(torch.as_tensor(value))
                else:
                    group[key] = value


def _address(tensor: torch.Tensor) -> tuple[int, str]:
    local = tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor
    return (local.data_ptr(), dtype_name(local.dtype))
