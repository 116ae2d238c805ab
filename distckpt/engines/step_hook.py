"""Holding up changes of weights: a call before any optimizer of this process steps, and before what else changes them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distckpt.errors import ConfigError

_fences: dict[int, weakref.WeakMethod[Callable[[], None]]] = {}
_numbers = itertools.count()


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
    number = next(_numbers)
    _fences[number] = weakref.WeakMethod(call, lambda _: end())

    def hook(*_: Any) -> None:
        _pass(number)

    def end() -> None:
        _fences.pop(number, None)
        handle.remove()

    handle = register_optimizer_step_pre_hook(hook)
    return end


def pass_fences() -> None:
    """Call everything that has to run before weights or optimizer state are changed: for code that does so itself."""
    for number in list(_fences):
        _pass(number)


def _pass(number: int) -> None:
    reference = _fences.get(number)
    call = None if reference is None else reference()
    if call is not None:
        call()
