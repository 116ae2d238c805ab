"""The model itself, where an export needs one: by import path, or the transformers class that a config fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from distckpt.errors import ConfigError, IncompatibleState, optional
from distckpt.export.dcp_folder import load
from distckpt.export.weights import Weights

_CLASSES: Final = (
    "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering", "AutoModelForMaskedLM", "AutoModelForImageClassification", "AutoModel",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Builder:
    """Makes the model anew, with weights of its own. ``name``: of its class or factory, for the record.

    ``huggingface``: the transformers class, if it is one of those.
    """

    name: str
    make: Callable[[], nn.Module]
    config: Any
    huggingface: Any = None


def builder_of(model: Any, config: Any, weights: Weights, *, where: str) -> Builder | None:
    """Return how to make the model: from a factory, else from a transformers config; None if neither is there.

    ``model``: called with the config if it takes an argument, else without. Of a config without ``architectures`` the
    class is the first of the common ones that has exactly these names and shapes. Raises ``IncompatibleState`` for a
    config that does not fit the weights.
    """
    if model is not None:
        if not callable(model):
            raise ConfigError(f"model={model!r}: want a function that returns the module, or its import path")
        return Builder(getattr(model, "__qualname__", type(model).__name__), lambda: _called(model, config), config)
    if not isinstance(config, Mapping) or "model_type" not in config:
        return None
    transformers = optional("transformers", "eval")
    try:
        parsed = transformers.AutoConfig.for_model(**config)
    except (KeyError, ValueError, TypeError) as cause:
        raise ConfigError(f"{where}: config of model_type {config['model_type']!r} cannot be used: {cause}") from cause
    named = [name for name in config.get("architectures") or () if hasattr(transformers, name)]
    tried: dict[str, str] = {}
    for name in named or _CLASSES:
        auto = getattr(transformers, name)
        try:
            with torch.device("meta"):
                empty = auto(parsed) if name in named else auto.from_config(parsed)
        except ValueError:
            continue
        problem = misfit(empty, weights)
        if problem is None:
            kind = type(empty)
            return Builder(kind.__name__, partial(_hugging, kind, parsed), dict(config), kind)
        tried[type(empty).__name__] = problem
    told = "; ".join(f"{name}: {problem}" for name, problem in list(tried.items())[:3])
    raise IncompatibleState(
        f"{where}: the config does not fit the weights ({told}); name the right one (config=, --config)"
    )


def _called(factory: Callable[..., Any], config: Any) -> nn.Module:
    try:
        wants = [
            p
            for p in inspect.signature(factory).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        wants = []
    made = factory(config) if wants else factory()
    if not isinstance(made, nn.Module):
        raise ConfigError(f"model factory {factory!r} returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def _hugging(kind: Any, config: Any) -> nn.Module:
    made: nn.Module = kind(config)
    return made


def tied_names(module: nn.Module) -> dict[str, str]:
    """Return the further names of tensors that a module has under several, to the first one's.

    transformers says which of the names it stores (``_tied_weights_keys``); on the meta device it has not tied yet.
    """
    found: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and first.setdefault(id(tensor), name) != name:
            found[name] = first[id(tensor)]
    told = getattr(module, "all_tied_weights_keys", None)
    for alias, source in (told or {}).items():
        found.pop(source, None)
        found[alias] = source
    return found


def misfit(module: nn.Module, weights: Weights) -> str | None:
    """Say in which way weights do not fit a module, None if they do; a tied name may be absent."""
    own = {name: tuple(t.shape) for name, t in module.state_dict().items() if isinstance(t, torch.Tensor)}
    given, tied = weights.shapes(), tied_names(module)
    groups = {alias: {alias, name, *(a for a, n in tied.items() if n == name)} for alias, name in tied.items()}
    groups |= {name: groups[alias] for alias, name in tied.items()}
    missing = [name for name in own if name not in given and not (groups.get(name, set()) & set(given))]
    extra = [name for name in given if name not in own]
    other = [name for name in own if name in given and own[name] != given[name]]
    if other:
        return f"{other[0]} is {list(given[other[0]])} in the checkpoint and {list(own[other[0]])} in the model"
    if missing:
        return f"no weights for {missing[:3]}"
    return f"weights {extra[:3]} have no place in it" if extra else None


def loaded(builder: Builder, weights: Weights, *, where: str) -> nn.Module:
    """Return the model in eval mode with these weights in their own dtypes, read one tensor at a time.

    Ties of the model stay ties. Raises ``IncompatibleState`` where a weight has no place or a place no weight.
    """
    module = builder.make()
    problem = misfit(module, weights)
    if problem is not None:
        raise IncompatibleState(f"{where}: {problem} ({builder.name}); check the model, its config and the prefix")
    targets = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, stream in weights.tensors.items():
            tensor = load(stream)
            names = [name, *(alias for alias, target in weights.aliases.items() if target == name)]
            for place in {id(targets[one]): targets[one] for one in names if one in targets}.values():
                place.data = tensor
    return module.eval()


def other_bits(module: nn.Module, weights: Weights) -> list[str]:
    """Return the names that a module ties and that were stored with different values: one of them would be lost."""
    found = []
    for alias, name in tied_names(module).items():
        if alias in weights.tensors and name in weights.tensors:
            mine, other = load(weights.tensors[alias]), load(weights.tensors[name])
            if mine.shape != other.shape or not torch.equal(mine, other):
                found.append(f"{alias} and {name}")
    return found


def fleeting_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that no checkpoint has (``persistent=False``): what is in them comes from the model's code."""
    saved = set(module.state_dict())
    return {name: buffer for name, buffer in module.named_buffers() if name not in saved}


def unstable_buffers(builder: Builder, module: nn.Module) -> list[str]:
    """Return the buffers outside checkpoints that a second build, from other random numbers, fills differently."""
    mine = fleeting_buffers(module)
    if not mine:
        return []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0x5EED)
        again = fleeting_buffers(builder.make())
    return [n for n, b in mine.items() if n not in again or not torch.equal(b.cpu(), again[n].to(b.dtype).cpu())]
