"""DeepSpeed: ZeRO stages 0 to 3, saved as fp32 masters and optimizer state per parameter, in the names of any engine.

Masters and states are read and written where they lie, in DeepSpeed's flat partitions (``zero.py``). What a load puts
there reaches the low-precision weights through the optimizer's own update after a step. DeepSpeed itself is never
imported here: the engine object that the user made brings everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from distckpt.dcp.leaves import State
from distckpt.engines import deepspeed_guard as guard
from distckpt.engines import zero
from distckpt.engines.base import MODEL, OPTIM_STATE, clean_fqn
from distckpt.engines.deepspeed_counters import Counters
from distckpt.engines.deepspeed_state import PartitionedState
from distckpt.engines.param_state import Saved
from distckpt.engines.step_hook import before_steps
from distckpt.engines.torch import TorchEngine
from distckpt.errors import IncompatibleState

COUNTERS = "engine.deepspeed"


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
        self._optimizer = PartitionedState(engine)

    # ------------------------------------------------------------------ what is there

    def state(self, *, optimizer: bool) -> State:
        """See ``Engine.state``. ``model.<FQN>`` of a trained parameter is its fp32 master."""
        self._check_in_place()
        state = State()
        partitions = self.partitions()
        self._add_parameters(state, partitions)
        self._add_other_entries(state)
        if optimizer and partitions:
            self._optimizer.add_to(state, partitions)
        return state

    def trained(self) -> frozenset[str]:
        """See ``Engine.trained``."""
        return frozenset(MODEL + fqn for fqn, parameter in self._named() if parameter.requires_grad)

    def settled(self, state: State) -> frozenset[str]:
        """See ``StepBound.settled``: masters and optimizer state, which the basic optimizer changes."""
        masters = {MODEL + slot.fqn for partition in self.partitions() for slot in partition.slots}
        return frozenset(name for name in state.tensors if name in masters or name.startswith(OPTIM_STATE))

    def before_step(self, call: Callable[[], None]) -> Callable[[], None]:
        """See ``StepBound.before_step``. Every wrapper of DeepSpeed leaves the arithmetic to its basic optimizer's step."""
        return before_steps(call, (self._optimizer.basic,) if self.partitions() else ())

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            yield clean_fqn(name), parameter

    def partitions(self) -> list[zero.Partition]:
        """Return where this rank's masters and their parameters lie."""
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

    # ------------------------------------------------------------------ loading

    def prepare(self, saved: Saved, *, optimizer: bool) -> State:
        """See ``Engine.prepare``. State that the checkpoint has and this rank not yet is allocated like its partition."""
        partitions = self.partitions()
        optimizer = optimizer and bool(partitions)
        if optimizer:
            self._optimizer.allocate(saved, partitions)
        state = self.state(optimizer=optimizer)
        if optimizer:
            self._optimizer.read_scalars_apart(state, partitions)
        return state

    def finish(self, loaded: Collection[str], objects: Mapping[str, Any], *, optimizer: bool) -> None:
        """See ``Engine.finish``. Collective: the low-precision weights are made again from the masters on all ranks."""
        partitions = self.partitions()
        if optimizer and partitions:
            self._optimizer.finish(loaded, objects, partitions)
        self._finish_other_entries(loaded, objects)
        if any(MODEL + fqn in loaded for fqn, _ in self._named()):
            zero.refresh(self.engine.optimizer, partitions)
        if optimizer:
            zero.relink(self.engine.optimizer, partitions)

    def _finish_other_entries(self, loaded: Collection[str], objects: Mapping[str, Any]) -> None:
        extra: dict[str, Any] = {key: t for name, (key, t) in self._copies.items() if name in loaded}
        for key in self.module.state_dict():
            if MODEL + clean_fqn(key) in objects:
                extra[key] = objects[MODEL + clean_fqn(key)]
        if extra:
            self.module.load_state_dict(extra, strict=False)
