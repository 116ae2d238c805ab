"""The weights to average, as they lie on this rank under each engine: leaves that share memory with the live model.

The manager's engines already know where every layout keeps its parameters (ZeRO: the fp32 masters in the partitions);
here they are told apart into what an average moves and what it only follows, and watched for being moved elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distckpt.dcp.leaves import State, TensorLeaf, tensor_leaf
from distckpt.engines.base import MODEL, Engine, clean_fqn
from distckpt.engines.choose import engine_for
from distckpt.engines.deepspeed import DeepSpeedEngine
from distckpt.engines.deepspeed_guard import is_deepspeed
from distckpt.engines.fsdp1 import FSDP1Engine
from distckpt.errors import ConfigError, IncompatibleState


@dataclass(frozen=True, slots=True)
class Live:
    """One look at the model. Names are FQNs without a prefix.

    ``averaged``: what averages move; ``aliases``: further names of those (tied weights). ``followed``: all other tensors
    of the model's state under all of their names (frozen parameters, buffers), whose average is what they are.
    ``buffers``: persistent buffers, which a forward pass may change; the model's own objects.
    """

    averaged: Mapping[str, TensorLeaf]
    aliases: Mapping[str, str]
    followed: Mapping[str, TensorLeaf]
    buffers: Mapping[str, torch.Tensor]


class LiveWeights:
    """The weights of one model or DeepSpeed engine. ``names`` of what is averaged are settled at the first look.

    ``joining``: a parameter that was frozen then and is trained later joins them; without, it is refused.
    """

    def __init__(self, model: Any, *, average_buffers: bool, joining: bool = False) -> None:
        self.engine: Engine = engine_for(None, None, model) if is_deepspeed(model) else engine_for(model, None)
        if isinstance(self.engine, FSDP1Engine):
            raise ConfigError(
                "FSDP1 gathers its flat parameters to show them, which an average after every step cannot afford; shard with "
                "FSDP2 (torch.distributed.fsdp.fully_shard), whose checkpoints are the same"
            )
        module = getattr(self.engine, "model" if hasattr(self.engine, "model") else "module", None)
        if not isinstance(module, nn.Module):
            raise ConfigError(f"cannot average the weights of engine {self.engine.name!r}: it shows no module")
        self.module = module
        self.average_buffers = average_buffers
        self.joining = joining
        self.names: frozenset[str] = frozenset()
        self._known: frozenset[str] = frozenset()
        self._first: dict[str, str] = {}
        self._homes: list[tuple[dict[str, Any], list[int]]] = []
        self._frozen: list[nn.Parameter] = []
        self._plain: list[torch.Tensor] = []
        self._sharded: list[DTensor] = []
        self._addresses: list[int] = []

    def look(self) -> Live:
        """Return where everything lies now; reshards what a forward pass left unsharded (FSDP2).

        Raises ``ConfigError`` where there is nothing to average, ``IncompatibleState`` where a parameter is there that was
        not at the first look, or the other way round, is tied otherwise, or was frozen and is not and may not join.
        """
        state = self.engine.state(optimizer=False)
        parameters = self.parameters()
        if not self.names:
            self.names, self._known = frozenset(self._choose(parameters, state)), frozenset(parameters)
            if not self.names:
                raise ConfigError(
                    f"{type(self.module).__name__} has no floating-point parameter that requires gradients: nothing to average"
                )
        self._unfrozen(parameters)
        averaged, aliases = self._averaged(parameters, state)
        followed = _followed(state, {*averaged, *aliases})
        self._watch(parameters, averaged)
        return Live(averaged, aliases, followed, dict(self._buffers(state)))

    def moved(self) -> bool:
        """Whether a module, a parameter or its memory is another than ``look`` found, or one is frozen no more.

        Asked before every update.
        """
        # Asked for thousands of tensors between two steps, and what they point to is in no cache.
        other = any(list(map(id, home.values())) != ids for home, ids in self._homes)
        return other or any(p.requires_grad for p in self._frozen) or self._addresses_now() != self._addresses

    def _addresses_now(self) -> list[int]:
        return [t.data_ptr() for t in self._plain] + [t._local_tensor.data_ptr() for t in self._sharded]

    @property
    def collective(self) -> bool:
        """Whether ``written`` waits for the other ranks."""
        return isinstance(self.engine, DeepSpeedEngine)

    def written(self) -> None:
        """Let the engine take over weights that were written in place; collective under ZeRO, which gathers."""
        if isinstance(self.engine, DeepSpeedEngine):
            self.engine.finish({MODEL + name for name in self.names}, {}, optimizer=False)

    # ------------------------------------------------------------------ what is averaged

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the module's parameters by FQN, tied ones under each of their names."""
        found: dict[str, nn.Parameter] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if found.setdefault(clean_fqn(name), parameter) is not parameter:
                raise IncompatibleState(
                    f"two parameters are both called {clean_fqn(name)!r} once wrappers are taken off"
                )
        return found

    def _choose(self, parameters: Mapping[str, nn.Parameter], state: State) -> Iterator[str]:
        for name, parameter in parameters.items():
            if parameter.requires_grad and (parameter.is_floating_point() or parameter.is_complex()):
                yield name
        if self.average_buffers:
            for name, buffer in self.module.named_buffers():
                kept = MODEL + clean_fqn(name) in state.tensors
                if kept and (buffer.is_floating_point() or buffer.is_complex()):
                    yield clean_fqn(name)

    def _unfrozen(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take in what was frozen at the first look and is not any more."""
        if isinstance(self.engine, DeepSpeedEngine):
            return  # its optimizer has what was trained when it was made, nothing else
        rest = self._known - self.names
        thawed = sorted(name for name, p in parameters.items() if p.requires_grad and name in rest)
        if thawed and not self.joining:
            raise IncompatibleState(
                f"{thawed[:5]} were frozen when this was made and require gradients now; make it anew after unfreezing them, "
                "or freeze them again"
            )
        self.names |= set(thawed)

    def _averaged(
        self, parameters: Mapping[str, nn.Parameter], state: State
    ) -> tuple[dict[str, TensorLeaf], dict[str, str]]:
        """Return leaves by first name, and the first name of every other one."""
        partitioned = isinstance(self.engine, DeepSpeedEngine)
        leaves: dict[str, TensorLeaf] = {}
        first: dict[int, str] = {}
        aliases: dict[str, str] = {}
        for name, parameter in parameters.items():
            if name not in self.names:
                continue
            if id(parameter) in first:
                aliases[name] = first[id(parameter)]
                continue
            first[id(parameter)] = name
            # A state_dict hook may show copies: the parameter itself is what training changes.
            leaves[name] = state.tensors[MODEL + name] if partitioned else tensor_leaf(name, parameter)
        for name in sorted(self.names - leaves.keys() - aliases.keys()):
            if MODEL + name in state.tensors:
                leaves[name] = state.tensors[MODEL + name]
        self._check_names(parameters, {*leaves, *aliases})
        self._check_ties({**{name: name for name in leaves}, **aliases})
        return leaves, aliases

    def _check_names(self, parameters: Mapping[str, nn.Parameter], found: set[str]) -> None:
        gone = sorted(self.names - found)
        new = sorted(n for n, p in parameters.items() if p.requires_grad and n not in self._known)
        if gone or new:
            raise IncompatibleState(
                f"the model has changed since the average was made: gone {gone[:5]}, new {new[:5]}; make the average anew "
                "after the model has its final parameters"
            )

    def _check_ties(self, first: Mapping[str, str]) -> None:
        """Refuse other ties than at the first look: one average cannot become two, nor two one, without a wrong value."""
        other = {name: target for name, target in first.items() if self._first.setdefault(name, target) != target}
        tied = [f"{name} to {target}" for name, target in sorted(other.items()) if name != target]
        untied = sorted(f"{name} from {self._first[name]}" for name, target in other.items() if name == target)
        if other:
            raise IncompatibleState(
                f"weights are tied otherwise than when the average was made: tied {tied[:5]}, untied {untied[:5]}; tie them as "
                "they were (load_state_dict(assign=True) unties), or make the average anew after tying them (tie_weights())"
            )

    # ------------------------------------------------------------------ the rest

    def _buffers(self, state: State) -> Iterator[tuple[str, torch.Tensor]]:
        for name, buffer in self.module.named_buffers():
            if MODEL + clean_fqn(name) in state.tensors and clean_fqn(name) not in self.names:
                yield clean_fqn(name), buffer

    def _watch(self, parameters: Mapping[str, nn.Parameter], averaged: Mapping[str, TensorLeaf]) -> None:
        if isinstance(self.engine, DeepSpeedEngine):  # its partitions stay what they are; offloading moves their memory
            partitions = self.engine.partitions()
            held = {id(slot.param) for partition in partitions for slot in partition.slots}
            rest = [getattr(p, "ds_tensor", p) for n, p in parameters.items() if n in averaged and id(p) not in held]
            tensors = [*(partition.flat for partition in partitions), *rest]
        else:
            tensors = [parameters[name] for name in averaged if name in parameters]
            if self.average_buffers:
                tensors += [buffer for buffer in self.module.buffers() if buffer.numel()]
            self._frozen = [parameter for name, parameter in parameters.items() if name not in self.names]
            homes = [home for m in self.module.modules() for home in (m._modules, m._parameters) if home]
            self._homes = [(home, list(map(id, home.values()))) for home in homes]
        self._sharded = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
        self._plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
        self._addresses = self._addresses_now()


def _followed(state: State, averaged: Collection[str]) -> dict[str, TensorLeaf]:
    leaves = {**state.tensors, **{name: state.tensors[target] for name, target in state.aliases.items()}}
    bare = {name.removeprefix(MODEL): leaf for name, leaf in leaves.items() if name.startswith(MODEL)}
    return {name: leaf for name, leaf in bare.items() if name not in averaged}
