"""A file of ``torch.save``: a state dict, or a dict that holds one together with an optimizer's and other state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from distckpt.engines.base import clean_fqn
from distckpt.errors import IncompatibleState
from distckpt.importers.files import FileTensor, regular_file
from distckpt.importers.pickled import Pickled, read_pickled
from distckpt.importers.source import Options, Source, add_optimizer

MODEL_KEYS = ("model", "model_state_dict", "state_dict", "module", "net", "weights")
OPTIMIZER_KEYS = ("optim", "optimizer", "optimizer_state_dict", "optim_state_dict")
SCHEDULER_KEYS = ("scheduler", "lr_scheduler", "scheduler_state_dict")
STEP_KEYS = ("step", "global_step", "global_steps", "iteration")


def open_torch_file(path: str | os.PathLike[str], options: Options) -> Source:
    """Open a file of ``torch.save`` (zip or older). Tensors are read where they lie; memory does not depend on the file.

    Every name gets the prefix, also those that begin with ``model.`` already: that is the module's own name. Wrapper
    prefixes of DDP and ``torch.compile`` are dropped where all names have one. Raises ``ForbiddenPickle``,
    ``CorruptCheckpoint``, ``IncompatibleState``.
    """
    file = regular_file(path)
    tree = read_pickled([Pickled(file)], allow=options.allow)[0]
    if not isinstance(tree, dict):
        raise IncompatibleState(f"{file}: holds a {type(tree).__name__}, not a dict of tensors; save the state_dict()")
    source = Source("torch", os.fspath(path))
    key = next((k for k in MODEL_KEYS if isinstance(tree.get(k), dict) and tensors_in(tree[k])), None)
    add_state_dict(source, tree if key is None else tree[key], options.prefix)
    if key is None:
        return source
    for name, value in tree.items():
        if name in OPTIMIZER_KEYS and isinstance(value, dict) and {"state", "param_groups"} <= set(value):
            if options.optimizer:
                add_optimizer(source, value)
        elif name in SCHEDULER_KEYS:
            source.add_tree("scheduler", value)
        elif name != key:
            source.add_tree(name if isinstance(name, str) else repr(name), value)
    step = next((tree[k] for k in STEP_KEYS if type(tree.get(k)) is int and tree[k] >= 0), None)
    source.step, epoch = step, tree.get("epoch")
    source.epoch = epoch if type(epoch) in (int, float) else None
    source.tie_state()
    return source


def tensors_in(tree: Mapping[Any, Any]) -> bool:
    """Whether a state dict has a tensor at its top."""
    return any(isinstance(value, FileTensor) for value in tree.values())


def add_state_dict(source: Source, state: Mapping[Any, Any], prefix: str) -> None:
    """Add a model's state dict under its FQNs; raises ``IncompatibleState`` if it has no tensors at its top."""
    if not tensors_in(state):
        raise IncompatibleState(f"{source.path}: no state dict found; its keys are {sorted(map(str, state))[:10]}")
    cleaned = {str(name): clean_fqn(str(name)) for name in state}
    wrapped = all(new != old for old, new in cleaned.items()) and len(set(cleaned.values())) == len(cleaned)
    for name, value in state.items():
        full = prefix + (cleaned[str(name)] if wrapped else str(name))
        if isinstance(value, FileTensor):
            source.add(full, value)
        else:
            source.add_tree(full, value)
