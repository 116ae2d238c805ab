"""What every importer returns: named tensors whose bytes are read on demand, plain values, and where they are from."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from distckpt.boxes import Box
from distckpt.dcp.leaves import tree_refs
from distckpt.engines.base import MODEL, OPTIM_GROUPS, OPTIM_STATE
from distckpt.engines.param_state import split_state_names
from distckpt.errors import IncompatibleState
from distckpt.export.stream import Buffer, Offer, Stream
from distckpt.format import typed_json
from distckpt.format.checkpoint import Checkpoint, open_checkpoint
from distckpt.format.dtypes import itemsize
from distckpt.importers.files import FileTensor

logger = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True)
class Options:
    """What a person asked for. ``step``: which one, where a source has several. ``prefix``: put before model names."""

    step: int | None = None
    prefix: str = MODEL
    optimizer: bool = True
    allow: tuple[str, ...] = ()


@dataclass(slots=True)
class Source:
    """One checkpoint of another kind, opened: nothing but descriptions is in memory.

    Names are distckpt's. ``per_rank[r]`` are the objects of rank r alone; ``notes`` say what was left out or assumed.
    """

    kind: str
    path: str
    step: int | None = None
    tensors: dict[str, Stream] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    config: Any = None
    epoch: int | float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    per_rank: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    """Where it is distckpt's own: for layouts and digests."""
    _seen: dict[tuple[Any, ...], str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last component of the path, which alone is recorded."""
        return Path(self.path.rstrip("/")).name

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stream.nbytes for stream in self.tensors.values())

    def add(self, name: str, tensor: FileTensor | Stream) -> None:
        """Add one tensor. The same bytes under a second name of the model, or of the optimizer, make it an alias."""
        if name in self.tensors or name in self.aliases:
            raise IncompatibleState(f"{self.path}: two tensors are both called {name!r}")
        if isinstance(tensor, Stream):
            self.tensors[name] = tensor
            return
        identity = (tensor.path, tensor.start, tensor.dtype, tensor.shape, tensor.stride)
        first = self._seen.setdefault(identity, name) if tensor.numel else name
        if first != name and any(name.startswith(part) and first.startswith(part) for part in (MODEL, OPTIM_STATE)):
            self.aliases[name] = first
        else:
            self.tensors[name] = tensor.stream()

    def add_tree(self, name: str, tree: Any) -> None:
        """Add a plain value; tensors in it become tensors of their own, with references in their places."""
        self.objects[name] = self._without_tensors(name, tree)

    def _without_tensors(self, path: str, node: Any) -> Any:
        if isinstance(node, FileTensor):
            self.add(path, node)
            return typed_json.Ref(path)
        if type(node) in (list, tuple):
            return type(node)(self._without_tensors(f"{path}.{i}", item) for i, item in enumerate(node))
        if isinstance(node, dict):
            return {key: self._without_tensors(f"{path}.{key}", item) for key, item in node.items()}
        return node

    def tie_state(self) -> None:
        """Give optimizer state of tied parameters all their names, as saves do."""
        tied: dict[str, list[str]] = {}
        for alias, target in list(self.aliases.items()):
            if alias.startswith(MODEL):
                tied.setdefault(target.removeprefix(MODEL), []).append(alias.removeprefix(MODEL))
        for fqn, keys in split_state_names(self.tensors, tied).items():
            for alias in tied[fqn]:
                for key, name in keys.items():
                    self.aliases.setdefault(f"{OPTIM_STATE}{alias}.{key}", name)

    def without_optimizer(self) -> None:
        """Leave out the optimizer's tensors and objects."""
        self.tensors = {n: t for n, t in self.tensors.items() if not n.startswith("optim.")}
        self.aliases = {n: t for n, t in self.aliases.items() if not n.startswith("optim.")}
        self.objects = {n: v for n, v in self.objects.items() if not n.startswith("optim.")}

    def offer(self) -> Offer:
        """Return what writers for other formats take."""
        return Offer(self.tensors, self.aliases, self.objects, self.config)


def constant(dtype: str, data: bytes, shape: tuple[int, ...] = ()) -> Stream:
    """Return a small tensor that is in memory."""
    return Stream(dtype, shape, lambda start, stop: data[start:stop])


def add_optimizer(source: Source, state: Mapping[str, Any]) -> None:
    """Add a torch optimizer's state dict under FQNs.

    Keys that are FQNs, or groups with ``param_names``, say themselves whose state it is. Numbers do only where there is
    one group that holds every parameter of the model: they then count in the order of its state dict, and every state
    tensor's shape is compared. Raises ``IncompatibleState`` otherwise: state is never guessed onto a parameter.
    """
    groups = list(state["param_groups"])
    names = _param_names(source, groups, state["state"])
    for key, values in state["state"].items():
        for item, value in values.items():
            name = f"{OPTIM_STATE}{names.get(key, key)}.{item}"
            if isinstance(value, FileTensor):
                source.add(name, value)
            else:
                source.add_tree(name, value)
    source.objects[OPTIM_GROUPS] = [
        {**{k: v for k, v in group.items() if k not in ("params", "param_names")},
         "params": [names.get(key, key) for key in group["params"]]}
        for group in groups
    ]  # fmt: skip


def _param_names(source: Source, groups: list[Any], state: Mapping[Any, Any]) -> dict[Any, str]:
    keys = [key for group in groups for key in group["params"]]
    if all(isinstance(key, str) for key in keys):
        return {key: key for key in keys}
    if all("param_names" in group for group in groups):
        return {k: n for group in groups for k, n in zip(group["params"], group["param_names"], strict=True)}
    model = [
        (name.removeprefix(MODEL), stream.shape)
        for name, stream in source.tensors.items()
        if name.startswith(MODEL) and "float" in stream.dtype and not name.endswith(("running_mean", "running_var"))
    ]
    problem = None
    if len(groups) != 1 or len(keys) != len(model):
        problem = f"{len(keys)} numbered parameters in {len(groups)} groups, {len(model)} candidates in the model"
    else:
        for key, (name, shape) in zip(keys, model, strict=True):
            for item, value in state.get(key, {}).items():
                if isinstance(value, FileTensor) and value.shape and value.shape != shape:
                    problem = f"{item} of parameter {key} has shape {list(value.shape)}, {name} has {list(shape)}"
    if problem is not None:
        raise IncompatibleState(
            f"{source.path}: whose optimizer state is whose cannot be known: {problem}. Convert with --no-optimizer, or save "
            "the optimizer by torch.distributed.checkpoint.state_dict.get_state_dict, which names parameters"
        )
    source.notes.append("optimizer state was numbered; numbers were taken in the order of the model's state dict")
    return {key: name for key, (name, _) in zip(keys, model, strict=True)}


def open_distckpt(path: str | os.PathLike[str], options: Options) -> Source:
    """Open a distckpt checkpoint as a source; every byte is verified as it is read."""
    from distckpt.format.catalog import parse_location
    from distckpt.format.names import step_folder

    at = parse_location(path)
    where = os.fspath(path)
    if options.step is not None and at.step is None:
        where = f"{where.rstrip('/')}/{step_folder(options.step)}"
    found = open_checkpoint(where, strict=True)
    manifest = found.manifest
    source = Source("distckpt", where, step=found.step, epoch=found.epoch, config=found.config)
    source.checkpoint = found
    for fqn, entry in manifest.tensors.items():
        source.tensors[fqn] = _stored(found, fqn, entry.dtype, tuple(entry.shape))
    source.aliases = dict(manifest.aliases)
    source.objects, source.metrics = dict(found.objects), dict(found.metrics)
    if manifest.per_rank:
        source.per_rank = [found.rank_objects(rank) for rank in range(len(manifest.shards))]
    return source


def _stored(found: Checkpoint, fqn: str, dtype: str, shape: tuple[int, ...]) -> Stream:
    size, whole = itemsize(dtype), Box.whole(shape)

    def read(start: int, stop: int) -> Buffer:
        first, last = start // size * size, -(-stop // size) * size
        out = memoryview(bytearray(last - first))
        found.read_into(fqn, whole, first, last, out)
        return out[start - first : stop - first]

    return Stream(dtype, shape, read, partial(found.read_into, fqn), partial(found.lend, fqn))


def box_of(offsets: Iterable[int], sizes: Iterable[int]) -> Box:
    """Return a box from any sequences of numbers."""
    return Box(tuple(offsets), tuple(sizes))


def unused_refs(source: Source) -> set[str]:
    """Return the references in objects that no tensor answers; empty for a sound source."""
    known = {*source.tensors, *source.aliases}
    return {name for value in source.objects.values() for name in tree_refs(value)} - known
