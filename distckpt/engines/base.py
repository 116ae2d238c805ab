"""The Engine protocol: how a training engine's live model and optimizer become leaves, and take them back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from distckpt.dcp.leaves import State

MODEL, OPTIM_STATE, OPTIM_GROUPS = "model.", "optim.state.", "optim.param_groups"
ENGINE = "engine."
"""Parts of this name belong to one engine (counters, loss scale); another engine leaves them out of a load."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@runtime_checkable
class Engine(Protocol):
    """What the manager asks of an engine. All methods are called on the training thread, on every rank."""

    name: str
    parts: Mapping[str, Any]
    """Objects with ``state_dict`` that the engine brings along: its scheduler, and ``engine.<name>`` for its own state."""

    def state(self, *, optimizer: bool) -> State:
        """Return the live state as leaves that share memory with it; allocates nothing and changes nothing."""

    def prepare(self, saved: Mapping[str, tuple[str, tuple[int, ...]]], *, optimizer: bool) -> State:
        """Return the leaves to load into, after making room for saved optimizer state that does not exist yet.

        ``saved`` maps every saved FQN to (dtype name, global shape).
        """

    def trained(self) -> frozenset[str]:
        """Return the names (``model.<FQN>``) of parameters that require gradients: training changes them. After ``state``."""

    def finish(self, loaded: Collection[str], objects: Mapping[str, Any], *, optimizer: bool) -> None:
        """Take over what was loaded: tensors that are not in place, param groups, other saved values."""


@runtime_checkable
class StepBound(Protocol):
    """An engine whose state changes in optimizer steps, which it can hold up: what lazy staging needs."""

    def settled(self, state: State) -> frozenset[str]:
        """Return the FQNs of tensors of ``state`` (made just now) that nothing but an optimizer step changes.

        Not buffers, which a forward pass may change, nor frozen parameters, which nothing keeps a forward pass from
        changing (momentum encoders).
        """

    def before_step(self, call: Callable[[], None]) -> Callable[[], None]:
        """Have ``call``, a bound method, run before each optimizer step; returns what ends that.

        Raises ``ConfigError`` for an optimizer that cannot be held up.
        """


def has_groups(engine: Engine) -> bool:
    """Whether the job has an optimizer. Its state is collected to know, but where there can be none."""
    return not has_no_optimizer(engine) and OPTIM_GROUPS in engine.state(optimizer=True).objects


def has_no_optimizer(engine: Engine) -> bool:
    """Whether it is certain without a look at the state that the job has none."""
    return getattr(engine, "optimizers", None) == ()


def clean_fqn(name: str, *, unwrap: bool = True) -> str:
    """Return an FQN without the parts that DDP, FSDP1, ``torch.compile`` and activation checkpointing insert.

    A model with a real submodule called ``module`` keeps it: pass ``unwrap=False`` for names of unwrapped models.
    """
    wrapped = "module." in name or "_orig_mod." in name  # every wrapper's name ends so; most have none
    return _WRAPPERS.sub("", name) if unwrap and wrapped else name
