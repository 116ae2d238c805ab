"""Holding up optimizer steps: a call before any optimizer of this process changes weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distckpt.errors import ConfigError


def before_steps(call: Callable[[], None], optimizers: Iterable[Any]) -> Callable[[], None]:
    """Have the bound method ``call`` run before every ``torch.optim.Optimizer.step``; returns what ends that.

    The hook is torch's global one: weights may be changed by an optimizer that the manager does not know. Its owner is
    not kept alive by it. ``ConfigError`` if one of ``optimizers`` does not run such hooks.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"lazy_staging=True needs optimizers that run torch's step hooks; {type(optimizer).__name__} is no "
                "torch.optim.Optimizer: set lazy_staging=False"
            )
    reference = weakref.WeakMethod(call)

    def hook(*_: Any) -> None:
        held = reference()
        if held is not None:
            held()

    handle = register_optimizer_step_pre_hook(hook)
    return handle.remove  # type: ignore[no-any-return]
