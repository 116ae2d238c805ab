"""What a checkpoint holds besides model and optimizer: scheduler, scaler, statefuls, RNG, the user's extra state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import msgspec
import torch

from distckpt.config import CheckpointConfig
from distckpt.dcp.leaves import (
    DROP_ON_RESIZE,
    PER_RANK,
    REPLICATED,
    State,
    TensorLeaf,
    flatten_tree,
    tensor_leaf,
    tree_refs,
    unflatten_tree,
)
from distckpt.engines.rng import capture_rng
from distckpt.errors import ConfigError, DistckptError, IncompatibleState

RNG, EXTRA = "rng", "extra_state"
_RESERVED = {"model", "optim", RNG, EXTRA}


@runtime_checkable
class LeafStateful(Protocol):
    """A stateful whose tensors are leaves: sharded like the model, read and written in place (averages of weights)."""

    def leaves(self, name: str, *, loading: bool = False) -> State:
        """Return its tensors under ``<name>.``, aliases among them, and one object called ``name``.

        A leaf whose own FQN is another than its key is the tensor of that name, and stored once where that is true.
        """

    def take_over(self, name: str, value: Any, loaded: Collection[str], stored: Collection[str]) -> list[str]:
        """Finish a load that filled the leaves. ``value``: its object; ``loaded``: names found; ``stored``: tensors stored."""

    def begin_again(self, name: str, why: str) -> list[str]:
        """Start over from the loaded model, because the checkpoint's state of this name is not there or not wanted."""


@runtime_checkable
class StepBoundPart(Protocol):
    """A stateful with tensors that a lazy save need not copy at once (averages of weights)."""

    def settled(self, name: str) -> Collection[str]:
        """Return the names, under ``<name>.``, of its tensors that change right after optimizer steps and nowhere else."""


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
        if isinstance(part, LeafStateful) and self.kind(name) != REPLICATED:
            raise ConfigError(
                f"stateful {name!r} is sharded like the model: it cannot be in per_rank or drop_on_resize"
            )

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
            if isinstance(part, LeafStateful):
                _merge(state, part.leaves(name))
            else:
                self._add_tree(state, name, part.state_dict())
        if extra_state is not None:
            self._add_tree(state, EXTRA, extra_state)
        if self.config.save_rng_state:
            state.add_object(RNG, capture_rng(), PER_RANK)

    def settled(self, state: State) -> frozenset[str]:
        """Return the FQNs of the tensors of parts that say what of them changes right after optimizer steps alone."""
        found = [part.settled(name) for name, part in self.parts.items() if isinstance(part, StepBoundPart)]
        return frozenset(name for names in found for name in names if name in state.tensors)

    def add_targets(self, state: State, saved: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Add the live tensors of the parts as targets of a load, where they fit.

        ``saved``: FQN to (dtype, shape). A whole tensor of another dtype or shape is read into memory of its own: a part
        may grow, and its ``load_state_dict`` is the judge.
        """
        self._live = {}
        self.add_leaf_targets(state)
        for name, part in self.parts.items():
            if self.kind(name) == REPLICATED and not isinstance(part, LeafStateful):
                for fqn, tensor in flatten_tree(name, part.state_dict())[0].items():
                    leaf = tensor_leaf(fqn, tensor) if fqn in saved else None
                    if leaf is not None and (leaf.layout is not None or (leaf.dtype, leaf.shape) == saved[fqn]):
                        state.add_leaf(leaf)
                        self._live[fqn] = tensor

    def add_leaf_targets(self, state: State) -> None:
        """Add the leaves of parts that have their own, as targets of a load."""
        for name, part in self.parts.items():
            if isinstance(part, LeafStateful):
                _merge(state, part.leaves(name, loading=True))

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


def _merge(state: State, offered: State) -> None:
    """Add a part's leaves; one that is a tensor of the state already, in the same memory, becomes an alias of it."""
    for name, leaf in offered.tensors.items():
        target = state.aliases.get(leaf.fqn, leaf.fqn)
        if target in state.tensors and _same_memory(state.tensors[target], leaf):
            state.aliases[name] = target
        else:
            state.add_leaf(msgspec.structs.replace(leaf, fqn=name))
    for alias, target in offered.aliases.items():
        state.aliases[alias] = state.aliases.get(target, target)
    for single in offered.objects.values():
        state.add_object(single.name, single.value, single.kind)


def _same_memory(one: TensorLeaf, other: TensorLeaf) -> bool:
    def places(leaf: TensorLeaf) -> list[Any]:
        return [(box, t.data_ptr(), t.device, t.stride()) for box, t in leaf.parts]

    return (one.dtype, one.shape, one.layout) == (other.dtype, other.shape, other.layout) and places(one) == places(
        other
    )


def _singles(part: Any) -> list[tuple[str, Any]]:
    """Return (name suffix, part) for a single object, or for each of a list or dict of them."""
    if isinstance(part, (list, tuple)):
        return [(f".{i}", single) for i, single in enumerate(part)]
    if isinstance(part, Mapping) and not hasattr(part, "load_state_dict"):
        return [(f".{key}", single) for key, single in part.items()]
    return [("", part)]
