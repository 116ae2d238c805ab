"""What a checkpoint holds besides model and optimizer: scheduler, scaler, statefuls, RNG, the user's extra state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from distckpt.config import CheckpointConfig
from distckpt.dcp.leaves import (
    DROP_ON_RESIZE,
    PER_RANK,
    REPLICATED,
    State,
    flatten_tree,
    tensor_leaf,
    tree_refs,
    unflatten_tree,
)
from distckpt.engines.rng import capture_rng
from distckpt.errors import ConfigError, DistckptError, IncompatibleState

RNG, EXTRA = "rng", "extra_state"
_RESERVED = {"model", "optim", RNG, EXTRA}


class Components:
    """Named objects with ``state_dict`` and ``load_state_dict``, each with its declared relation between ranks.

    A stateful whose class has an attribute ``distckpt_state`` (``"replicated"``, ``"per_rank"`` or
    ``"drop_on_resize"``) declares itself; ``CheckpointConfig.per_rank`` and ``drop_on_resize`` override it.
    """

    def __init__(self, config: CheckpointConfig, stateful: Mapping[str, Any], scheduler: Any, scaler: Any) -> None:
        self.config = config
        self.parts: dict[str, Any] = {}
        self._live: dict[str, torch.Tensor] = {}  # targets as the parts gave them: a sharded tensor goes back as one
        for name, part in (("scheduler", scheduler), ("scaler", scaler), *stateful.items()):
            if part is None:
                continue
            for suffix, single in _singles(part):
                self._add(name + suffix, single)
        unknown = (set(config.per_rank) | set(config.drop_on_resize)) - set(self.parts) - {EXTRA}
        if unknown:
            raise ConfigError(
                f"per_rank or drop_on_resize name {sorted(unknown)}, but stateful has {sorted(self.parts)}"
            )

    def _add(self, name: str, part: Any) -> None:
        if name.split(".")[0] in _RESERVED or name in self.parts:
            raise ConfigError(f"stateful name {name!r} is taken; choose another")
        if not (callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))):
            raise ConfigError(f"stateful {name!r} ({type(part).__name__}) needs state_dict() and load_state_dict()")
        self.parts[name] = part

    def kind(self, name: str) -> str:
        """Return how the part's values relate between ranks."""
        if name in self.config.per_rank:
            return PER_RANK
        if name in self.config.drop_on_resize:
            return DROP_ON_RESIZE
        return getattr(self.parts.get(name), "distckpt_state", REPLICATED)

    def add_to(self, state: State, extra_state: Any = None) -> None:
        """Add every part's current state. Tensors of replicated parts become leaves; per-rank ones stay in place."""
        for name, part in self.parts.items():
            self._add_tree(state, name, part.state_dict())
        if extra_state is not None:
            self._add_tree(state, EXTRA, extra_state)
        if self.config.save_rng_state:
            state.add_object(RNG, capture_rng(), PER_RANK)

    def settled(self, state: State) -> frozenset[str]:
        """Return the FQNs of the tensors of parts that change right after optimizer steps alone.

        A replicated part says so by an attribute ``distckpt_settled = True`` of its class (an EMA, for instance).
        """
        prefixes = tuple(f"{n}." for n, p in self.parts.items() if getattr(p, "distckpt_settled", False))
        return frozenset(name for name in state.tensors if name.startswith(prefixes)) if prefixes else frozenset()

    def add_targets(self, state: State, saved: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Add the live tensors of the parts as targets of a load, where they fit.

        ``saved``: FQN to (dtype, shape). A whole tensor of another dtype or shape is read into memory of its own: a part
        may grow, and its ``load_state_dict`` is the judge.
        """
        self._live = {}
        for name, part in self.parts.items():
            if self.kind(name) == REPLICATED:
                for fqn, tensor in flatten_tree(name, part.state_dict())[0].items():
                    leaf = tensor_leaf(fqn, tensor) if fqn in saved else None
                    if leaf is not None and (leaf.layout is not None or (leaf.dtype, leaf.shape) == saved[fqn]):
                        state.add_leaf(leaf)
                        self._live[fqn] = tensor

    def _add_tree(self, state: State, name: str, tree: Any) -> None:
        kind = self.kind(name)
        if kind != REPLICATED:
            state.add_object(name, tree, kind)
            return
        tensors, rest = flatten_tree(name, tree)
        state.add_object(name, rest)
        for fqn, tensor in tensors.items():
            state.add_tensor(fqn, tensor)

    def load(self, name: str, tree: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hand a part its saved state, with tensors put back in their places."""
        found = {**tensors, **self._live}
        absent = [ref for ref in tree_refs(tree) if ref not in found]
        if absent:
            raise IncompatibleState(f"stateful {name!r}: tensors {absent[:5]} of its saved state were not loaded")
        try:
            self.parts[name].load_state_dict(unflatten_tree(tree, found))
        except DistckptError:
            raise
        except Exception as error:
            raise IncompatibleState(
                f"stateful {name!r}: {type(self.parts[name]).__name__}.load_state_dict refused its saved state "
                f"({type(error).__name__}: {error}); leave it out with exclude=({name!r}, '{name}.*'), or restore what it was"
            ) from error


def _singles(part: Any) -> list[tuple[str, Any]]:
    """Return (name suffix, part) for a single object, or for each of a list or dict of them."""
    if isinstance(part, (list, tuple)):
        return [(f".{i}", single) for i, single in enumerate(part)]
    if isinstance(part, Mapping) and not hasattr(part, "load_state_dict"):
        return [(f".{key}", single) for key, single in part.items()]
    return [("", part)]
