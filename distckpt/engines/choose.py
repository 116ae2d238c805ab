"""Which engine adapter fits what the user handed over."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from distckpt.engines.base import Engine
from distckpt.engines.deepspeed_guard import is_deepspeed
from distckpt.engines.fsdp1 import FSDP1Engine, has_fsdp1
from distckpt.engines.torch import TorchEngine
from distckpt.errors import ConfigError


def engine_for(model: Any, optimizer: Any, engine: Any = None) -> Engine:
    """Return the adapter for a model and its optimizer(s), or for an engine object.

    ``model``: one module, or a list or dict of them (pipeline stages of this rank). ``optimizer``: None, one, or
    a list or dict of them.
    """
    if engine is not None:
        if model is not None or optimizer is not None:
            raise ConfigError("give either engine=, which holds its model and optimizer, or model= and optimizer=")
        if is_deepspeed(engine):
            from distckpt.engines.deepspeed import deepspeed_engine

            return deepspeed_engine(engine)
        if isinstance(engine, Engine):
            return engine
        raise ConfigError(
            f"engine={type(engine).__name__} is not an engine that distckpt knows; pass model= and optimizer="
        )
    if is_deepspeed(model):
        raise ConfigError("model= is a DeepSpeed engine: pass engine=, which brings its optimizer and scheduler along")
    module = _one_module(model)
    optimizers = tuple(_each(optimizer))
    for single in optimizers:
        if not isinstance(single, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer={type(single).__name__}: want a torch.optim.Optimizer, or a list or dict of them"
            )
    return FSDP1Engine(module, optimizers) if has_fsdp1(module) else TorchEngine(module, optimizers)


def _one_module(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, (list, tuple)) and model and all(isinstance(m, nn.Module) for m in model):
        return model[0] if len(model) == 1 else _Stages(model)
    if isinstance(model, Mapping) and model:
        return nn.ModuleDict(model)
    raise ConfigError(
        f"model={type(model).__name__}: want an nn.Module, a list of pipeline stages, or a dict of modules"
    )


def _each(optimizer: Any) -> Iterable[Any]:
    if optimizer is None:
        return ()
    if isinstance(optimizer, Mapping):
        return optimizer.values()
    return optimizer if isinstance(optimizer, (list, tuple)) else (optimizer,)


class _Stages(nn.Module):
    """Several pipeline stages of one rank as one module, with their FQNs as they are."""

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self._stages = tuple(stages)
        for stage in self._stages:
            for name, child in stage.named_children():
                if name in self._modules:
                    self._modules[name] = _merged(self._modules[name], child)
                else:
                    self.add_module(name, child)
        _check_roots(self._stages)
        # Views: a stage puts another tensor in the place of a buffer when it is moved (``to``) or assigned to.
        backwards = self._stages[::-1]  # a ChainMap names what its last map has first
        self._parameters = _Together(*(stage._parameters for stage in backwards))  # type: ignore[assignment]
        self._buffers = _Together(*(stage._buffers for stage in backwards))  # type: ignore[assignment]
        self._non_persistent_buffers_set = set().union(*(s._non_persistent_buffers_set for s in self._stages))


class _Together(ChainMap[str, Any]):
    """What stages have at their roots, as it is now; of a name that one sets to None, what another has."""

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(key)
        return next((held[key] for held in self.maps if held.get(key) is not None), None)

    def __setitem__(self, key: str, value: Any) -> None:
        for held in self._holders(key) or self.maps[:1]:
            held[key] = value

    def __delitem__(self, key: str) -> None:
        for held in self._holders(key):
            del held[key]

    def _holders(self, key: str) -> list[Any]:
        """Return the stages' own tables that have a name: what is assigned to it goes where it was found."""
        return [held for held in self.maps if key in held]


def _check_roots(stages: Iterable[nn.Module]) -> None:
    """Raise ``ConfigError`` for two tensors of one name: only one of them would be in checkpoints."""
    seen: dict[str, tuple[torch.Tensor, bool]] = {}
    for stage in stages:
        for name, tensor in (*stage.named_parameters(recurse=False), *stage.named_buffers(recurse=False)):
            kept = name not in stage._non_persistent_buffers_set
            other, other_kept = seen.setdefault(name, (tensor, kept))
            if other is not tensor and (kept or other_kept):
                raise ConfigError(
                    f"two pipeline stages of this rank have a tensor {name!r} of their own, and a checkpoint has room for one: "
                    "give the stages as a dict, or register what can be computed again with persistent=False"
                )


def _merged(first: nn.Module | None, second: nn.Module) -> nn.Module:
    if not (isinstance(first, nn.ModuleDict) and isinstance(second, nn.ModuleDict)):
        raise ConfigError("two pipeline stages of this rank have a submodule of the same name; give them as a dict")
    return nn.ModuleDict({**first, **second})
