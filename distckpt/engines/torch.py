"""Torch-native models: one process, DDP, FSDP2, HSDP, tensor parallel, any mix, pipeline stages.

Parameters and optimizer state are read and written in place, as they lie on each rank. Nothing is gathered, no
collective is called, and the optimizer is never stepped to make room for its state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distckpt.dcp.leaves import (
    GROUPS,
    State,
    dtype_name,
    flatten_tree,
    tensor_leaf,
    torch_dtype,
    tree_refs,
    unflatten_tree,
)
from distckpt.engines.base import MODEL, OPTIM_GROUPS, OPTIM_STATE, clean_fqn
from distckpt.engines.step_hook import before_steps
from distckpt.errors import IncompatibleState
from distckpt.format.layout import Layout, Mesh

Saved = Mapping[str, tuple[str, tuple[int, ...]]]


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
        trained = self.trained() - self._copies.keys() - _rescaled(self.model)
        return frozenset(name for name in state.tensors if name in trained or name.startswith(OPTIM_STATE))

    def before_step(self, call: Callable[[], None]) -> Callable[[], None]:
        """See ``StepBound.before_step``."""
        return before_steps(call, self.optimizers)

    def _add_model(self, state: State) -> None:
        modules = list(_named_modules(self.model))
        entries: list[tuple[str, Any, torch.Tensor | None]]
        if all(_is_plain(module) for _, module in modules):  # a walk of torch's own costs as much as all else here
            entries = [(key, tensor, tensor) for key, tensor in _named_tensors(modules, persistent=True)]
        else:
            # First: under FSDP2 it reshards what forward left unsharded. Variables themselves: a detached DTensor costs 30 µs.
            values = self.model.state_dict(keep_vars=True)
            live = {clean_fqn(n): t for n, t in _named_tensors(modules)}
            entries = [(key, value, live.get(clean_fqn(key))) for key, value in values.items()]
        first: dict[int, str] = {}
        synced = _synced_buffers(modules)
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
        for name, parameter in _named_parameters(self.model):
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
                        live[key] = _room_for(name, key, parameter, group, *saved[name])

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


def group_settings(saved: list[dict[str, Any]], fqns: Sequence[str]) -> dict[str, Any]:
    """Return the saved settings (lr, betas, ...) of the parameters that form one group here.

    Raises ``IncompatibleState`` if one of them has none, or if they were in groups with different settings.
    """
    by_fqn = {fqn: group for group in saved for fqn in group["params"]}
    absent = [fqn for fqn in fqns if fqn not in by_fqn]
    if absent:
        raise IncompatibleState(
            f"the checkpoint has no optimizer settings for {absent[:5]}; were they frozen then? Leave them out of the "
            "optimizer until the load is done and add them by add_param_group, or load with load_optimizer=False"
        )
    found = [{k: v for k, v in by_fqn[fqn].items() if k != "params"} for fqn in fqns]
    if any(settings != found[0] for settings in found):
        raise IncompatibleState(
            f"parameters {fqns[0]} … {fqns[-1]} are in one optimizer group here but in several in the checkpoint, with other "
            "settings; build the optimizer with the same groups, or load with load_optimizer=False"
        )
    return found[0] if found else {}


def add_value(state: State, name: str, value: Any) -> None:
    """Add an optimizer value: a tensor, a plain value, or a container with tensors in it."""
    if isinstance(value, torch.Tensor):
        state.add_tensor(name, value)
        return
    tensors, tree = flatten_tree(name, value)
    state.add_object(name, tree)
    for fqn, tensor in tensors.items():
        state.add_tensor(fqn, tensor)


def add_tied_state(state: State) -> None:
    """Give the optimizer state of tied parameters their other names too: a pipeline stage may know only one of them."""
    if not state.aliases:
        return
    tied: dict[str, list[str]] = {}
    for alias, target in list(state.aliases.items()):
        tied.setdefault(target.removeprefix(MODEL), []).append(alias.removeprefix(MODEL))
    for fqn, keys in split_state_names(state.tensors, tied).items():
        for alias in tied[fqn]:
            for key, name in keys.items():
                state.aliases[f"{OPTIM_STATE}{alias}.{key}"] = name


def split_state_names(saved: Iterable[str], fqns: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return parameter FQN to {state key: saved name}, for saved names ``optim.state.<FQN>.<key>`` of these FQNs."""
    known = set(fqns)
    found: dict[str, dict[str, str]] = {}
    for name in saved:
        if not name.startswith(OPTIM_STATE):
            continue
        rest = name[len(OPTIM_STATE) :]
        cut = rest.rfind(".")
        while cut > 0:
            if rest[:cut] in known:
                found.setdefault(rest[:cut], {})[rest[cut + 1 :]] = name
                break
            cut = rest.rfind(".", 0, cut)
    return found


def _room_for(
    name: str, key: str, parameter: torch.Tensor, group: Mapping[str, Any], dtype: str, shape: tuple[int, ...]
) -> torch.Tensor:
    """Allocate one optimizer state tensor as the optimizer would have: like its parameter, or a small plain tensor."""
    if tuple(parameter.shape) == shape and shape:
        return torch.zeros_like(parameter, dtype=torch_dtype(dtype), requires_grad=False)
    if isinstance(parameter, DTensor) and shape:
        raise IncompatibleState(
            f"{name} has shape {list(shape)}, its sharded parameter {list(parameter.shape)}: its layout cannot be known "
            "before the optimizer has made it. Take one optimizer step before loading, or load with load_optimizer=False"
        )
    # torch keeps `step` on the host unless a capturable or fused optimizer reads it on the device.
    on_device = shape or group.get("capturable") or group.get("fused") or key != "step"
    device = parameter.device if on_device else torch.device("cpu")
    return torch.zeros(shape, dtype=torch_dtype(dtype), device=device)


def _synced_buffers(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, int]:
    """Return id to rank, for the buffers that DDP overwrites with that rank's values before each forward pass.

    In between (batch norm statistics after a forward pass) ranks differ, and only that rank's values will ever count:
    only they are saved. A DDP group that is not the whole world is left out, its buffers must be equal.
    """
    found: dict[int, int] = {}
    for _, module in modules:
        if not isinstance(module, DistributedDataParallel) or not module.broadcast_buffers:
            continue
        if dist.get_world_size(module.process_group) == dist.get_world_size():
            root = dist.get_global_rank(module.process_group, 0)
            for name, buffer in module.module.named_buffers():
                if name not in module.parameters_to_ignore:
                    found[id(buffer)] = root
    return found


def _rescaled(model: nn.Module) -> set[str]:
    """Return the names of parameters that a forward pass changes: embeddings with ``max_norm`` scale rows in place."""
    scaling = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None
    }
    named = _named_parameters(model) if scaling else ()
    return {MODEL + clean_fqn(name) for name, parameter in named if id(parameter) in scaling}


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules under each of their names, parents first: a faster ``named_modules(remove_duplicate=False)``."""
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        yield name, module
        prefix = f"{name}." if name else ""
        waiting += [(prefix + n, child) for n, child in reversed(module._modules.items()) if child is not None]


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters under each of their names: a faster ``named_parameters(remove_duplicate=False)``."""
    return _named_tensors(_named_modules(model), ("_parameters",))


def _named_tensors(
    modules: Iterable[tuple[str, nn.Module]],
    kinds: Sequence[str] = ("_parameters", "_buffers"),
    *,
    persistent: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers (the ``persistent`` ones only) under each of their names."""
    for prefix, module in modules:
        absent = module._non_persistent_buffers_set if persistent else ()
        for kind in kinds:
            for name, tensor in getattr(module, kind).items():
                if tensor is not None and not (name in absent and kind == "_buffers"):
                    yield f"{prefix}.{name}" if prefix else name, tensor


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's part of ``state_dict`` is its parameters and persistent buffers, and nothing else has a say."""
    kind: Any = type(module)
    own = module.__dict__
    return _is_plain_type(kind) and not (
        own["_state_dict_hooks"]
        or own["_state_dict_pre_hooks"]
        or "state_dict" in own  # as PEFT's recipes set it on a single module
        or "_save_to_state_dict" in own
        or "get_extra_state" in own
    )


@lru_cache(maxsize=1024)
def _is_plain_type(kind: Any) -> bool:
    return (
        kind.state_dict is nn.Module.state_dict
        and kind._save_to_state_dict is nn.Module._save_to_state_dict
        and kind.get_extra_state is nn.Module.get_extra_state
    )


def _address(tensor: torch.Tensor) -> tuple[int, str]:
    local = tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor
    return (local.data_ptr(), dtype_name(local.dtype))
