"""One way to call a model, whatever it was exported to: named tensors in, named tensors out, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from distckpt.errors import IncompatibleState
from distckpt.export.feeds import Inputs

Run = Callable[[Inputs], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Signature:
    """How a model is called. ``outputs``: the names of what it returns; ``keywords``: called by names."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keywords: bool
    dtype: torch.dtype | None = None
    """Of floating inputs; None: as they come."""

    def cast(self, inputs: Inputs) -> Inputs:
        """Return the inputs with floating ones in the model's dtype."""
        if self.dtype is None:
            return inputs
        return {n: v.to(self.dtype) if v.is_floating_point() else v for n, v in inputs.items()}


def named_outputs(result: Any) -> dict[str, torch.Tensor]:
    """Return what a model said as tensors by name: ``logits`` alone where there are some, else every tensor."""
    if isinstance(result, torch.Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        found = {str(n): v for n, v in result.items() if isinstance(v, torch.Tensor)}
    elif isinstance(result, (tuple, list)):
        found = {f"output_{i}": v for i, v in enumerate(result) if isinstance(v, torch.Tensor)}
    else:
        found = (
            {n: v for n, v in vars(result).items() if isinstance(v, torch.Tensor)}
            if hasattr(result, "__dict__")
            else {}
        )
    if not found:
        raise IncompatibleState(
            f"the model returned a {type(result).__name__} without tensors; wrap it so that it gives some"
        )
    return {"logits": found["logits"]} if "logits" in found else found


class Plain(nn.Module):
    """A model that takes its inputs by name or position and returns a tuple of tensors, for what records graphs."""

    def __init__(self, network: nn.Module, signature: Signature) -> None:
        super().__init__()
        import inspect

        self.network = network
        names, outputs, keywords = signature.inputs, signature.outputs, signature.keywords

        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            result = network(**given) if keywords else network(*(given[name] for name in names))
            found = named_outputs(result)
            several = tuple(found[name] for name in outputs)
            return several if len(several) > 1 else several[0]

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        self.forward = forward


def eager(module: nn.Module, signature: Signature) -> Run:
    """Return a way to call the module as it is."""

    def run(inputs: Inputs) -> dict[str, torch.Tensor]:
        given = signature.cast(inputs)
        with torch.inference_mode():
            result = module(**given) if signature.keywords else module(*(given[name] for name in signature.inputs))
            found = named_outputs(result)
            return {name: found[name] for name in signature.outputs} if signature.outputs else found

    return run


def positional(function: Callable[..., Any], signature: Signature) -> Run:
    """Return a way to call a recorded graph, which returns tensors in the signature's order."""

    def run(inputs: Inputs) -> dict[str, torch.Tensor]:
        given = signature.cast(inputs)
        with torch.inference_mode():
            if signature.keywords:
                result = function(**{name: given[name] for name in signature.inputs})
            else:
                result = function(*(given[name] for name in signature.inputs))
        several = result if isinstance(result, (tuple, list)) else (result,)
        return dict(zip(signature.outputs, several, strict=True))

    return run


class AsNetwork:
    """A ``Run`` in the clothes of a module, for evaluators: called like the model, returns its outputs as attributes."""

    def __init__(self, run: Run, signature: Signature, config: Any, device: torch.device) -> None:
        self._run, self._signature = run, signature
        self.config, self.device = config, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._signature.inputs, args, strict=False)) | kwargs
        found = self._run({name: given[name] for name in self._signature.inputs if name in given})
        return found["output"] if list(found) == ["output"] else SimpleNamespace(**found)

    def eval(self) -> AsNetwork:
        """Return itself: what was exported has no other mode."""
        return self


def signature_of(module: nn.Module, inputs: Inputs, keywords: bool, dtype: torch.dtype | None) -> Signature:
    """Call a module once and return how it is called and what it returns."""
    draft = Signature(tuple(inputs), (), keywords, dtype)
    return Signature(draft.inputs, tuple(eager(module, draft)(inputs)), keywords, dtype)


def floats(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the outputs that are floating numbers, as float64 on the CPU."""
    return {name: value.detach().double().cpu() for name, value in outputs.items() if value.is_floating_point()}


def shape_text(inputs: Mapping[str, torch.Tensor] | Sequence[int]) -> str:
    """Return shapes as ``3x16``; those of several inputs only where they differ."""
    if isinstance(inputs, Mapping):
        return " ".join(dict.fromkeys(shape_text(tuple(value.shape)) for value in inputs.values()))
    return "x".join(map(str, inputs)) or "1"
