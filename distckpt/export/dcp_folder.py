"""A plain folder of torch.distributed.checkpoint, which ``dcp.load`` reads without distckpt. Memory: one tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from distckpt.dcp.leaves import torch_dtype, tree_refs, unflatten_tree
from distckpt.engines.base import MODEL, OPTIM_STATE
from distckpt.engines.param_state import split_state_names
from distckpt.export.stream import Offer, Progress, Stream, new_folder


class _Streaming(DefaultSavePlanner):
    """Plans with tensors that have no bytes, and reads each one's when it is written."""

    def __init__(self, streams: Mapping[str, Stream], progress: Progress) -> None:
        super().__init__()
        self._streams, self._progress = streams, progress

    def lookup_object(self, index: MetadataIndex) -> Any:
        stream = self._streams.get(index.fqn)
        return super().lookup_object(index) if stream is None else load(stream, self._progress)


def load(stream: Stream, progress: Progress = lambda nbytes: None) -> torch.Tensor:
    """Return a stream's tensor on the CPU."""
    octets = torch.empty(stream.nbytes, dtype=torch.uint8)
    at = 0
    for chunk in stream.chunks():
        octets[at : at + len(chunk)] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
        at += len(chunk)
        progress(len(chunk))
    dtype = torch_dtype(stream.dtype)
    return octets.view(dtype).reshape(stream.shape) if at else torch.empty(stream.shape, dtype=dtype)


def export_dcp_folder(
    offer: Offer, target: str | os.PathLike[str], progress: Progress = lambda nbytes: None
) -> dict[str, Stream]:
    """Write a new folder as ``dcp.save({"model": ..., "optim": ..., ...})`` would; returns its tensors by DCP's names.

    ``model.<FQN>`` and ``optim.state.<FQN>.<key>`` nest as ``get_state_dict`` does, so ``dcp.load`` into a model's and
    an optimizer's state dicts finds them. Tied tensors are written under every name. Raises ``ConfigError`` if the
    folder is in use.
    """
    streams = {**offer.tensors, **{alias: offer.tensors[name] for alias, name in offer.aliases.items()}}
    planner = _Streaming(streams, progress)
    with new_folder(target) as draft:
        writer = FileSystemWriter(draft, single_file_per_rank=True, thread_count=1, sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group is there is meant
            save(nested(streams, offer.objects), storage_writer=writer, planner=planner, no_dist=True)
    return streams


def nested(streams: Mapping[str, Stream], objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested state dict that flattens to these names, its tensors on the meta device."""
    empty = {n: torch.empty(s.shape, dtype=torch_dtype(s.dtype), device="meta") for n, s in streams.items()}
    tree: dict[str, Any] = {}
    referenced: set[str] = set()
    fqns = [name.removeprefix(MODEL) for name in streams if name.startswith(MODEL)]
    states = {n: (fqn, key) for fqn, keys in split_state_names(streams, fqns).items() for key, n in keys.items()}
    for name, value in objects.items():
        referenced |= set(tree_refs(value))
        filled = unflatten_tree(value, empty)
        if name.startswith(OPTIM_STATE) or not name.startswith((MODEL, "optim.")):
            tree[name] = filled
        else:
            top, _, rest = name.partition(".")
            tree.setdefault(top, {})[rest] = filled
    for name, tensor in empty.items():
        if name in referenced:
            continue
        if name in states:
            fqn, key = states[name]
            tree.setdefault("optim", {}).setdefault("state", {}).setdefault(fqn, {})[key] = tensor
        elif name.startswith(MODEL):
            tree.setdefault("model", {})[name.removeprefix(MODEL)] = tensor
        else:
            tree[name] = tensor
    return tree
