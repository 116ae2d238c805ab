"""Recorded graphs of torch: ``torch.export`` programs, and TorchScript, which torch itself no longer develops."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from distckpt.errors import IncompatibleState
from distckpt.export.feeds import Batches
from distckpt.export.runners import Plain, Run, Signature, positional

logger = logging.getLogger("distckpt")
LEGACY = (
    "TorchScript is a legacy format: torch deprecates recording and loading it; prefer a torch.export program (.pt2)"
)


def record_program(plain: Plain, signature: Signature, batches: Batches) -> tuple[Any, dict[str, dict[int, Any]]]:
    """Record a ``torch.export`` program; returns it and its axes of any length, by input and axis.

    Limits that torch finds on the way (positions that an embedding has) become those of the axes. Raises
    ``IncompatibleState`` for what cannot be recorded, or where an axis would be fixed to the size of the example.
    """
    from torch._dynamo.exc import UserError
    from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes as refined

    axes = {name for names in batches.axes.values() for name in names if name is not None}
    dims = {name: torch.export.Dim(name) for name in axes}
    shapes: Any = {
        name: {i: dims[axis] for i, axis in enumerate(batches.axes[name]) if axis is not None}
        for name in signature.inputs
    }
    example = signature.cast(batches.trace)
    for attempt in range(4):
        args = () if signature.keywords else tuple(example.values())
        kwargs = example if signature.keywords else None
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.export(plain, args, kwargs, dynamic_shapes=shapes)
                _forget_paths(program)
                return program, shapes
        except UserError as cause:
            fixes = [line.strip() for line in str(cause).partition("Suggested fixes:")[2].splitlines() if " = " in line]
            fixed = [line for line in fixes if line.rpartition(" = ")[2].strip().isdigit()]
            if fixed or not fixes or attempt == 3:
                what = f"the model takes one size only: {', '.join(fixed)}" if fixed else _first_lines(cause)
                raise IncompatibleState(f"torch.export: {what}; remove from forward what depends on a size") from cause
            shapes = refined("Suggested fixes:\n" + "\n".join(fixes), shapes)
        except Exception as cause:
            raise IncompatibleState(f"torch.export cannot record this model: {_first_lines(cause)}") from cause
    raise AssertionError("unreachable")


def _forget_paths(program: Any) -> None:
    """Drop the stack traces of the code that was recorded: they name folders of the machine it was trained on."""
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def write_program(program: Any, path: str | os.PathLike[str], stamp: Mapping[str, str]) -> None:
    """Write a ``.pt2`` archive; the stamp lies in it as extra files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, os.fspath(path), extra_files=dict(stamp))


def open_program(path: str | os.PathLike[str], signature: Signature) -> tuple[Run, dict[str, torch.Tensor]]:
    """Load a ``.pt2`` archive; returns how to call it, and its weights by the model's own names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(os.fspath(path))
    return positional(program.module(), signature), own_names(program.state_dict)


def write_torchscript(plain: Plain, signature: Signature, batches: Batches, path: str | os.PathLike[str]) -> None:
    """Trace the model and write it. Raises ``IncompatibleState`` for what cannot be traced."""
    logger.warning(LEGACY)
    example = signature.cast(batches.trace)
    args: dict[str, Any] = {"example_kwarg_inputs": example}
    if not signature.keywords:
        args = {"example_inputs": tuple(example.values())}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jit: Any = torch.jit
            jit.save(jit.trace(plain, **args, check_trace=False), os.fspath(path))
    except (RuntimeError, TypeError, ValueError) as cause:
        raise IncompatibleState(f"TorchScript cannot trace this model: {_first_lines(cause)}") from cause


def open_torchscript(path: str | os.PathLike[str], signature: Signature) -> tuple[Run, dict[str, torch.Tensor]]:
    """Load a TorchScript file; returns how to call it, and its weights by the model's own names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jit: Any = torch.jit
        script = jit.load(os.fspath(path), map_location="cpu")
    return positional(script, signature), own_names(script.state_dict())


def own_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a graph's weights without the name of the wrapper that it was recorded in."""
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split("\n\n")[0].split())[:400]
