"""Optimizer state by parameter FQN and param groups, as every engine over torch optimizers saves and loads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from distckpt.dcp.leaves import State, flatten_tree, torch_dtype
from distckpt.engines.base import MODEL, OPTIM_STATE
from distckpt.errors import IncompatibleState

Saved = Mapping[str, tuple[str, tuple[int, ...]]]
"""Of a checkpoint's tensors: FQN to (dtype, global shape)."""


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


def room_for(
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
