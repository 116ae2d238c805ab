"""FSDP1 (FullyShardedDataParallel): its flat parameters are reached only through torch's own state-dict calls.

Unlike FSDP2, FSDP1 gathers and re-cuts parameters to make a state dict, so leaves are copies and are handed back
with ``set_*_state_dict`` after a load. Move to FSDP2 (``fully_shard``) where you can.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel

from distckpt.dcp.leaves import GROUPS, State
from distckpt.engines.base import MODEL, OPTIM_GROUPS, OPTIM_STATE, clean_fqn
from distckpt.engines.param_state import Saved, add_tied_state, add_value, group_settings


def has_fsdp1(model: nn.Module) -> bool:
    """Whether any part of the model is wrapped in FSDP1."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


class FSDP1Engine:
    """Adapter for models wrapped in ``FullyShardedDataParallel``."""

    name = "fsdp1"
    parts: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self._model_state: dict[str, Any] = {}
        self._optim_state: dict[str, Any] = {}
        self._tied: dict[str, str] = {}

    def state(self, *, optimizer: bool) -> State:
        """See ``Engine.state``; here leaves are copies, and all ranks must call together (FSDP1 gathers)."""
        state = State()
        self._model_state = dict(get_model_state_dict(self.model))
        value: Any
        for key, value in self._model_state.items():
            name = MODEL + clean_fqn(key)
            if isinstance(value, torch.Tensor) or type(value).__name__ == "ShardedTensor":
                state.add_tensor(name, value)
            else:
                state.add_object(name, value)
        self._alias_tied(state)
        self._optim_state = {}
        if optimizer and any(o.state for o in self.optimizers):
            self._add_optimizers(state)
        elif optimizer and self.optimizers and (groups := self._groups()) is not None:
            state.add_object(OPTIM_GROUPS, [{**g, "params": fqns} for g, fqns in groups], GROUPS)
        return state

    def prepare(self, saved: Saved, *, optimizer: bool) -> State:
        """See ``Engine.prepare``: torch makes room by a step with zero gradients and learning rate."""
        if optimizer and any(name.startswith(OPTIM_STATE) for name in saved):
            get_optimizer_state_dict(self.model, self.optimizers)
        elif optimizer:  # saved before its first step: go back to that
            for single in self.optimizers:
                single.state.clear()
        return self.state(optimizer=optimizer)

    def finish(self, loaded: Collection[str], objects: Mapping[str, Any], *, optimizer: bool) -> None:
        """See ``Engine.finish``."""
        for alias, target in self._tied.items():
            self._model_state[alias] = self._model_state[target]
        set_model_state_dict(self.model, self._model_state)
        if optimizer and self._optim_state:
            if OPTIM_GROUPS in objects:
                for group in self._optim_state["param_groups"]:
                    group.update(group_settings(objects[OPTIM_GROUPS], group["params"]))
            set_optimizer_state_dict(self.model, self.optimizers, self._optim_state)
        elif optimizer and OPTIM_GROUPS in objects:
            for group, fqns in self._groups() or ():
                group.update(group_settings(objects[OPTIM_GROUPS], fqns))

    def _groups(self) -> list[tuple[dict[str, Any], list[str]]] | None:
        """Return (param group, FQNs) of optimizers without state; None where flat parameters hide the names.

        torch's own call would take a step to make state first, which a save must not do.
        """
        fqns = {id(parameter): clean_fqn(name) for name, parameter in self.model.named_parameters()}
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        if any(id(p) not in fqns or isinstance(p, FlatParameter) for group in groups for p in group["params"]):
            return None
        return [(group, [fqns[id(p)] for p in group["params"]]) for group in groups]

    def trained(self) -> frozenset[str]:
        """See ``Engine.trained``."""
        named = self.model.named_parameters(remove_duplicate=False)
        return frozenset(MODEL + clean_fqn(name) for name, parameter in named if parameter.requires_grad)

    def _alias_tied(self, state: State) -> None:
        first: dict[int, str] = {}
        self._tied = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            fqn = clean_fqn(name)
            target = first.setdefault(id(parameter), fqn)
            if target != fqn and MODEL + target in state.tensors and MODEL + fqn in state.tensors:
                del state.tensors[MODEL + fqn]
                state.aliases[MODEL + fqn] = MODEL + target
                self._tied[fqn] = target

    def _add_optimizers(self, state: State) -> None:
        self._optim_state = dict(get_optimizer_state_dict(self.model, self.optimizers))
        for fqn, values in self._optim_state["state"].items():
            for key, value in values.items():
                name = f"{OPTIM_STATE}{clean_fqn(fqn)}.{key}"
                if type(value).__name__ == "ShardedTensor":
                    state.add_tensor(name, value)
                else:
                    add_value(state, name, value)
        add_tied_state(state)
        state.add_object(OPTIM_GROUPS, self._optim_state["param_groups"], GROUPS)
