"""Averages as an ordinary state dict of this rank, and back; both sides are compared before anything is copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distckpt.averaging.shadows import Part, Shadows
from distckpt.engines.base import clean_fqn
from distckpt.errors import IncompatibleState


def local_state(shadows: Shadows, average: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Return one average by FQN: tensors of the weights' own kind, or lists of pieces; memory is shared."""
    return {name: _one(parts, average, parameters.get(name)) for name, parts in shadows.parts.items()}


def _one(parts: Sequence[Part], average: int, like: torch.Tensor | None) -> Any:
    views = [part.views[average] for part in parts]
    if isinstance(like, DTensor):
        local = like.to_local().detach()
        if not views:
            views = [torch.empty_like(local, dtype=torch.float32)]
        if len(views) == 1 and views[0].shape == local.shape:
            return DTensor.from_local(
                views[0], like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
    return views[0] if len(views) == 1 and (like is None or views[0].shape == like.shape) else views


def matched(own: Mapping[str, Mapping[str, Any]], given: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (target, source) for every tensor of these averages; ``IncompatibleState`` names all that do not fit."""
    if not isinstance(given, Mapping) or not all(isinstance(v, Mapping) for v in given.values()):
        raise IncompatibleState("the state has no 'shadow' with one dict of tensors for each average")
    problems = _names("averages", own, given)
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for average in () if problems else own:
        found = {clean_fqn(str(name)): value for name, value in given[average].items()}
        wrong = _names("tensors", own[average], found)
        problems += wrong
        for name in () if wrong else own[average]:
            targets, sources = _locals(own[average][name]), _locals(found[name])
            shapes = [tuple(t.shape) for t in targets], [tuple(s.shape) for s in sources]
            if shapes[0] != shapes[1] or _global(own[average][name]) != _global(found[name]):
                problems.append(f"{name} has shape {shapes[0]} on this rank, the state has {shapes[1]}")
            else:
                copies += zip(targets, sources, strict=True)
    if problems:
        raise IncompatibleState(
            f"the state does not fit these averages: {'; '.join(problems[:10])}. A CheckpointManager moves averages between "
            "layouts: stateful={'ema': ema}"
        )
    return copies


def _names(what: str, own: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    missing, unexpected = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    return [
        f"{len(names)} {what} {how}: {names[:5]}"
        for how, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]


def _locals(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, torch.Tensor) for v in values):
        raise IncompatibleState(f"the state has {type(value).__name__} where a tensor belongs")
    return [v.to_local() if isinstance(v, DTensor) else v for v in values]


def _global(value: Any) -> Any:
    return (tuple(value.shape), tuple(value.placements)) if isinstance(value, DTensor) else None
